"""What the program does otherwise on a CPU than on a GPU, or cannot do with fake tensors, done as on a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models.common.router import Router
from models.common.token_dispatch import RowOrder
from trainer.components import loss
from trainer.distributed import expert_dispatch
from trainer.planner.operations import Work
from trainer.planner.recorder import Recorder


@contextlib.contextmanager
def installed(recorder: Recorder) -> Iterator[None]:
    """Put all of them in place for a while."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (F, "scaled_dot_product_attention", _attend),
            (F, "rms_norm", _normalize),
            (loss, "_accumulate_weight_gradient", _accumulate_weight_gradient_for(recorder)),
            # One graph for any number of rows would be one of symbols. Tokens are dealt out evenly here, so that one number is enough.
            (torch._dynamo, "maybe_mark_dynamic", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(_even_splits())
        yield


def deal_tokens_evenly(model: nn.Module) -> None:
    """Have routers deal tokens out in turn: no fake score can tell where a token goes."""
    for module in model.modules():
        if isinstance(module, Router):
            module.force_load_balance = True


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
    """By cuDNN's operation, which a GPU of Hopper's generation takes (`models.common.attention.attention_kernels`)."""
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operation(query, key, value, None, True, dropout_p, True, scale=scale)[0]


def _normalize(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """By the GPU's fused operation, which keeps its input and one number a row."""
    return torch.ops.aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]


def _accumulate_weight_gradient_for(recorder: Recorder) -> Callable[[Tensor, Tensor, Tensor], None]:
    def accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """The matrix product adds to `total` where that is."""
        (rows, vocab), dim = dlogits.shape, hidden.shape[1]
        recorder.spend(Work("matmul", 2.0 * rows * vocab * dim, (vocab, dim, rows), name="addmm"))

    return accumulate


@contextlib.contextmanager
def _even_splits() -> Iterator[None]:
    """Have each rank of expert parallelism send as many rows to each other."""
    send = expert_dispatch.ExchangingDispatcher.send
    rows = 0

    def noting_rows(self: Any, tokens: Tensor, gates: Tensor, order: RowOrder) -> Any:
        nonlocal rows
        rows = order.slots.shape[0]
        return send(self, tokens, gates, order)

    def known_numbers(numbers: Tensor) -> Callable[[], list[list[int]]]:
        ranks = numbers.shape[1]
        return lambda: [[rows // ranks] * ranks] * 2

    with (
        mock.patch.object(expert_dispatch.ExchangingDispatcher, "send", noting_rows),
        mock.patch.object(expert_dispatch, "_start_copy_to_host", known_numbers),
    ):
        yield
