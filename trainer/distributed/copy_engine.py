"""FSDP2's collectives by the GPUs' copy engines, for ranks of one host joined by NVLink.

NCCL's kernels take multiprocessors and so slow the matrix products that they overlap with. Here each rank reads its
peers' symmetric memory by plain device copies, which need no multiprocessor. Gradients travel in the dtype that backward
made them in and are added up in fp32 afterwards: the sum is as exact as that of a reduction in fp32, at half its traffic.

A barrier before the copies says that every peer's input is there, one after them that it may be overwritten.
"""

import math
import socket
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from trainer.distributed.part_sums import sum_parts


class SymmetricBuffers:
    """Buffers that all ranks of a group can read, kept for use again: making one is a collective and takes milliseconds.

    A buffer is free once nothing refers to the tensor that was handed out. FSDP2 lets go of a communication buffer only
    when the streams that it will next be written on have waited for its readers, as it must for any allocator.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group_name = group.group_name
        self._buffers: dict[int, list[Tensor]] = {}
        self._handles: dict[int, Any] = {}
        self._users: dict[int, weakref.ref[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a symmetric tensor (numel,). Collective: every rank of the group asks for the same, in the same order."""
        size = numel * dtype.itemsize
        buffers = self._buffers.setdefault(size, [])
        buffer = next((b for b in buffers if not self._is_used(b)), None)
        if buffer is None:
            buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            # The allocation clears its signals on the default stream, behind the compute that waits there. A peer's signal
            # that came before would be cleared too, and its barrier never pass: hence no rendezvous before that is done.
            torch.cuda.synchronize(device)
            self._handles[buffer.data_ptr()] = symmetric_memory.rendezvous(buffer, self._group_name)
            buffers.append(buffer)
        # A tensor of its own over the same memory: a view would keep no reference that tells when its user is done.
        tensor = buffer.view(dtype)
        self._users[buffer.data_ptr()] = weakref.ref(tensor)
        return tensor

    def handle(self, tensor: Tensor) -> Any:
        """Return the symmetric memory handle of the buffer that `tensor` begins."""
        return self._handles[tensor.data_ptr()]

    def _is_used(self, buffer: Tensor) -> bool:
        user = self._users.get(buffer.data_ptr())
        return user is not None and user() is not None


class CopyEngineAllGather(AllGather):
    """Each rank copies its peers' shards into its own output buffer, into which FSDP2 has put its own shard."""

    def __init__(self, buffers: SymmetricBuffers) -> None:
        self._buffers = buffers

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the output buffer; the input is this rank's part of it."""
        return self._buffers.take(math.prod(int(n) for n in size), dtype, device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather on the current stream. output_tensor: (ranks * n,), input_tensor: (n,) within it."""
        handle = self._buffers.handle(output_tensor)
        rank, count = group.rank(), input_tensor.numel()
        handle.barrier(channel=0)
        for peer in _peers(rank, group.size()):
            shard = handle.get_buffer(peer, (count,), output_tensor.dtype, peer * count)
            output_tensor.narrow(0, peer * count, count).copy_(shard)
        handle.barrier(channel=0)


class CopyEngineReduceScatter(ReduceScatter):
    """Each rank copies its part of every peer's gradients and adds them up in fp32.

    wire_dtype: of the gradients as they travel.
    """

    def __init__(self, buffers: SymmetricBuffers, wire_dtype: torch.dtype) -> None:
        self._buffers = buffers
        self._wire_dtype = wire_dtype
        self._input_is_next = True

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the input buffer at every first call, the output at every second: FSDP2 asks for them in turn."""
        numel = math.prod(int(n) for n in size)
        is_input, self._input_is_next = self._input_is_next, not self._input_is_next
        if is_input:
            return self._buffers.take(numel, self._wire_dtype, device)
        return torch.empty(numel, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce on the current stream. output_tensor: (n,), input_tensor: (ranks * n,)."""
        assert op == dist.ReduceOp.SUM, f"gradients are summed, not reduced by {op}"
        handle = self._buffers.handle(input_tensor)
        rank, ranks, count = group.rank(), group.size(), output_tensor.numel()
        others = torch.empty(ranks - 1, count, dtype=input_tensor.dtype, device=input_tensor.device)
        handle.barrier(channel=0)
        for peer in _peers(rank, ranks):
            part = handle.get_buffer(peer, (count,), input_tensor.dtype, rank * count)
            others[peer if peer < rank else peer - 1].copy_(part)
        handle.barrier(channel=0)
        sum_parts(input_tensor.narrow(0, rank * count, count), others, rank, output_tensor)


def _peers(rank: int, ranks: int) -> list[int]:
    """The other ranks, beginning with the next: at each moment every rank reads from another one."""
    return [(rank + distance) % ranks for distance in range(1, ranks)]


def find_obstacle(group: dist.ProcessGroup) -> str | None:
    """Return why the ranks of a group cannot use copy engines, or None if they can. Collective over the group.

    Groups may find different answers: `agree_on_obstacle`.
    """
    devices: list[tuple[str, int] | None] = [None] * group.size()
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    dist.all_gather_object(devices, (socket.gethostname(), device), group=group)
    places = [place for place in devices if place is not None]
    if any(index < 0 for _, index in places):
        return "there is a rank without a GPU"
    hosts = sorted({host for host, _ in places})
    if len(hosts) > 1:
        return f"the sharding group spans the hosts {', '.join(hosts)}"
    unreachable = [
        index for _, index in places if index != device and not torch.cuda.can_device_access_peer(device, index)
    ]
    reasons: list[str | None] = [None] * group.size()
    reason = f"GPU {device} cannot reach the memory of the GPUs {unreachable}" if unreachable else None
    dist.all_gather_object(reasons, reason, group=group)
    return next((found for found in reasons if found), None)


def agree_on_obstacle(obstacle: str | None, device: torch.device) -> str | None:
    """Return the obstacle of this rank's group, or that another group has one. Collective over all ranks.

    Ranks of tensor parallelism hold the same norms, each sharded over a group of its own: sums in different orders would let
    these drift apart.
    """
    count = torch.tensor(0 if obstacle is None else 1, device=device)
    dist.all_reduce(count)
    return obstacle or ("it cannot be used by the GPUs of another sharding group" if count else None)


def apply_copy_engine(
    model: torch.nn.Module,
    *,
    group: dist.ProcessGroup,
    wire_dtype: torch.dtype,
    others: Collection[torch.nn.Module] = (),
) -> None:
    """Have the FSDP units of `model` communicate over `group`, which has no obstacle, by copy engines.

    others: units that communicate over another group, which are left as they are.
    """
    gathers, gradients = SymmetricBuffers(group), SymmetricBuffers(group)
    for module in model.modules():
        if isinstance(module, FSDPModule) and module not in others:
            module.set_custom_all_gather(CopyEngineAllGather(gathers))
            module.set_custom_reduce_scatter(CopyEngineReduceScatter(gradients, wire_dtype))
