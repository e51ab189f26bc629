"""What the program does otherwise on a CPU than on a GPU, or cannot do with fake tensors, done as on a GPU."""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.common.token_dispatch import RowOrder
from trainer.components import passes
from trainer.distributed import expert_dispatch, expert_parallel, sequence_split
from trainer.distributed.turns import Turns
from trainer.planner import kernels
from trainer.planner.recorder import Recorder


@contextlib.contextmanager
def installed(recorder: Recorder, *, is_balanced: bool) -> Iterator[None]:
    """Put all of them in place for a while. is_balanced: whether tokens are dealt out in turn (`debug.moe_force_load_balance`)."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (F, "scaled_dot_product_attention", _attend),
            (F, "rms_norm", _normalize),
            (passes, "build_document_mask", _build_document_mask),
            (sequence_split, "build_document_mask", _build_document_mask),
            (expert_parallel, "_disable_current_modes", _disable_others_than(recorder)),
            (Turns, "run", _run_turns_with(recorder)),
            (dist, "isend", _send_for(recorder)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(kernels.installed(recorder))
        stack.enter_context(_routing(recorder, 0.0 if is_balanced else _SPREAD))
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By cuDNN's operation, which a GPU of Hopper's generation takes (`models.common.attention.attention_kernels`), or, with a mask, in
    place of FlexAttention, which keeps the same for its backward pass.
    """
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operation(query, key, value, None, True, dropout_p, True, scale=scale)[0]


def _build_document_mask(positions: Tensor, *, device_type: str, queries: Tensor | None = None) -> Tensor:
    """Return what has the shape of a mask, (B, 1, Q, S), and the memory of FlexAttention's lists of blocks: for either direction, of whole
    and of partial blocks of 128 x 128, numbers of 4 bytes.
    """
    batch, seq = positions.shape
    rows = seq if queries is None else queries.shape[0]
    size = 4 * 4 * math.ceil(rows / 128) * math.ceil(seq / 128)
    lists = torch.empty((batch, size), dtype=torch.bool, device=positions.device)
    return lists.as_strided((batch, 1, rows, seq), (size, 0, 0, 0))


def _normalize(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """By the GPU's fused operation, which keeps its input and one number a row."""
    return torch.ops.aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]


def _disable_others_than(recorder: Recorder) -> Callable[[], contextlib.AbstractContextManager[None]]:
    disable = expert_parallel._disable_current_modes

    @contextlib.contextmanager
    def disable_others() -> Iterator[None]:
        """Without the recorder FSDP would gather the experts in real memory, which nobody notes."""
        with disable(), recorder:
            yield

    return disable_others


def _run_turns_with(recorder: Recorder) -> Callable[..., None]:
    run = Turns.run

    def run_both(self: Turns, first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
        """Modes are a thread's own, and the second pass has a thread of its own."""

        def recorded() -> None:
            with recorder:
                second()

        run(self, first, recorded, device)

    return run_both


class _Sent:
    """What `isend` returns. That of a fake process group is never done, so that what was sent would stay in memory for good."""

    def __init__(self, recorder: Recorder, arrival: float) -> None:
        self._recorder, self._arrival = recorder, arrival

    def is_completed(self) -> bool:
        """Whether the host, if it asks now, finds that it has left."""
        return self._recorder.is_done_at(self._arrival)

    def wait(self) -> bool:
        """Nobody waits for what is sent, but for the end of it."""
        return True


def _send_for(recorder: Recorder) -> Callable[..., _Sent]:
    send = dist.isend

    def isend(tensor: Tensor, *, group: dist.ProcessGroup, group_dst: int) -> _Sent:
        send(tensor, group=group, group_dst=group_dst)
        return _Sent(recorder, recorder.find_arrival(group.group_name))

    return isend


_SPREAD = 0.45
"""Standard deviation of the logarithms of the experts' loads in a layer. The busiest of 64 then has some 2.6 times the mean's, as
the median layer of the 16B had in its first hundred steps (docs/benchmarks.md: 1.7 to 3)."""


def draw_shares(layer: int, step: int, *, n_experts: int, n_ranks: int, spread: float = _SPREAD) -> list[float]:
    """Return the share of a layer's rows in a step that each rank's experts have. The same numbers give the same shares."""
    draw = random.Random(f"{layer} of step {step}")
    loads = [math.exp(draw.gauss(0.0, spread)) for _ in range(n_experts)]
    here = n_experts // n_ranks
    return [sum(loads[rank * here : (rank + 1) * here]) / sum(loads) for rank in range(n_ranks)]


@contextlib.contextmanager
def _routing(recorder: Recorder, spread: float) -> Iterator[None]:
    """Have each rank of expert parallelism send as many rows to each other as a router might that is not in balance: no fake score can
    tell where a token goes. All microbatches of a step are alike, so that what is recomputed is as large as it was.
    """
    send = expert_dispatch.ExchangingDispatcher.send
    numbers: dict[int, int] = {}
    splits: list[list[int]] = []

    def noting_rows(self: Any, tokens: Tensor, gates: Tensor, order: RowOrder) -> Any:
        layer = numbers.setdefault(id(self), len(numbers))
        rows, n_experts = order.slots.shape[0], order.counts.shape[0]
        shares = draw_shares(layer, recorder.step, n_experts=n_experts, n_ranks=self.axis.degree, spread=spread)
        ends = [round(rows * share) for share in itertools.accumulate(shares)]
        sent = [end - begin for begin, end in itertools.pairwise((0, *ends))]
        splits[:] = sent, [sent[self.axis.rank]] * self.axis.degree
        return send(self, tokens, gates, order)

    def start_copy(_: Tensor) -> Callable[[], list[list[int]]]:
        copied = list(splits)  # now: until the host looks, the other one of two passes at once may have sent rows
        begun = recorder.streams.compute.clock

        def wait() -> list[list[int]]:
            recorder.wait_until(begun)
            return copied

        return wait

    with (
        mock.patch.object(expert_dispatch.ExchangingDispatcher, "send", noting_rows),
        mock.patch.object(expert_dispatch, "_start_copy_to_host", start_copy),
    ):
        yield
