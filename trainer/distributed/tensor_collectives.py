"""The collectives of tensor parallelism, with their gradients: of plain tensors, for eager and for compiled code.

Each result is waited for on the spot. An AsyncCollectiveTensor, as torch's functional collectives return it, loses
`requires_grad` when it enters a compiled block (torch 2.12 and 2.13, pytorch PR 179849), and what follows a
collective mostly needs its result (not so the sum of a replicated weight's gradient). A GPU's stream waits, not the host.

Letters: B batch, S tokens of all ranks, s = S / degree tokens of one, C columns of all ranks, c columns of one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class TensorAxis:
    """The ranks of one process group, and this one among them, as plain values, which a compiled graph can hold."""

    group_name: str
    degree: int
    rank: int
    fusible: bool = False
    """Write collectives in the form that the compiler fuses with matrix products (async TP), at the cost of a copy."""

    @classmethod
    def from_group(cls, group: dist.ProcessGroup, *, fusible: bool = False) -> "TensorAxis":
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group), fusible)

    def part(self, size: int) -> tuple[int, int]:
        """Return begin and end of this rank's part of `size` things, cut as `torch.chunk` and DTensor do.

        Where the degree does not divide, the last parts are shorter or empty.
        """
        chunk = -(-size // self.degree)
        return min(self.rank * chunk, size), min((self.rank + 1) * chunk, size)


def gather_sequence(x: Tensor, axis: TensorAxis) -> Tensor:
    """Gather the tokens of all ranks. Gradients, of which each rank has a part of the sum, are reduce-scattered.

    x: (B, s, ...) -> (B, S, ...)
    """
    return _GatherSequence.apply(x, axis)


def scatter_sequence(x: Tensor, axis: TensorAxis) -> Tensor:
    """Add up what the ranks have for all tokens, and keep this rank's tokens. Gradients are gathered.

    x: (B, S, ...), S a multiple of the degree -> (B, s, ...)
    """
    return _ScatterSequence.apply(x, axis)


def sum_gradient(weight: Tensor, axis: TensorAxis) -> Tensor:
    """Return a weight that all ranks have; its gradient, of which each has a part, is added up, in float32."""
    return _SumGradient.apply(weight, axis)


def gather_columns(x: Tensor, size: int, axis: TensorAxis) -> Tensor:
    """Gather the last dim, of `size` in all; parts need not be equal. All ranks must use the result alike.

    x: (..., c) -> (..., C). Gradients are the same on all ranks by then: each keeps its part.
    """
    return _GatherColumns.apply(x, size, axis)


def all_gather(x: Tensor, dim: int, axis: TensorAxis) -> Tensor:
    """Gather along `dim`, without a gradient. x: the same shape on all ranks"""
    outer = x.shape[:dim]
    if outer.numel() == 1 and not axis.fusible:
        # Nothing has to move within memory.
        gathered = _ops.all_gather_into_tensor(x.reshape(x.shape[dim:]).contiguous(), axis.degree, axis.group_name)
        return _ops.wait_tensor(gathered).view(*outer, -1, *x.shape[dim + 1 :])
    gathered = _ops.all_gather_into_tensor(x.contiguous(), axis.degree, axis.group_name)
    return torch.cat(_ops.wait_tensor(gathered).chunk(axis.degree), dim=dim)


def reduce_scatter(x: Tensor, dim: int, axis: TensorAxis) -> Tensor:
    """Add up what the ranks have, and keep this rank's part along `dim`, without a gradient."""
    assert x.shape[dim] % axis.degree == 0, f"{x.shape[dim]} tokens are no multiple of the degree {axis.degree}"
    outer = x.shape[:dim]
    if outer.numel() == 1 and not axis.fusible:
        whole = x.reshape(x.shape[dim:]).contiguous()
        scattered = _ops.wait_tensor(_ops.reduce_scatter_tensor(whole, "sum", axis.degree, axis.group_name))
        # No view to autograd: FSDP2 warns of one that the embedding's unit returns (torch 2.13).
        return torch.ops.aten._unsafe_view(scattered, [*outer, -1, *x.shape[dim + 1 :]])
    parts = torch.cat(x.chunk(axis.degree, dim=dim))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(parts, "sum", axis.degree, axis.group_name))


def all_reduce_max(x: Tensor, axis: TensorAxis) -> Tensor:
    """Return the largest of what the ranks have, without a gradient."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "max", axis.group_name))


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, 1, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, 1, ctx.axis), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, 1, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, 1, ctx.axis), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = _ops.wait_tensor(_ops.all_reduce(grad.float().contiguous(), "sum", ctx.axis.group_name))
        return total.to(grad.dtype), None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, axis: TensorAxis) -> Tensor:
        ctx.part = axis.part(size)
        padded = F.pad(x, (0, -(-size // axis.degree) - x.shape[-1]))
        return all_gather(padded, x.ndim - 1, axis)[..., :size]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        begin, end = ctx.part
        return grad[..., begin:end].contiguous(), None, None
