"""Rows travel to experts by the kernels of DeepEP (github.com/deepseek-ai/DeepEP, the `Buffer` of its version 1).

It sends a token once to each rank that has some of its experts, where an all-to-all of rows sends it once for each expert. What
arrives are tokens, with numbers of the experts here and their gates; rows are made of them here. One set of communication buffers
serves all mixtures.

Letters: T tokens, K experts of a token, E experts, e of them here, A tokens that arrive, R rows made of them, D dim.
"""

from typing import Any, cast

import deep_ep
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from models.common.token_dispatch import RowOrder, Rows, TokenDispatcher
from trainer.distributed.expert_dispatch import pad_rows
from trainer.distributed.tensor_collectives import TensorAxis
from trainer.distributed.turns import TURNS

_buffers: dict[str, Any] = {}
"""By name of the process group."""


class DeepEPDispatcher(TokenDispatcher):
    """See `TokenDispatcher`. Tokens must be bfloat16, of a width that is the same in all mixtures."""

    def __init__(self, axis: TensorAxis) -> None:
        super().__init__()
        self.axis = axis

    def send(self, tokens: Tensor, gates: Tensor, order: RowOrder) -> Any:
        """See `TokenDispatcher`. Collective over the ranks of ep. The host waits for the number of tokens that arrive."""
        journey = _Journey(_get_buffer(self.axis, tokens.shape[1] * tokens.element_size()))
        TURNS.pass_on()
        journey.arriving = _Dispatch.apply(tokens, gates, order.list_experts(), order.counts.shape[0], journey)
        return journey

    def receive(self, sent: Any) -> Rows:
        """See `TokenDispatcher`."""
        TURNS.pass_on()
        sent.event.current_stream_wait()
        tokens, gates, experts = sent.arriving
        sent.arriving, sent.n_tokens = None, tokens.shape[0]
        n_experts, n_rows = len(sent.counts), sum(sent.counts)
        # Slots of experts elsewhere, which have the number -1, go behind all rows.
        by_row, slots = torch.where(experts < 0, n_experts, experts).flatten().to(torch.int16).sort(stable=True)
        numbers = torch.arange(n_experts, dtype=torch.int16, device=tokens.device)
        ends = torch.searchsorted(by_row, numbers, right=True, out_int32=True)
        slots = slots[:n_rows]
        sent.owners = slots // experts.shape[1]
        rows = _TakeRows.apply(tokens, sent.owners)
        return Rows(*pad_rows(rows, gates.flatten().index_select(0, slots)), ends)

    def combine(self, rows: Tensor, sent: Any) -> Tensor:
        """See `TokenDispatcher`."""
        summed = _AddRows.apply(rows[: sent.owners.shape[0]], sent.owners, sent.n_tokens)
        return _Combine.apply(summed, sent)


class _Journey:
    """What is known of one mixture's tokens between `send` and the end of the backward pass."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.handle: Any = None
        """DeepEP's own: which token went where."""
        self.event: Any = None
        """When `arriving` is there."""
        self.counts: list[int] = []
        """Rows of each expert here."""
        self.arriving: tuple[Tensor, Tensor, Tensor] | None = None
        """Tokens (A, D), gates (A, K), and experts (A, K), -1 where an expert is elsewhere."""
        self.owners: Tensor | None = None
        """(R,) int64: the token of each row, sorted by expert."""
        self.n_tokens = 0
        """A."""


def _get_buffer(axis: TensorAxis, token_bytes: int) -> Any:
    """Return the communication buffers of a group, made when they are first asked for, and anew for wider tokens. Collective then."""
    group, buffer = _resolve_process_group(cast(Any, axis.group_name)), _buffers.get(axis.group_name)
    configs = [
        choose(axis.degree) for choose in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)
    ]
    nvlink = max(config.get_nvl_buffer_size_hint(token_bytes, axis.degree) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(token_bytes, axis.degree) for config in configs)
    if buffer is None or buffer.num_nvl_bytes < nvlink or buffer.num_rdma_bytes < rdma:
        buffer = _buffers[axis.group_name] = deep_ep.Buffer(group, nvlink, rdma)
    return buffer


class _Dispatch(torch.autograd.Function):
    """Start to send tokens. Backward, bring the gradients back, summed over the ranks that a token went to."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gates: Tensor, experts: Tensor, n_experts: int, journey: _Journey
    ) -> tuple[Tensor, Tensor, Tensor]:
        buffer = journey.buffer
        by_rank, by_host, by_expert, is_sent, event = buffer.get_dispatch_layout(
            experts,
            n_experts,
            previous_event=deep_ep.Buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        arrived, arrived_experts, arrived_gates, journey.counts, journey.handle, journey.event = buffer.dispatch(
            tokens.contiguous(),
            topk_idx=experts,
            topk_weights=gates.float(),
            num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_host,
            is_token_in_rank=is_sent,
            num_tokens_per_expert=by_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        ctx.journey = journey
        ctx.mark_non_differentiable(arrived_experts)
        return arrived, arrived_gates, arrived_experts

    @staticmethod
    def backward(ctx: Any, tokens: Tensor, gates: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None, None]:
        journey = ctx.journey
        tokens, gates, _ = journey.buffer.combine(tokens.contiguous(), journey.handle, topk_weights=gates.float())
        return tokens, gates, None, None, None


class _Combine(torch.autograd.Function):
    """Bring results back, summed over the ranks that a token went to. x: (A, D) -> (T, D). Backward, send their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.buffer.combine(x.contiguous(), journey.handle)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.buffer.dispatch(grad.contiguous(), handle=ctx.journey.handle)[0], None


class _TakeRows(torch.autograd.Function):
    """tokens[owners], with gradients added up in fp32. tokens: (A, D); owners: (R,) -> (R, D)"""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, owners: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        ctx.n_tokens = tokens.shape[0]
        return tokens.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owners,) = ctx.saved_tensors
        return _add_rows(grad, owners, ctx.n_tokens), None


class _AddRows(torch.autograd.Function):
    """The sum of each token's rows, the transpose of `_TakeRows`. rows: (R, D); owners: (R,) -> (A, D)"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, owners: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(owners)
        return _add_rows(rows, owners, n_tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (owners,) = ctx.saved_tensors
        return grad.index_select(0, owners), None, None


def _add_rows(rows: Tensor, owners: Tensor, n_tokens: int) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(n_tokens, rows.shape[1], dtype=wide)
    return total.index_add_(0, owners, rows.to(wide)).to(rows.dtype)
