"""Matrix products of consecutive groups of rows, each group with a matrix of its own.

Letters: R rows, G groups, I and O widths in and out.
"""

from typing import Any

import torch
import torch.nn.functional as F


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return rows @ weights[g]^T for each group's rows. The host waits for nothing on CUDA in bf16, the dtype with a kernel.

    Rows beyond the last end come out, and their gradients, as whatever was in memory. I and O must be multiples of 16 bytes.

    rows: (R, I); weights: (G, O, I); ends: (G,) int32, one past each group's last row -> (R, O)
    """
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    return _grouped_mm(rows, weights, ends)


@torch.library.custom_op("bloomery::grouped_mm", mutates_args=())
def _grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The same in any dtype that the device can multiply. torch (2.11 to 2.13) computes it, but compiles it for bf16 alone."""
    return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)


@_grouped_mm.register_fake
def _(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


@torch.library.custom_op("bloomery::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(
    grad: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of rows and weights. grad: (R, O)"""
    grad = grad.contiguous()
    return F.grouped_mm(grad, weights, offs=ends), F.grouped_mm(grad.t(), rows, offs=ends)


@_grouped_mm_backward.register_fake
def _(
    grad: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *_grouped_mm_backward(grad, *ctx.saved_tensors), None


def get_weight_gradients(
    grad: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `weights` of `grouped_mm`, in the dtype of `rows`. grad: (R, O) -> (G, O, I)"""
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(grad.contiguous().t(), rows, offs=ends)
    return _grouped_mm_backward(grad, rows, weights, ends)[1]


_grouped_mm.register_autograd(_backward, setup_context=_save)

GROUPED_MM = torch.ops.bloomery.grouped_mm.default
GROUPED_MM_BACKWARD = torch.ops.bloomery.grouped_mm_backward.default
"""Operations, for tables that list some."""
