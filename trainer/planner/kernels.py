"""Triton kernels that the program has for CUDA alone, each as one kernel that is bound by memory, where a CPU takes many operations."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from trainer.low_precision import adam, gradient_wire, weight_gather
from trainer.low_precision.gradient_wire import Blocks
from trainer.low_precision.moments import Moment
from trainer.planner.operations import Work, sum_bytes
from trainer.planner.recorder import Recorder

Spend = Callable[[str, Iterable[Tensor]], None]


@contextmanager
def installed(recorder: Recorder) -> Iterator[None]:
    """Put all of them in place for a while."""

    def spend(name: str, tensors: Iterable[Tensor]) -> None:
        recorder.spend(Work("memory", bytes=sum_bytes(tensors), name=name))

    with ExitStack() as stack:
        for owner, name, replacement in (
            (adam, "_update_plainly", _update_for(spend)),
            (weight_gather, "cast_shard", _cast_shard_for(spend)),
            (gradient_wire, "pack", _pack_for(spend)),
            (gradient_wire, "sum_packed", _sum_packed_for(spend)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _update_for(spend: Spend) -> Callable[..., None]:
    def update(values: Tensor, grad: Tensor, first: Moment, second: Moment, *_: Any, **__: Any) -> None:
        kept = [part for moment in (first, second) for part in (moment.data, moment.scales) if part is not None]
        spend("adam", [grad, values, values, *kept, *kept])  # read, and written too but for the gradient

    return update


def _cast_shard_for(spend: Spend) -> Callable[..., Tensor]:
    def cast_shard(shard: Tensor, scale: Tensor, dtype: torch.dtype, *, amax: Tensor | None = None) -> Tensor:
        data = torch.empty(shard.shape, dtype=dtype, device=shard.device)
        spend("cast_shard", [shard, data])
        return data

    return cast_shard


def _pack_for(spend: Spend) -> Callable[[Tensor, Blocks], Tensor]:
    def pack(gradients: Tensor, blocks: Blocks) -> Tensor:
        sent = torch.empty(len(gradients), blocks.row_bytes, dtype=torch.uint8, device=gradients.device)
        spend("pack", [gradients, sent])
        return sent

    return pack


def _sum_packed_for(spend: Spend) -> Callable[[Tensor, Blocks, Tensor], None]:
    def sum_packed(received: Tensor, blocks: Blocks, output: Tensor) -> None:
        spend("sum_packed", [received, output])

    return sum_packed
