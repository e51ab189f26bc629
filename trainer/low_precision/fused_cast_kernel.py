"""The Triton kernels of `fused_cast` and `shard_cast`. Imported on machines with a GPU only."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def to_float8(x, scale, DTYPE: tl.constexpr):
    """Return x * scale, fp32, in a float8 dtype. What is too large becomes its largest value, and a NaN stays one: so the GPU's
    conversion rounds, by itself. An infinity becomes NaN, as 0 times it is; to other values 0 times them adds nothing."""
    return (x * scale + x * 0.0).to(DTYPE)


@triton.jit
def move_across(tile):
    """Return the transpose of a float8 tile.

    By way of fp32 and fp16, which have every float8 value: Triton 3.6 moves bytes between threads wrongly, and halves rightly. It
    moves them at the narrowest of a chain of widening casts, which must not be float8.
    """
    return tl.trans(tile.to(tl.float32).to(tl.float16)).to(tl.float32).to(tile.dtype)


@triton.jit
def raise_amax(amax_ptr, x):
    """Raise the amax at `amax_ptr`, the bits of an fp32, to the largest magnitude of fp32 x, of one dim or two."""
    # As integers, since a maximum of floats may drop a NaN.
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    if len(x.shape) == 2:
        bits = tl.max(bits, axis=1)
    tl.atomic_max(amax_ptr, tl.max(bits, axis=0), sem="relaxed")


@triton.jit
def cast_kernel(
    x_ptr,  # (M, K), contiguous
    scale_ptr,  # (), fp32
    rows_ptr,  # (M, K) float8
    columns_ptr,  # (K, M) float8
    amax_ptr,  # (), int32: bits of an fp32
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Cast one tile, store it both ways, and raise the amax to the tile's."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    x = tl.load(x_ptr + rows[:, None] * n_columns + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)
    raise_amax(amax_ptr, x)
    tile = to_float8(x, tl.load(scale_ptr), rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + rows[:, None] * n_columns + columns[None, :], tile, mask=is_inside)
    tl.store(columns_ptr + columns[:, None] * n_rows + rows[None, :], move_across(tile), mask=tl.trans(is_inside))


@triton.jit
def cast_flat_kernel(
    x_ptr,  # (count,), contiguous
    scale_ptr,  # (), fp32
    data_ptr,  # (count,) float8
    amax_ptr,  # (), int32: bits of an fp32. Unused unless FINDS_AMAX
    count,
    FINDS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cast one block, and raise the amax to the block's."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    x = tl.load(x_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    if FINDS_AMAX:
        raise_amax(amax_ptr, x)
    tile = to_float8(x, tl.load(scale_ptr), data_ptr.dtype.element_ty)
    tl.store(data_ptr + places, tile, mask=is_inside)
