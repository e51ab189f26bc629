"""Causal attention over a sequence that is split over ranks, in pieces: this rank's queries, and the keys of some ranks.

Queries see their own rank's keys causally, and of other ranks' keys either all or none, so that every other piece is a plain
rectangle. In the balanced split of `SequenceSplit` a rank has a head and a tail. Of an earlier rank, all its queries see the
head and none the tail; of a later rank, its tail sees both and its head none. All pieces of a rank have the same size
together, S^2 / (2 ranks), whichever rank it is. Ways to bring the keys and values together:

- gathered: one all-gather, under way during the own piece; then one piece of all earlier ranks and one of all later ones.
  No two pieces of a rank share a key, so that their gradients are written once, and travel home in one all-to-all.
- ring (Liu et al., arXiv 2310.01889): rank by rank. Keys and values are gathered once, or passed on from rank to rank while
  attending to those at hand; the sums of their gradients are passed on likewise, and come home after a whole round.

Dtypes: keys, values and their gradients travel in their own dtype, bf16 in training, except that the sums that a ring passes
on are fp32. Gradients from several ranks are added up in fp32. The outputs and query gradients of the up to three gathered
pieces are added up in their own dtype, those of a ring in fp32.

Letters: B batch, S seq, s tokens of one rank, T keys of a piece, N query heads, M key-value heads, H head_dim, V that of the
values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from trainer.distributed.blockwise_attention import attend, attend_backward, merge_piece
from trainer.distributed.sequence_collectives import (
    get_group,
    start_gather,
    start_passing_on,
    start_sum,
    sum_dtype,
)

GATHERED, RING_GATHERED, RING_PASSED_ON = "gathered", "ring_gathered", "ring_passed_on"


class Piece(NamedTuple):
    """Keys that this rank's queries see, those from `begin` on."""

    begin: int
    """First local query: 0, or where the tail begins."""
    k: Tensor
    """(B, T, M, H)"""
    v: Tensor
    """(B, T, M, V)"""
    causal: bool = False


@dataclass
class _Queries:
    """This rank's queries in the backward pass, with what is known of them from all pieces together."""

    grad_out: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor
    dq_dtype: torch.dtype
    dq: Tensor | None = None
    """The sum so far."""

    def attend_backward(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Add a piece's part of the gradient to `dq`. Return the gradients of its keys and values."""
        rows = slice(piece.begin, None)
        grad_out, q, out = (x[:, rows].contiguous() for x in (self.grad_out, self.q, self.out))
        dq, dk, dv = attend_backward(grad_out, q, piece.k, piece.v, out, self.lse[..., rows], causal=piece.causal)
        if self.dq is None:
            self.dq = dq.to(self.dq_dtype)
        else:
            self.dq[:, rows] += dq
        return dk, dv


@torch.library.custom_op("bloomery::sharded_attention", mutates_args=())
def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, group_name: str, balanced: bool, method: str
) -> tuple[Tensor, Tensor]:
    """Let this rank's queries attend causally to the keys of all ranks of a group.

    One operation to autograd and to a compiler, with collectives inside. Only the first result has a gradient.

    q: (B, s, N, H); k: (B, s, M, H); v: (B, s, M, V), of the tokens that `SequenceSplit(balanced=...)` gives this rank;
    method: GATHERED, RING_GATHERED or RING_PASSED_ON
    -> the output (B, s, N, V), and the log-sum-exp of the scores (B, N, s) fp32
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = lse = None
    for piece in _get_pieces(k, v, get_group(group_name), balanced, method):
        if piece is None:
            continue
        if out is None or lse is None:
            out, lse = attend(q, piece.k, piece.v, causal=piece.causal)
            out = out if method == GATHERED else out.to(sum_dtype(q))
        else:
            found = attend(q[:, piece.begin :].contiguous(), piece.k, piece.v, causal=piece.causal)
            merge_piece(out[:, piece.begin :], lse[..., piece.begin :], *found)
    assert out is not None, "the own piece comes first"
    assert lse is not None, "the own piece comes first"
    return out.to(q.dtype), lse


@sharded_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, group_name: str, balanced: bool, method: str) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _ = q.shape
    return q.new_empty(batch, seq, heads, v.shape[-1]), q.new_empty(batch, heads, seq, dtype=sum_dtype(q))


@torch.library.custom_op("bloomery::sharded_attention_backward", mutates_args=())
def sharded_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group_name: str,
    balanced: bool,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of `sharded_attention`. Keys and values are brought together once more."""
    grad_out, q, k, v, out = (x.contiguous() for x in (grad_out, q, k, v, out))
    group = get_group(group_name)
    own = _Queries(grad_out, q, out, lse, dq_dtype=q.dtype if method == GATHERED else sum_dtype(q))
    pieces = _get_pieces(k, v, group, balanced, method)
    dk, dv = (_gathered_backward if method == GATHERED else _ring_backward)(own, pieces, group, balanced)
    assert own.dq is not None, "the own piece comes first"
    return own.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@sharded_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group_name: str,
    balanced: bool,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _get_pieces(k: Tensor, v: Tensor, group: dist.ProcessGroup, balanced: bool, method: str) -> Iterator[Piece | None]:
    """Yield the pieces of this rank, the own one first, while what the next one needs is on its way."""
    if method == GATHERED:
        return _get_gathered_pieces(k, v, group, balanced)
    parts = _pass_around(k, v, group) if method == RING_PASSED_ON else _gather_parts(k, v, group)
    return _get_ring_pieces(parts, group.rank(), balanced)


