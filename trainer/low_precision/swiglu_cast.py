"""What is between the matrix products of a SwiGLU feed-forward in float8, h = silu(a) * b and its gradients, from products to casts.

One pass each way: forward reads a and b, and writes h in float8; backward reads them and the gradient of h, and writes the gradients of
a and b in float8 by rows and by columns, and h, made again, by columns, with the amaxes on the way. So h and the gradients are
never in memory in high precision. One Triton kernel each on CUDA, plain torch elsewhere; to the compiler each is one operation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.low_precision.fused_cast import has_kernel
from trainer.low_precision.recipe import E4M3, E5M2
from trainer.low_precision.scaling import cast, get_amax


@torch.library.custom_op("bloomery::swiglu_cast", mutates_args=())
def swiglu_cast(a: Tensor, b: Tensor, scale: Tensor, finds_amax: bool) -> tuple[Tensor, Tensor]:
    """Return h * scale in float8, saturated, and the amax of h, for h = silu(a) * b, rounded as two operations of torch round it.

    a, b: (M, F), both bf16, fp16 or fp32; scale: 0-dim fp32 -> (M, F) e4m3, contiguous; 0-dim fp32, NaN if h has one. Zero
    unless `finds_amax`.
    """
    if not has_kernel(a):
        return swiglu_cast_plainly(a, b, scale, finds_amax)
    rows = torch.empty(a.shape, dtype=E4M3, device=a.device)
    amax_bits = torch.zeros((), dtype=torch.int32, device=a.device)
    if a.numel():
        launch_swiglu_cast(a.contiguous(), b.contiguous(), scale, rows, amax_bits if finds_amax else None)
    return rows, amax_bits.view(torch.float32)


@swiglu_cast.register_fake
def _(a: Tensor, b: Tensor, scale: Tensor, finds_amax: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(a.shape, dtype=E4M3, device=a.device), torch.empty((), dtype=torch.float32, device=a.device)


def swiglu_cast_plainly(a: Tensor, b: Tensor, scale: Tensor, finds_amax: bool) -> tuple[Tensor, Tensor]:
    """The same by torch's own operations."""
    h = swiglu(a, b)
    return cast(h, scale, E4M3), get_amax(h).float() if finds_amax else scale.new_zeros(())


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """Return silu(a) * b."""
    return F.silu(a) * b


@torch.library.custom_op("bloomery::swiglu_backward_cast", mutates_args=())
def swiglu_backward_cast(
    gh: Tensor, a: Tensor, b: Tensor, scale_h: Tensor, scale_ga: Tensor, scale_gb: Tensor, finds_amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients ga and gb of a and b, each times its scale in float8, saturated, with its transpose; the transpose of h, as
    `swiglu_cast` casts it; and the amaxes of ga and gb.

    gh: the gradient of h. gh, a, b: (M, F) of one dtype, rounded to it wherever torch's own operations do; scales: 0-dim fp32 ->
    ga, (M, F) and (F, M), gb likewise, e5m2; h, (F, M), e4m3; (2,) fp32, zeros unless `finds_amax`.
    """
    if not has_kernel(a):
        return swiglu_backward_cast_plainly(gh, a, b, scale_h, scale_ga, scale_gb, finds_amax)
    outputs = _make_outputs(a)
    amax_bits = torch.zeros(2, dtype=torch.int32, device=a.device)
    if a.numel():
        scales = (scale_h, scale_ga, scale_gb)
        factors = (gh.contiguous(), a.contiguous(), b.contiguous())
        launch_swiglu_backward_cast(factors, scales, outputs, amax_bits if finds_amax else None)
    return *outputs, amax_bits.view(torch.float32)


@swiglu_backward_cast.register_fake
def _(
    gh: Tensor, a: Tensor, b: Tensor, scale_h: Tensor, scale_ga: Tensor, scale_gb: Tensor, finds_amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_make_outputs(a), torch.empty(2, dtype=torch.float32, device=a.device)


def _make_outputs(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows, n_columns = a.shape
    ga_rows, gb_rows = (torch.empty((n_rows, n_columns), dtype=E5M2, device=a.device) for _ in range(2))
    ga_columns, gb_columns, h_columns = (
        torch.empty((n_columns, n_rows), dtype=dtype, device=a.device) for dtype in (E5M2, E5M2, E4M3)
    )
    return ga_rows, ga_columns, gb_rows, gb_columns, h_columns


def swiglu_backward_cast_plainly(
    gh: Tensor, a: Tensor, b: Tensor, scale_h: Tensor, scale_ga: Tensor, scale_gb: Tensor, finds_amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same by torch's own operations."""
    ga, gb = swiglu_backward(gh, a, b)
    ga_rows, gb_rows = cast(ga, scale_ga, E5M2), cast(gb, scale_gb, E5M2)
    h_rows = cast(swiglu(a, b), scale_h, E4M3)
    ga_columns, gb_columns, h_columns = (
        rows.t().clone(memory_format=torch.contiguous_format) for rows in (ga_rows, gb_rows, h_rows)
    )
    amaxes = torch.stack([get_amax(ga), get_amax(gb)]).float() if finds_amax else scale_h.new_zeros(2)
    return ga_rows, ga_columns, gb_rows, gb_columns, h_columns, amaxes


def swiglu_backward(gh: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a and b, as autograd does."""
    return torch.ops.aten.silu_backward(gh * b, a), gh * F.silu(a)


def launch_swiglu_cast(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rows: Tensor,
    amax_bits: Tensor | None,
    *,
    block: int = 4096,
    num_warps: int = 8,
) -> None:
    """Run the forward kernel. block: elements that one program takes. amax_bits: int32, raised to the bits of the amax, if given."""
    import triton

    with torch.cuda.device(a.device):
        _get_kernels().swiglu_cast_kernel[(triton.cdiv(a.numel(), block),)](
            a, b, scale, rows, amax_bits, a.numel(), FINDS_AMAX=amax_bits is not None, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip


def launch_swiglu_backward_cast(
    factors: tuple[Tensor, Tensor, Tensor],
    scales: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    amax_bits: Tensor | None,
    *,
    block_rows: int = 32,
    block_columns: int = 64,
    num_warps: int = 4,
) -> None:
    """Run the backward kernel.

    Tensors: see `swiglu_backward_cast`. block_rows, block_columns: of the tile that one program takes; more than 16 elements a thread
    need so many registers that a multiprocessor runs few programs at a time.
    """
    import triton

    n_rows, n_columns = factors[1].shape
    grid = (triton.cdiv(n_rows, block_rows), triton.cdiv(n_columns, block_columns))
    with torch.cuda.device(factors[1].device):
        _get_kernels().swiglu_backward_cast_kernel[grid](
            *factors, *scales, *outputs, amax_bits, n_rows, n_columns, FINDS_AMAX=amax_bits is not None,
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=num_warps,
        )  # fmt: skip


def _get_kernels() -> Any:
    """Return the kernels' module. Triton is not there on machines without a GPU."""
    from trainer.low_precision import swiglu_cast_kernel

    return swiglu_cast_kernel
