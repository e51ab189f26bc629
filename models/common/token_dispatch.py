"""Bringing tokens to their experts and back, without the host ever waiting for a count.

Tokens are copied into rows, one for each of their experts, sorted by expert. Both ways are permutations of known inverse, so that
forward and backward passes only ever gather: no atomic additions, and the same sums in the same order every time.

Letters: T tokens, K experts of a token, R = T K rows, E experts, D dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn


class RowOrder(NamedTuple):
    """Where each token's rows are, once they are sorted by expert. A slot is one of the T K pairs of token and expert."""

    slots: torch.Tensor
    """(R,) int64: the slot of each row, token * K + k."""
    places: torch.Tensor
    """(T, K) int64: the row of each slot."""
    ends: torch.Tensor
    """(E,) int32: one past the last row of each expert."""
    counts: torch.Tensor
    """(E,) int32: rows of each expert."""

    def list_experts(self) -> torch.Tensor:
        """Return each token's experts again: (T, K) int64."""
        numbers = torch.arange(self.counts.shape[0], device=self.counts.device)
        return numbers.repeat_interleave(self.counts, output_size=self.slots.shape[0])[self.places]


class Rows(NamedTuple):
    """The rows that experts are to work on, sorted by expert."""

    tokens: torch.Tensor
    """(R, D)"""
    gates: torch.Tensor
    """(R,) fp32: what an expert's output for the row is multiplied with."""
    ends: torch.Tensor
    """(experts here,) int32: one past the last row of each expert here. Rows beyond the last are nobody's."""


def sort_by_expert(experts: torch.Tensor, n_experts: int) -> RowOrder:
    """Sort slots by expert, and those of one expert by token. experts: (T, K) int64"""
    # Radix sort goes by the bytes of its keys: two are enough.
    by_row, slots = experts.flatten().to(torch.int16).sort(stable=True)
    numbers = torch.arange(n_experts, dtype=torch.int16, device=experts.device)
    ends = torch.searchsorted(by_row, numbers, right=True, out_int32=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    places = torch.empty_like(slots).scatter(0, slots, torch.arange(slots.shape[0], device=slots.device))
    return RowOrder(slots, places.view_as(experts), ends, counts)


class TokenDispatcher(nn.Module):
    """All experts are here: dispatching is a permutation. No parameters; a seam for expert parallelism.

    Expert parallelism puts a dispatcher of its own in the place of this module. `send` then sorts by expert as here, exchanges
    the counts, and starts the all-to-all of rows and gates; `receive` waits for it and sorts what arrived, from several
    ranks, by the experts here; `combine` takes that back, and adds up as here. Between `send` and `receive` the caller
    computes what needs no exchange, the shared experts. Gates travel along, since experts apply them. What `send` returns is
    the dispatcher's own affair. `order.counts` are this rank's tokens to all E experts, before any exchange.
    """

    def send(self, tokens: torch.Tensor, gates: torch.Tensor, order: RowOrder) -> Any:
        """Start to bring tokens to their experts. tokens: (T, D); gates: (T, K) fp32"""
        top_k = gates.shape[1]
        rows = _TakeRows.apply(tokens, order.slots // top_k, order.places)
        row_gates = _TakeRows.apply(gates.flatten(), order.slots, order.places.view(-1, 1))
        return Rows(rows, row_gates, order.ends), order

    def receive(self, sent: Any) -> Rows:
        """Return the rows of the experts that are here."""
        return sent[0]

    def combine(self, rows: torch.Tensor, sent: Any) -> torch.Tensor:
        """Return the sum over each token's experts. rows: (R, D), results in the order of `receive` -> (T, D)"""
        order: RowOrder = sent[1]
        return _SumRows.apply(rows, order.places, order.slots // order.places.shape[1])


class _TakeRows(torch.autograd.Function):
    """x[index]. Row t of x goes to rows places[t], so that its gradient is the sum of theirs.

    x: (T, ...); index: (R,); places: (T, K) -> (R, ...)
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum_rows(grad, places), None, None


class _SumRows(torch.autograd.Function):
    """The sum of rows places[t], for each t: the transpose of `_TakeRows`.

    rows: (R, ...); places: (T, K); index: (R,), the t of each row -> (T, ...)
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        return _sum_rows(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def _sum_rows(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Add up in fp32 at least, and return the dtype of `rows`."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows[places].sum(dim=1, dtype=wide)
    # No cast that does nothing: in torch 2.11 a compiled autograd.Function has no gradient where its forward ends with an
    # operation that returns its own input (pytorch issue 180642).
    return total if rows.dtype == wide else total.to(rows.dtype)
