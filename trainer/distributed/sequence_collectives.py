"""What ranks of context parallelism send each other: parts of sequences, gathered, passed on, or exchanged for heads.

What the model calls are operations of their own (`torch.library.custom_op`): a compiler sees one call instead of the
collectives inside, and no asynchronous tensor enters or leaves a block. They find their process group by its name.

Letters: B batch, S seq, s = S / ranks tokens of one rank, N heads, n = N / ranks, H head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from trainer.distributed.sequence_split import SequenceSplit
from trainer.distributed.transfers import recv

# torch 2.13 has a new name for it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Pending = Callable[[], Tensor]
"""Call it to wait for what was started; on CUDA only the current stream waits, not the host."""


def get_group(name: str) -> dist.ProcessGroup:
    """Return the process group of that name."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # newer torch has a type of its own for names


def get_split(group: dist.ProcessGroup, balanced: bool) -> SequenceSplit:
    """Return the split of sequences over the ranks of `group`."""
    return SequenceSplit(rank=group.rank(), degree=group.size(), balanced=balanced)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which to add up tensors like `x`: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def start_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to gather `x`, contiguous and of one shape on all ranks, as (ranks, *shape)."""
    gathered = x.new_empty(group.size(), *x.shape)
    work = _all_gather(gathered.view(-1), x.view(-1), group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return gathered

    return wait


def start_exchange(parts: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to send each rank its part, and to receive this rank's from each. parts: (ranks, ...), contiguous"""
    arrived = parts.new_empty(parts.shape)
    work = dist.all_to_all_single(arrived.view(-1), parts.view(-1), group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return arrived

    return wait


def start_sum(parts: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to add up over ranks what they have for this one. parts: (ranks, ...), contiguous -> (...), of the same dtype

    They travel in their dtype and are added up in fp32, in the order of ranks: a reduce-scatter would round at each rank.
    """
    wait_for_parts = start_exchange(parts, group)
    return lambda: wait_for_parts().sum(dim=0, dtype=sum_dtype(parts)).to(parts.dtype)


def start_passing_on(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Start to send tensors, contiguous, to the next rank of the ring, and to receive those of the rank before."""
    ranks = dist.get_process_group_ranks(group)
    following, before = (ranks[(group.rank() + step) % len(ranks)] for step in (1, -1))
    arrived = [x.new_empty(x.shape) for x in tensors]
    transfers = [dist.P2POp(dist.isend, x, following, group) for x in tensors]
    transfers += [dist.P2POp(dist.irecv, x, before, group) for x in arrived]
    works = dist.batch_isend_irecv(transfers)

    def wait() -> list[Tensor]:
        for work in works:
            recv(work, arrived[0], group)
        return arrived

    return wait


@torch.library.custom_op("bloomery::join_sequence", mutates_args=())
def join_sequence(x: Tensor, group_name: str, balanced: bool) -> Tensor:
    """Return the whole sequence, in its order. Backward, the gradients of all ranks are added up in fp32.

    x: (B, s, N, H) -> (B, S, N, H)
    """
    group = get_group(group_name)
    return get_split(group, balanced).join(start_gather(x.contiguous(), group)())


@join_sequence.register_fake
def _(x: Tensor, group_name: str, balanced: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * get_group(group_name).size(), *x.shape[2:])


@torch.library.custom_op("bloomery::sum_sequence", mutates_args=())
def sum_sequence(x: Tensor, group_name: str, balanced: bool) -> Tensor:
    """Return this rank's part of the sum of all ranks' sequences. x: (B, S, N, H) -> (B, s, N, H)"""
    group = get_group(group_name)
    split = get_split(group, balanced)
    x = x.contiguous()  # a gradient comes in any layout
    return start_sum(torch.stack([split.take(x, rank) for rank in range(group.size())]), group)()


@sum_sequence.register_fake
def _(x: Tensor, group_name: str, balanced: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // get_group(group_name).size(), *x.shape[2:])


@torch.library.custom_op("bloomery::exchange_heads", mutates_args=())
def exchange_heads(x: Tensor, group_name: str, to_heads: bool) -> Tensor:
    """Exchange a part of the sequence of all heads for the whole sequence of some heads, or back (arXiv 2309.14509).

    The parts of the sequence are contiguous ones. x: (B, s, N, H) -> (B, S, n, H) with `to_heads`, else the reverse

    Raises:
        ValueError: the ranks cannot share out the heads evenly.
    """
    group = get_group(group_name)
    ranks = group.size()
    if to_heads and x.shape[2] % ranks:
        raise ValueError(
            f"parallelism.context_parallel_method = 'ulysses' cannot share out {x.shape[2]} heads over "
            f"parallelism.context_parallel_degree = {ranks}: use 'allgather' or 'ring', or a degree that divides them"
        )
    # Heads are dim 2 and tokens dim 1: the one is cut into a part for each rank, the other put together of their parts.
    cut, joined = (2, 1) if to_heads else (1, 2)
    parts = x.unflatten(cut, (ranks, -1)).movedim(cut, 0).contiguous()  # (ranks, B, s, n, H)
    arrived = start_exchange(parts, group)()
    return arrived.movedim(0, joined).flatten(joined, joined + 1).contiguous()


@exchange_heads.register_fake
def _(x: Tensor, group_name: str, to_heads: bool) -> Tensor:
    ranks = get_group(group_name).size()
    batch, seq, heads, head_dim = x.shape
    if to_heads:
        return x.new_empty(batch, seq * ranks, heads // ranks, head_dim)
    return x.new_empty(batch, seq // ranks, heads * ranks, head_dim)


@torch.library.custom_op("bloomery::sum_counts", mutates_args=())
def sum_counts(counts: Tensor, group_name: str) -> Tensor:
    """Return the sum over all ranks, of whatever shape. No gradient passes."""
    total = counts.clone()
    dist.all_reduce(total, group=get_group(group_name))
    return total


@sum_counts.register_fake
def _(counts: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(counts)


def _remember_options(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *ctx.options = inputs


def _join_sequence_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return sum_sequence(grad, *ctx.options), None, None


def _exchange_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    group_name, to_heads = ctx.options
    return exchange_heads(grad, group_name, not to_heads), None, None


join_sequence.register_autograd(_join_sequence_backward, setup_context=_remember_options)
exchange_heads.register_autograd(_exchange_heads_backward, setup_context=_remember_options)

SUM_COUNTS = torch.ops.bloomery.sum_counts.default
EXCHANGE_HEADS = torch.ops.bloomery.exchange_heads.default
"""Operations, for tables that list some."""
