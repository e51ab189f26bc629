"""Bringing rows to experts on other ranks, and back: the all-to-all of the process group's backend, and experts that are cut.

The rows of a rank's tokens, sorted by expert, are thereby sorted by the rank that has the expert: one all-to-all brings them there
with their gates, another brings the results back. What arrives, from several ranks, is sorted by expert once more. The first
all-to-all is under way while the shared experts compute, in forward and in backward passes.

Letters: T tokens, K experts of a token, R = T K rows of this rank's tokens, A rows that arrive, E experts, e of them here,
P ranks of ep, D dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common.token_dispatch import RowOrder, Rows, TokenDispatcher, sort_by_expert
from trainer.distributed.tensor_collectives import TensorAxis, all_gather, gather_sequence, scatter_sequence
from trainer.distributed.turns import TURNS

_ops = torch.ops._c10d_functional

MIN_ROWS = 2
"""Rows that experts get at least: a compiled graph for any number of rows knows 0 and 1 as numbers of their own."""


def pad_rows(tokens: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return as many rows as experts must get. The added ones are nobody's. tokens: (A, D); gates: (A,)"""
    missing = max(0, MIN_ROWS - tokens.shape[0])
    if missing == 0:
        return tokens, gates
    return F.pad(tokens, (0, 0, 0, missing)), F.pad(gates, (0, missing))


class Splits(NamedTuple):
    """How many rows go to each rank, and come from each."""

    sent: list[int]
    arriving: list[int]

    def reverse(self) -> "Splits":
        """Return those of the way back."""
        return Splits(self.arriving, self.sent)


class _Journey(NamedTuple):
    """What `ExchangingDispatcher` knows between `send` and `combine`."""

    tokens: Tensor
    """(A, D), under way."""
    gates: Tensor
    """(A,), under way."""
    exchanges: "tuple[_Exchange, _Exchange]"
    """Of tokens and of gates."""
    ends: Tensor
    """(e,) int32: one past the last row of each expert here, once they are sorted."""
    by_expert: Tensor
    """(A,) int64: where rows sorted by expert are in what arrives, which is sorted by rank."""
    by_rank: Tensor
    """(A,) int64: the inverse of that."""
    order: RowOrder


