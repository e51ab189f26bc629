"""The collectives of data parallelism as operations of the network: a weight is gathered in forward, its gradient reduced in backward.

Casts come first in both directions, so that what travels has the dtype of the forward pass and of the reduction. Replicas add up the
reduce-scattered shards: to redistribute a DTensor from Shard to Replicate on both axes would all-reduce whole gradients instead
(torch 2.13), for as many times the traffic as there are shards.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class Layout:
    """How one parameter is spread and used, as plain values, which a compiled graph can hold, and blocks share."""

    dim: int
    """Which dim is cut."""
    size: int
    """Of that dim before it is cut, in what tensor or expert parallelism leave on this rank."""
    shards: int
    shard_group: str
    replicas: int
    replicate_group: str
    forward_dtype: torch.dtype
    reduce_dtype: torch.dtype

    @property
    def chunk(self) -> int:
        """Size of the dim on the first rank. As `torch.chunk` cuts: the last ranks may have less, or nothing."""
        return -(-self.size // self.shards)

    def get_range(self, rank: int) -> tuple[int, int]:
        """Return begin and end of a rank's part."""
        return min(rank * self.chunk, self.size), min((rank + 1) * self.chunk, self.size)


def gather_weight(shard: Tensor, layout: Layout) -> Tensor:
    """Return the whole weight, in the dtype of the forward pass. Its gradient is summed over all ranks, in that of the reduction.

    shard: this rank's part, in the dtype of the master weights, which its gradient gets as well. Collective.
    """
    return _GatherWeight.apply(shard, layout)


def gather_shards(shard: Tensor, layout: Layout) -> Tensor:
    """Gather the parts of all ranks along `layout.dim`, in their dtype, without a gradient."""
    front = _to_front(shard, layout.dim)
    padded = _pad_rows(front, layout.chunk).contiguous()
    whole = _ops.wait_tensor(_ops.all_gather_into_tensor(padded, layout.shards, layout.shard_group))
    return _to_front(whole[: layout.size] if layout.chunk * layout.shards != layout.size else whole, layout.dim)


def reduce_gradient(grad: Tensor, layout: Layout, rows: int) -> Tensor:
    """Add up the gradients of all ranks, and return this rank's part, of `rows` along `layout.dim`. grad: of the whole weight"""
    grad = grad if grad.dtype == layout.reduce_dtype else grad.to(layout.reduce_dtype)
    if layout.shards > 1:
        padded = _pad_rows(_to_front(grad, layout.dim), layout.chunk * layout.shards).contiguous()
        grad = _ops.wait_tensor(_ops.reduce_scatter_tensor(padded, "sum", layout.shards, layout.shard_group))
    if layout.replicas > 1:
        grad = _ops.wait_tensor(_ops.all_reduce(grad.contiguous(), "sum", layout.replicate_group))
    if layout.shards == 1:
        return grad
    return _to_front(grad[:rows] if rows != layout.chunk else grad, layout.dim)


# Dynamo would make a subgraph of each: of all weights of a model, minutes.
@torch._dynamo.allow_in_graph
class _GatherWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.rows, ctx.dtype = layout, shard.shape[layout.dim], shard.dtype
        cast = shard if shard.dtype == layout.forward_dtype else shard.to(layout.forward_dtype)
        if layout.shards > 1:
            return gather_shards(cast, layout)
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        reduced = reduce_gradient(grads[0], ctx.layout, ctx.rows)
        return reduced if reduced.dtype == ctx.dtype else reduced.to(ctx.dtype), None


def _to_front(x: Tensor, dim: int) -> Tensor:
    """Swap a dim with the first, in memory too: what is cut must lie in one piece."""
    return x if dim == 0 else x.transpose(0, dim).contiguous()


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, missing]) if missing else x
