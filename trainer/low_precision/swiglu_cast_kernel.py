"""The Triton kernels of `swiglu_cast`. Imported on machines with a GPU only."""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import libdevice

from trainer.low_precision.fused_cast_kernel import move_across, raise_amax, to_float8


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """Round fp32 to a dtype of high precision, as a tensor of that dtype in between would."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _get_sigmoid(x):
    """By the GPU's own exponential and reciprocal, as accurate as Triton's, which spend ten instructions on results below 1e-38."""
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def swiglu_cast_kernel(
    a_ptr,  # (count,), contiguous
    b_ptr,  # (count,), contiguous
    scale_ptr,  # (), fp32
    rows_ptr,  # (count,) float8
    amax_ptr,  # (), int32: bits of an fp32. Unused unless FINDS_AMAX
    count,
    FINDS_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cast silu(a) * b of one block, and raise the amax to the block's."""
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    a = tl.load(a_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    h = _round(_round(a * _get_sigmoid(a), dtype) * b, dtype)
    if FINDS_AMAX:
        raise_amax(amax_ptr, h)
    tile = to_float8(h, tl.load(scale_ptr), rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + places, tile, mask=is_inside)


@triton.jit
def swiglu_backward_cast_kernel(
    gh_ptr,  # (M, F), contiguous
    a_ptr,  # (M, F), contiguous
    b_ptr,  # (M, F), contiguous
    scale_h_ptr,  # (), fp32
    scale_ga_ptr,  # (), fp32
    scale_gb_ptr,  # (), fp32
    ga_rows_ptr,  # (M, F) float8
    ga_columns_ptr,  # (F, M) float8
    gb_rows_ptr,  # (M, F) float8
    gb_columns_ptr,  # (F, M) float8
    h_columns_ptr,  # (F, M) float8
    amax_ptr,  # (2,), int32: bits of fp32, of ga and gb. Unused unless FINDS_AMAX
    n_rows,
    n_columns,
    FINDS_AMAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Find the gradients of one tile, cast them and h, store the former both ways, and raise the amaxes to the tile's."""
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    places = rows[:, None] * n_columns + columns[None, :]
    places_across = columns[:, None] * n_rows + rows[None, :]
    a = tl.load(a_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    gh = tl.load(gh_ptr + places, mask=is_inside, other=0.0).to(tl.float32)

    sigmoid = _get_sigmoid(a)
    silu = _round(a * sigmoid, dtype)
    h8 = to_float8(_round(silu * b, dtype), tl.load(scale_h_ptr), h_columns_ptr.dtype.element_ty)
    tl.store(h_columns_ptr + places_across, move_across(h8), mask=tl.trans(is_inside))

    gb = _round(gh * silu, dtype)
    if FINDS_AMAX:
        raise_amax(amax_ptr + 1, gb)
    gb8 = to_float8(gb, tl.load(scale_gb_ptr), gb_rows_ptr.dtype.element_ty)
    tl.store(gb_rows_ptr + places, gb8, mask=is_inside)
    tl.store(gb_columns_ptr + places_across, move_across(gb8), mask=tl.trans(is_inside))

    ga = _round(_round(gh * b, dtype) * sigmoid * (1.0 + a * (1.0 - sigmoid)), dtype)
    if FINDS_AMAX:
        raise_amax(amax_ptr, ga)
    ga8 = to_float8(ga, tl.load(scale_ga_ptr), ga_rows_ptr.dtype.element_ty)
    tl.store(ga_rows_ptr + places, ga8, mask=is_inside)
    tl.store(ga_columns_ptr + places_across, move_across(ga8), mask=tl.trans(is_inside))
