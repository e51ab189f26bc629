"""The Triton kernel of `adam`: a whole update in one pass. Imported on machines with a GPU only."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """MurmurHash3's finalizer, as `moments._mix`. x: uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _draw_bits(step, salt, places):
    """Return 32 random bits for each place, as `moments.draw_bits`. step: fp32."""
    seed = _mix(step.to(tl.int64).to(tl.uint32) * 0x9E3779B1 + salt.to(tl.uint32) * 0x27D4EB2F)
    return _mix(places.to(tl.uint32) + seed)


@triton.jit
def _round_stochastically(x, bits):
    raised = ((x.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -0x10000).to(tl.float32, bitcast=True)
    is_finite = tl.abs(x) < float("inf")
    return tl.where(is_finite, raised, x).to(tl.bfloat16)


@triton.jit
def _read(
    data_ptr, scales_ptr, values_ptr, places, blocks, numel, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return a tile of a moment (TILE, BLOCK), fp32, as `moments.read`."""
    is_inside = places < numel
    if KIND == "float32" or KIND == "bfloat16":
        values = tl.load(data_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    else:
        if KIND == "float8":
            values = tl.load(data_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
        elif KIND == "dynamic8":
            values = tl.load(values_ptr + tl.load(data_ptr + places, mask=is_inside, other=0).to(tl.int32))
        else:
            pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            packed = tl.load(data_ptr + pairs, mask=pairs * 2 < numel, other=0).to(tl.int32)
            values = tl.load(values_ptr + tl.interleave(packed >> 4, packed & 0xF))
        values *= tl.load(scales_ptr + blocks, mask=blocks * BLOCK < numel, other=0.0)[:, None]
    return values


@triton.jit
def _write(
    data_ptr, scales_ptr, midpoints_ptr, values, bits, places, blocks, numel, KIND: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store a tile of a moment, as `moments.write`."""
    is_inside = places < numel
    if KIND == "float32":
        tl.store(data_ptr + places, values, mask=is_inside)
    elif KIND == "bfloat16":
        tl.store(data_ptr + places, _round_stochastically(values, bits), mask=is_inside)
    else:
        scales = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-12)
        if KIND == "float8":
            scales = scales / 448.0
            tl.store(data_ptr + places, (values / scales[:, None]).to(data_ptr.dtype.element_ty), mask=is_inside)
        elif KIND == "dynamic8":
            codes = _count_midpoints(values / scales[:, None], midpoints_ptr, 8)
            tl.store(data_ptr + places, codes.to(tl.uint8), mask=is_inside)
        else:
            codes = _count_midpoints(values / scales[:, None], midpoints_ptr, 4)
            high, low = tl.split(tl.reshape(codes, (TILE, BLOCK // 2, 2)))
            pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            tl.store(data_ptr + pairs, ((high << 4) | low).to(tl.uint8), mask=pairs * 2 < numel)
        tl.store(scales_ptr + blocks, scales, mask=blocks * BLOCK < numel)


@triton.jit
def _count_midpoints(x, midpoints_ptr, BITS: tl.constexpr):
    """Return how many of 2^BITS - 1 ascending midpoints are not above x: the code of x."""
    codes = tl.zeros(x.shape, dtype=tl.int32)
    for position in tl.static_range(BITS):
        half = 1 << (BITS - 1 - position)
        codes += tl.where(x >= tl.load(midpoints_ptr + codes + (half - 1)), half, 0)
    return codes


@triton.jit(do_not_specialize=["salt"])
def adam_kernel(
    param_ptr, grad_ptr,  # (numel,)
    first_ptr, first_scales_ptr, first_values_ptr, first_midpoints_ptr,  # exp_avg; what its kind has not is not read
    second_ptr, second_scales_ptr, second_values_ptr, second_midpoints_ptr,  # exp_avg_sq
    step_ptr,  # (), fp32: steps taken, with this one
    corrections_ptr,  # (2,), fp32: 1 - beta ** step of both
    skip_ptr,  # (), fp32: leave all as it is unless 0
    numel,
    lr,
    keep, l2,  # what decoupled weight decay leaves of a parameter; weight decay as a part of the gradient
    new1, new2,  # 1 - beta1, 1 - beta2
    eps,
    salt,  # (of the random bits)
    FIRST: tl.constexpr, SECOND: tl.constexpr, HAS_SKIP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile, TILE x BLOCK values, of a parameter and of its moments."""
    if HAS_SKIP:  # noqa: SIM102  (known when compiled, the other when run)
        if tl.load(skip_ptr) != 0.0:
            return
    blocks = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    places = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_inside = places < numel
    param = tl.load(param_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + places, mask=is_inside, other=0.0).to(tl.float32) + l2 * param
    first = _read(first_ptr, first_scales_ptr, first_values_ptr, places, blocks, numel, FIRST, BLOCK)
    second = _read(second_ptr, second_scales_ptr, second_values_ptr, places, blocks, numel, SECOND, BLOCK)

    first += (grad - first) * new1
    second += (grad * grad - second) * new2
    denominator = tl.sqrt(second / tl.load(corrections_ptr + 1)) + eps
    param = param * keep - lr * (first / tl.load(corrections_ptr)) / denominator
    tl.store(param_ptr + places, param.to(param_ptr.dtype.element_ty), mask=is_inside)

    bits = _draw_bits(tl.load(step_ptr), salt, places)
    _write(
        first_ptr,
        first_scales_ptr,
        first_midpoints_ptr,
        first,
        bits & 0xFFFF,
        places,
        blocks,
        numel,
        FIRST,
        TILE,
        BLOCK,
    )
    _write(
        second_ptr,
        second_scales_ptr,
        second_midpoints_ptr,
        second,
        bits >> 16,
        places,
        blocks,
        numel,
        SECOND,
        TILE,
        BLOCK,
    )
