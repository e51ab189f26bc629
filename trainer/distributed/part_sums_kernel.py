"""The Triton kernel of `part_sums`. Imported on machines with a GPU only."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def sum_parts_kernel(
    own_ptr,  # (count,), contiguous
    others_ptr,  # (RANKS - 1, count), contiguous
    output_ptr,  # (count,), contiguous
    count,
    RANK: tl.constexpr,  # whose part the own one is
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up one block of all parts in fp32."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            part = tl.load(own_ptr + places, mask=is_inside, other=0.0)
        else:
            row = rank if rank < RANK else rank - 1
            part = tl.load(others_ptr + row * count.to(tl.int64) + places, mask=is_inside, other=0.0)
        total += part.to(tl.float32)
    tl.store(output_ptr + places, total.to(output_ptr.dtype.element_ty), mask=is_inside)
