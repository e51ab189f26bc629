"""The copy engine's buffers and its arithmetic, on ranks that share this process. `tests/gpu/test_copy_engine.py` has real ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import copy_engine
from trainer.distributed.copy_engine import CopyEngineAllGather, CopyEngineReduceScatter, SymmetricBuffers

RANKS = 3
CPU = torch.device("cpu")


class Group:
    """As much of a process group as the copy engine asks for."""

    group_name = "group"

    def __init__(self, rank: int, ranks: int = RANKS) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


class Handle:
    """Symmetric memory of ranks that take turns: what each of them allocated as its nth buffer."""

    def __init__(self, peers: list[Tensor]) -> None:
        self.peers, self.barriers = peers, 0

    def barrier(self, channel: int) -> None:
        self.barriers += 1

    def get_buffer(self, peer: int, sizes: tuple[int], dtype: torch.dtype, offset: int) -> Tensor:
        return self.peers[peer].view(dtype).narrow(0, offset, sizes[0])


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """Handles in the order of their making. Every `RANKS` buffers made in a row belong together."""
    handles: list[Handle] = []
    waiting: list[Tensor] = []

    def meet(buffer: Tensor, group_name: str) -> Handle:
        if not waiting:
            waiting.append(buffer)
        elif len(waiting) == RANKS:
            waiting[:] = [buffer]
        else:
            waiting.append(buffer)
        peers = handles[-1].peers if len(waiting) > 1 else []
        peers.append(buffer)
        handles.append(Handle(peers))
        return handles[-1]

    monkeypatch.setattr(copy_engine.symmetric_memory, "empty", lambda *size, **options: torch.empty(*size, **options))
    monkeypatch.setattr(copy_engine.symmetric_memory, "rendezvous", meet)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return handles


def take_in_turn(make: Callable[[int], Tensor]) -> list[Tensor]:
    return [make(rank) for rank in range(RANKS)]


def test_buffer_is_used_again_once_nothing_refers_to_it(rendezvous: list[Handle]) -> None:
    buffers = SymmetricBuffers(Group(0))  # type: ignore[arg-type]
    first = buffers.take(6, torch.float32, CPU)
    second = buffers.take(6, torch.float32, CPU)
    assert first.data_ptr() != second.data_ptr()
    address = first.data_ptr()
    part = first.narrow(0, 2, 2)
    del first
    del part
    again = buffers.take(12, torch.bfloat16, CPU)
    assert (again.data_ptr(), again.dtype, again.shape) == (address, torch.bfloat16, (12,))
    assert buffers.take(5, torch.float32, CPU).numel() == 5
    assert len(rendezvous) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_weights_are_those_of_all_ranks(rendezvous: list[Handle], dtype: torch.dtype) -> None:
    engines = [CopyEngineAllGather(SymmetricBuffers(Group(rank))) for rank in range(RANKS)]  # type: ignore[arg-type]
    whole = torch.arange(4 * RANKS).to(dtype)
    outputs = take_in_turn(lambda rank: engines[rank].allocate((4 * RANKS,), dtype=dtype, device=CPU))
    for rank, output in enumerate(outputs):
        output.fill_(-1).narrow(0, 4 * rank, 4).copy_(whole.narrow(0, 4 * rank, 4))
    for rank, output in enumerate(outputs):
        engines[rank](output, output.narrow(0, 4 * rank, 4), Group(rank))  # type: ignore[arg-type]
        assert torch.equal(output, whole)
    assert [handle.barriers for handle in rendezvous] == [2] * RANKS, "before the copies and after them"


def test_gradients_travel_in_bf16_and_are_summed_in_fp32(rendezvous: list[Handle]) -> None:
    engines: list[Any] = [
        CopyEngineReduceScatter(SymmetricBuffers(Group(rank)), torch.bfloat16)  # type: ignore[arg-type]
        for rank in range(RANKS)
    ]
    # FSDP2 asks for the input in the dtype of the reduction, and then for the output.
    inputs = take_in_turn(lambda rank: engines[rank].allocate((2 * RANKS,), dtype=torch.float32, device=CPU))
    outputs = take_in_turn(lambda rank: engines[rank].allocate((2,), dtype=torch.float32, device=CPU))
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}
    assert {tensor.dtype for tensor in outputs} == {torch.float32}
    gradients = [torch.tensor([256.0, 1.0, 2.0, 3.0, 4.0, 5.0]), torch.ones(6), torch.full((6,), 3.0)]
    for tensor, gradient in zip(inputs, gradients, strict=True):
        tensor.copy_(gradient)
    for rank in range(RANKS):
        engines[rank](outputs[rank], inputs[rank], Group(rank), dist.ReduceOp.SUM)
    # 256 + 1 is 256 in bf16.
    assert torch.cat(outputs).tolist() == [260.0, 5.0, 6.0, 7.0, 8.0, 9.0]
