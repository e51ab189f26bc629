"""The Triton kernel of `fused_cast`. Imported on machines with a GPU only."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def cast_kernel(
    x_ptr,  # (M, K), contiguous
    scale_ptr,  # (), fp32
    rows_ptr,  # (M, K) float8
    columns_ptr,  # (K, M) float8
    amax_ptr,  # (), int32: bits of an fp32
    n_rows,
    n_columns,
    limit,  # the largest value of the float8 dtype
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Cast one tile, store it both ways, and raise the amax to the tile's."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    x = tl.load(x_ptr + rows[:, None] * n_columns + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)

    # As integers, since a maximum of floats may drop a NaN.
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr, tl.max(tl.max(bits, axis=1), axis=0), sem="relaxed")

    scaled = x * tl.load(scale_ptr)
    # By comparisons, which leave a NaN as it is.
    scaled = tl.where(scaled > limit, limit, scaled)
    scaled = tl.where(scaled < -limit, -limit, scaled)
    tile = scaled.to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + rows[:, None] * n_columns + columns[None, :], tile, mask=is_inside)
    # By way of fp32 and fp16, which have every float8 value: Triton 3.6 moves bytes between threads wrongly, and halves rightly. It
    # moves them at the narrowest of a chain of widening casts, which must not be float8.
    halves = tl.trans(tile.to(tl.float32).to(tl.float16))
    columns_tile = halves.to(tl.float32).to(columns_ptr.dtype.element_ty)
    tl.store(columns_ptr + columns[:, None] * n_rows + rows[None, :], columns_tile, mask=tl.trans(is_inside))


@triton.jit
def cast_flat_kernel(
    x_ptr,  # (count,), contiguous
    scale_ptr,  # (), fp32
    data_ptr,  # (count,) float8
    amax_ptr,  # (), int32: bits of an fp32. Unused unless FINDS_AMAX
    count,
    limit,  # the largest value of the float8 dtype
    FINDS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cast one block, and raise the amax to the block's."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    x = tl.load(x_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    if FINDS_AMAX:
        tl.atomic_max(amax_ptr, tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0), sem="relaxed")
    scaled = x * tl.load(scale_ptr)
    scaled = tl.where(scaled > limit, limit, scaled)
    scaled = tl.where(scaled < -limit, -limit, scaled)
    tl.store(data_ptr + places, scaled.to(data_ptr.dtype.element_ty), mask=is_inside)
