"""CPU offload, planned: shards, their gradients and the optimizer's states in host memory, and what is copied to the device and back.

On a CPU, which stands for the device here, FSDP2's copies are none: it goes on with the tensor that it has. They are put in its way.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from trainer.planner.operations import Work, sum_bytes
from trainer.planner.recorder import Recorder


@contextlib.contextmanager
def offloading(recorder: Recorder) -> Iterator[None]:
    """Have FSDP2 copy shards to the device when it gathers them, and reduced gradients to the host."""
    get_inputs = FSDPParam.all_gather_inputs.fget  # type: ignore[attr-defined]
    reduce = _fsdp_param_group.foreach_reduce

    def copy_and_get_inputs(self: FSDPParam) -> list[Tensor]:
        shard = self._sharded_param_data
        self._sharded_param_data = recorder.make(tuple(shard.shape), shard.stride(), shard.dtype)
        recorder.spend(_copy_of([shard]))
        try:
            inputs: list[Tensor] = get_inputs(self)
            return inputs
        finally:
            self._sharded_param_data = shard

    def reduce_and_copy(*args: Any, **kwargs: Any) -> Any:
        fsdp_params, reduce_stream = args[0], args[3]
        result = reduce(*args, **kwargs)
        gradients = [_get_local_gradient(fsdp_param) for fsdp_param in fsdp_params]
        with recorder.streams.use(reduce_stream):
            recorder.spend(_copy_of(gradients))
        for gradient in gradients:
            recorder.move_to_host(gradient)
        return result

    with (
        mock.patch.object(FSDPParam, "all_gather_inputs", property(copy_and_get_inputs)),
        mock.patch.object(_fsdp_param_group, "foreach_reduce", reduce_and_copy),
    ):
        yield


def _copy_of(tensors: list[Tensor]) -> Work:
    return Work("host copy", bytes=sum_bytes(tensors), name="copy between host and device")


def _get_local_gradient(fsdp_param: FSDPParam) -> torch.Tensor:
    gradient: Any = fsdp_param.sharded_param.grad
    local: torch.Tensor = gradient.to_local()
    return local
