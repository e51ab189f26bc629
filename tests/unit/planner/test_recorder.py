"""What is noted of operations on fake tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trainer.planner.network import Transfer
from trainer.planner.operations import Work, describe
from trainer.planner.recorder import Recorder


class Spread(Tensor):
    """Like a DTensor: says that it is as large as all ranks' parts, and does everything with its own."""

    part: Tensor

    @staticmethod
    def __new__(cls, part: Tensor) -> "Spread":
        whole = Tensor._make_wrapper_subclass(cls, (1000, *part.shape), dtype=part.dtype)
        whole.part = part
        return whole

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map_only(cls, lambda x: x.part, args), **(kwargs or {}))


def test_work_on_a_tensor_of_many_ranks_is_that_of_this_rank():
    recorder = Recorder(lambda work: work.bytes)
    with recorder.recording():
        whole = Spread(torch.empty(16))
        torch._foreach_mul_([whole], 2.0)
    assert [span.seconds for span in recorder.spans] == [2 * 4 * 16]


def test_fused_optimizer_reads_and_writes_what_it_updates():
    lists = [[torch.empty(10), torch.empty(6)] for _ in range(4)]
    steps = [torch.empty(()) for _ in range(2)]
    work = describe(torch.ops.aten._fused_adamw_.default, (*lists, [], steps), ())
    # Gradients too, which it could scale.
    assert work.bytes == 2 * 4 * 4 * 16 + 4 * 2


def test_kernels_take_longer_beside_collectives_that_need_multiprocessors():
    recorder = Recorder(lambda work: work.bytes)
    recorder.copy_engine_groups = {"copied"}
    for group, size in (("copied", 100), ("carried", 4), ("carried", 4)):
        recorder.send(Transfer("all-gather", size, group, (0, 1)), waits=False)
    for size in (3, 6, 3):  # beside the first; half beside the second; alone
        recorder.spend(Work("memory", bytes=size))
    spans = [span for span in recorder.spans if span.stream == "compute"]
    assert [span.seconds for span in spans] == pytest.approx([4.0, 7.0, 3.0])


def test_host_that_asks_is_ahead_of_the_device_by_a_full_queue_until_it_waits():
    recorder = Recorder(lambda work: 1.0)
    for _ in range(1030):
        recorder.spend(Work("memory"))
    assert recorder.is_done_at(7.0)
    assert not recorder.is_done_at(8.0)
    recorder.wait_until(100.0)
    assert recorder.is_done_at(100.0)
    assert not recorder.is_done_at(101.0)