# --- gathered ---


def _get_gathered_pieces(k: Tensor, v: Tensor, group: dist.ProcessGroup, balanced: bool) -> Iterator[Piece]:
    """Yield the own piece, that of all earlier ranks, and that of all later ranks, as far as there are such."""
    rank, ranks = group.rank(), group.size()
    gathers = [start_gather(x, group) for x in (k, v)]
    yield Piece(0, k, v, causal=True)
    all_k, all_v = (wait() for wait in gathers)  # (ranks, B, s, M, H)
    head = _get_head_len(k, balanced)
    if rank > 0:
        yield Piece(0, _join(all_k[:rank, :, :head]), _join(all_v[:rank, :, :head]))
    if balanced and rank < ranks - 1:
        yield Piece(head, _join(all_k[rank + 1 :]), _join(all_v[rank + 1 :]))


def _get_head_len(x: Tensor, balanced: bool) -> int:
    """Return how many of a rank's tokens later ranks see: the head, or all of them in a plain split."""
    return x.shape[1] // 2 if balanced else x.shape[1]


def _join(parts: Tensor) -> Tensor:
    """Put ranks one after another. No copy where ranks are whole and B is 1. parts: (P, B, T, M, H) -> (B, P * T, M, H)"""
    return parts.transpose(0, 1).flatten(1, 2).contiguous()


