"""The Triton kernels of `gradient_wire`. Imported on machines with a GPU only."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    gradients_ptr,  # (ranks, values), contiguous
    starts_ptr,  # (blocks,), int64
    lengths_ptr,  # (blocks,), int32
    codes_ptr,  # (ranks, blocks * (BLOCK + 4)), uint8: codes, then scales
    scales_ptr,  # the same memory, as fp32
    n_values,
    n_blocks,
    ALIGNMENT: tl.constexpr,  # what all starts and lengths are multiples of
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cast some blocks of the gradients for one rank, each by its largest magnitude."""
    rank = tl.program_id(1).to(tl.int64)
    blocks = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = tl.arange(0, BLOCK)
    is_block = blocks < n_blocks
    starts = tl.multiple_of(tl.load(starts_ptr + blocks, mask=is_block, other=0), ALIGNMENT)
    lengths = tl.multiple_of(tl.load(lengths_ptr + blocks, mask=is_block, other=0), ALIGNMENT)
    is_inside = offsets[None, :] < lengths[:, None]
    places = rank * n_values + starts[:, None] + offsets[None, :]
    values = tl.load(gradients_ptr + places, mask=is_inside, other=0.0).to(tl.float32)

    scales = tl.maximum(tl.max(tl.abs(values), axis=1), 7.888609052210118e-31) / 448.0
    codes = (values / scales[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    row = rank * n_blocks * (BLOCK + 4)
    tl.store(codes_ptr + row + blocks[:, None] * BLOCK + offsets[None, :], codes, mask=is_block[:, None])
    tl.store(scales_ptr + (row + n_blocks * BLOCK) // 4 + blocks, scales, mask=is_block)


@triton.jit
def sum_kernel(
    codes_ptr,  # (ranks, blocks * (BLOCK + 4)), float8: codes, then scales
    scales_ptr,  # the same memory, as fp32
    starts_ptr,  # (blocks,), int64
    lengths_ptr,  # (blocks,), int32
    output_ptr,  # (values,)
    n_blocks,
    RANKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # what all starts and lengths are multiples of
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up some blocks of all ranks."""
    blocks = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = tl.arange(0, BLOCK)
    is_block = blocks < n_blocks
    total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    row_bytes = n_blocks.to(tl.int64) * (BLOCK + 4)
    for rank in range(RANKS):
        row = rank * row_bytes
        codes = tl.load(codes_ptr + row + blocks[:, None] * BLOCK + offsets[None, :], mask=is_block[:, None], other=0.0)
        scales = tl.load(scales_ptr + (row + n_blocks * BLOCK) // 4 + blocks, mask=is_block, other=0.0)
        total += codes.to(tl.float32) * scales[:, None]
    starts = tl.multiple_of(tl.load(starts_ptr + blocks, mask=is_block, other=0), ALIGNMENT)
    lengths = tl.multiple_of(tl.load(lengths_ptr + blocks, mask=is_block, other=0), ALIGNMENT)
    is_inside = offsets[None, :] < lengths[:, None]
    places = starts[:, None] + offsets[None, :]
    tl.store(output_ptr + places, total.to(output_ptr.dtype.element_ty), mask=is_inside)