class ExchangingDispatcher(TokenDispatcher):
    """Rows travel by all-to-alls of the process group's backend, each rank sending as many as it has.

    The host has to know these numbers: it waits for them once in a forward pass, while the device copies the rows. A forward
    pass that is recomputed has them.
    """

    def __init__(self, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis

    def send(self, tokens: Tensor, gates: Tensor, order: RowOrder) -> Any:
        """See `TokenDispatcher`. Collective over the ranks of ep."""
        by_rank = order.counts.view(self.axis.degree, -1)  # (P, e): for each rank's experts
        counts = _ops.wait_tensor(_start_all_to_all(by_rank, None, self.axis))  # (P, e): from each rank
        wait_for_numbers = _start_copy_to_host(torch.stack((by_rank.sum(dim=1), counts.sum(dim=1))))
        rows, _ = super().send(tokens, gates, order)
        TURNS.pass_on()
        splits = Splits(*wait_for_numbers())
        exchanges = _Exchange(splits, self.axis), _Exchange(splits, self.axis)
        under_way = exchanges[0].start(rows.tokens), exchanges[1].start(rows.gates)
        ends = counts.sum(dim=0).cumsum(0).to(torch.int32)
        return _Journey(*under_way, exchanges, ends, *_order_by_expert(counts, sum(splits.arriving)), order)

    def receive(self, sent: Any) -> Rows:
        """See `TokenDispatcher`."""
        tokens, gates = sent.exchanges[0].wait(sent.tokens), sent.exchanges[1].wait(sent.gates)
        tokens, gates = (_Reorder.apply(x, sent.by_expert, sent.by_rank) for x in (tokens, gates))
        return Rows(*pad_rows(tokens, gates), sent.ends)

    def combine(self, rows: Tensor, sent: Any) -> Tensor:
        """See `TokenDispatcher`."""
        rows = _Reorder.apply(rows[: sent.by_rank.shape[0]], sent.by_rank, sent.by_expert)
        back = _Exchange(sent.exchanges[0].splits.reverse(), self.axis)
        return super().combine(back.wait(back.start(rows)), (None, sent.order))


class GatheringDispatcher(TokenDispatcher):
    """For experts of which each rank of tensor parallelism has a part: brings the tokens of these ranks together before `inner`
    has them, and afterwards adds up what the ranks made of them.
    """

    def __init__(self, inner: TokenDispatcher, axis: TensorAxis, n_experts: int) -> None:
        super().__init__()
        self.inner = inner
        self.axis = axis
        self.n_experts = n_experts

    def send(self, tokens: Tensor, gates: Tensor, order: RowOrder) -> Any:
        """See `TokenDispatcher`. Collective over the ranks of etp, which have the same number of tokens."""
        experts = all_gather(order.list_experts(), 0, self.axis)
        gathered = gather_sequence(tokens.unsqueeze(0), self.axis).squeeze(0)
        all_gates = gather_sequence(gates.unsqueeze(0), self.axis).squeeze(0)
        return self.inner.send(gathered, all_gates, sort_by_expert(experts, self.n_experts))

    def receive(self, sent: Any) -> Rows:
        """See `TokenDispatcher`."""
        return self.inner.receive(sent)

    def combine(self, rows: Tensor, sent: Any) -> Tensor:
        """See `TokenDispatcher`."""
        return scatter_sequence(self.inner.combine(rows, sent).unsqueeze(0), self.axis).squeeze(0)


# Exchanges. What is under way is a plain tensor that nobody may read before `_Arrive` has waited for it.


def _start_all_to_all(x: Tensor, splits: Splits | None, axis: TensorAxis) -> Tensor:
    """Start to send each rank its rows, and to receive this rank's from each: by default as many from and to each."""
    equal = [x.shape[0] // axis.degree] * axis.degree
    sent, arriving = (equal, equal) if splits is None else splits
    return _ops.all_to_all_single(x.contiguous(), arriving, sent, axis.group_name)


class _Exchange:
    """One exchange of rows, there in the forward pass and back, as gradients, in the backward pass."""

    def __init__(self, splits: Splits, axis: TensorAxis) -> None:
        self.splits = splits
        self.axis = axis
        self.gradient: Tensor | None = None
        """(R, ...), under way, from the backward pass of `_Arrive` to that of `_Depart`."""

    def start(self, x: Tensor) -> Tensor:
        """Return what will arrive. x: (R, ...) -> (A, ...)"""
        return _Depart.apply(x, self)

    def wait(self, x: Tensor) -> Tensor:
        """Return what has arrived, once it has. x: what `start` returned"""
        return _Arrive.apply(x, self)


class _Depart(torch.autograd.Function):
    """Start an exchange; `_Arrive` waits for it. Backward, wait for the gradient that `_Arrive` has started to send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return _start_all_to_all(x, exchange.splits, exchange.axis)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        assert gradient is not None, "what has departed has arrived"
        TURNS.pass_on()
        return _ops.wait_tensor(gradient), None


class _Arrive(torch.autograd.Function):
    """Wait for what is under way. Backward, start to send its gradient back: what comes between the two hides that as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        TURNS.pass_on()
        arrived = _ops.wait_tensor(x)
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.gradient = _start_all_to_all(grad, exchange.splits.reverse(), exchange.axis)
        return grad, None  # in place of it: rows that return are not as many as arrived


@torch.library.custom_op("bloomery::copy_to_host", mutates_args=())
def _copy_to_host(numbers: Tensor) -> Tensor:
    """Return a copy on the host, under way where `_copies` has it. An operation, whose result recomputation can keep."""
    if not numbers.is_cuda:
        return numbers.clone()
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    _copies[copy.data_ptr()] = torch.cuda.Event()
    _copies[copy.data_ptr()].record()
    return copy


_copies: dict[int, torch.cuda.Event] = {}
"""When what was just begun to be copied is there, by its address."""


def _start_copy_to_host(numbers: Tensor) -> Callable[[], list[list[int]]]:
    """Start to copy a small matrix to the host. What is returned waits for it, but not for work that is given to the device later."""
    copy = _copy_to_host(numbers)
    copied = _copies.pop(copy.data_ptr(), None)  # None, too, where recomputation has the copy of the forward pass

    def wait() -> list[list[int]]:
        if copied is not None:
            copied.synchronize()
        return copy.tolist()

    return wait


COPY_TO_HOST = torch.ops.bloomery.copy_to_host.default
"""An operation, for tables that list some."""


# Sorting what arrived.


def _order_by_expert(counts: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return where the rows of each expert here are in what arrived, rank by rank, and the inverse of that: (A,) int64 each.

    counts: (P, e), rows from each rank for each expert; n_rows: their sum, A
    """
    begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)  # in what arrived
    by_expert = counts.t().flatten()
    shifts = begins.t().flatten() - (by_expert.cumsum(0) - by_expert)
    places = torch.arange(n_rows, device=counts.device)
    index = places + shifts.repeat_interleave(by_expert, output_size=n_rows)
    return index, torch.empty_like(index).scatter_(0, index, places)


class _Reorder(torch.autograd.Function):
    """x[index], a permutation whose inverse is known. x: (A, ...)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