def _gathered_backward(
    own: _Queries, pieces: Iterator[Piece | None], group: dist.ProcessGroup, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Add up the gradient of the queries, and return those of the own keys and values."""
    found = [own.attend_backward(piece) for piece in pieces if piece is not None]
    dk, dv = zip(*found, strict=True)
    waits = [start_sum(_sort_by_rank(gradients, group, balanced), group) for gradients in (dk, dv)]
    home_k, home_v = (wait() for wait in waits)
    return home_k, home_v


def _sort_by_rank(gradients: tuple[Tensor, ...], group: dist.ProcessGroup, balanced: bool) -> Tensor:
    """Put the gradients of the gathered pieces where their keys came from, zeros where there was nothing to see.

    The zeros travel, too: less than a third of the bytes, for which uneven parts would take more code than they are worth.

    gradients: (B, T, M, H) of each piece -> (ranks, B, s, M, H)
    """
    own, *others = gradients
    rank, head = group.rank(), _get_head_len(own, balanced)
    by_rank = own.new_zeros(group.size(), *own.shape)
    by_rank[rank] = own
    places = ([by_rank[:rank, :, :head]] if rank > 0 else []) + [by_rank[rank + 1 :]]
    for place, gradient in zip(places, others, strict=False):
        place.copy_(gradient.unflatten(1, (-1, place.shape[2])).transpose(0, 1))
    return by_rank


# --- ring ---


def _pass_around(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each rank's number, keys and values, the own first, while passing them on to the next rank."""
    rank, ranks = group.rank(), group.size()
    for step in range(ranks):
        is_last = step == ranks - 1
        wait = None if is_last else start_passing_on((k, v), group)
        yield (rank - step) % ranks, k, v
        if wait is not None:
            k, v = wait()


def _gather_parts(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the same in the same order, after one all-gather."""
    rank, ranks = group.rank(), group.size()
    gathers = [start_gather(x, group) for x in (k, v)]
    yield rank, k, v
    all_k, all_v = (wait() for wait in gathers)
    for step in range(1, ranks):
        source = (rank - step) % ranks
        yield source, all_k[source], all_v[source]


def _get_ring_pieces(parts: Iterator[tuple[int, Tensor, Tensor]], rank: int, balanced: bool) -> Iterator[Piece | None]:
    """Yield what this rank's queries see of each rank: None where that is nothing."""
    for source, k, v in parts:
        head = _get_head_len(k, balanced)
        if source == rank:
            yield Piece(0, k, v, causal=True)
        elif source < rank:
            yield Piece(0, k[:, :head].contiguous(), v[:, :head].contiguous())
        else:
            yield Piece(head, k, v) if balanced else None


def _ring_backward(
    own: _Queries, pieces: Iterator[Piece | None], group: dist.ProcessGroup, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Add up the gradient of the queries, and return those of the own keys and values, in fp32.

    The sums for a rank's keys are a step behind these: while a rank works on a piece, what the ranks before it have found
    about the same keys is on its way.
    """
    arriving = None
    for piece in pieces:
        found = None if piece is None else own.attend_backward(piece)
        if arriving is None:
            assert found is not None, "the own piece comes first"
            sums = [gradient.to(sum_dtype(gradient)) for gradient in found]
        else:
            sums = arriving()
            for total, gradient in zip(sums, found or (), strict=False):
                total[:, : gradient.shape[1]] += gradient
        arriving = start_passing_on(sums, group)
    assert arriving is not None, "there is a piece"
    dk, dv = arriving()
    return dk, dv


# --- what torch must know ---


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group_name, ctx.balanced, ctx.method = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple:
    gradients = sharded_attention_backward(grad_out, *ctx.saved_tensors, ctx.group_name, ctx.balanced, ctx.method)
    return *gradients, None, None, None


sharded_attention.register_autograd(_backward, setup_context=_save)

OPERATION = torch.ops.bloomery.sharded_attention.default
"""The operation as a dispatcher knows it."""


def _count_pairs(q: tuple[int, ...], group_name: str) -> int:
    """Return half of the pairs of the queries and all keys: the same for all ranks, which must decide alike what to recompute."""
    batch, seq, heads, _ = q
    return batch * heads * seq * (seq * get_group(group_name).size() // 2)


@register_flop_formula(torch.ops.bloomery.sharded_attention)
def _count_flops(q: Any, k: Any, v: Any, group_name: str, *options: Any, out_shape: Any = None) -> int:
    """Two matmuls: the scores, and the output."""
    return 2 * _count_pairs(q, group_name) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.bloomery.sharded_attention_backward)
def _count_backward_flops(
    grad_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, group_name: str, *options: Any, out_shape: Any = None
) -> int:
    """Five matmuls: the scores again, and the gradients of q, k, v and the scores' weights."""
    return 2 * _count_pairs(q, group_name) * (3 * q[-1] + 2 * v[-1])
