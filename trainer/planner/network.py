"""What a collective carries, over which ranks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup

from trainer.distributed.sequence_collectives import EXCHANGE_HEADS, get_group
from trainer.distributed.sharded_attention import OPERATION as SHARDED_ATTENTION
from trainer.planner.operations import list_tensors, sum_bytes


@dataclass(frozen=True)
class Transfer:
    """One collective, as one rank sees it."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all, send, receive, broadcast."""
    bytes: int
    """Of the whole: what a gather ends with, what a reduction begins with, what an exchange sends."""
    group: str
    """Name of the process group."""
    ranks: tuple[int, ...]
    is_asynchronous: bool = False
    """Whether the program waits for it later, by itself."""
    name: str = ""

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


_KINDS = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


def describe_collective(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Transfer | None:
    """Return what an operation of torch.distributed carries; None for one that carries nothing."""
    name = operation.overloadpacket.__name__
    kind = _KINDS.get(name)
    if kind is None:
        return None
    group = _find_group(args)
    if group is None or group.size() == 1:
        return None
    sizes = [sum_bytes([tensor]) for tensor in list_tensors(args)]
    size = max(sizes, default=0)
    if kind == "all-gather" and operation.namespace == "_c10d_functional":
        size *= group.size()
    schema = [argument.name for argument in operation._schema.arguments]
    place = schema.index("async_op") if "async_op" in schema else -1
    waits_later = bool(args[place]) if 0 <= place < len(args) else bool(kwargs.get("async_op", place >= 0))
    ranks = tuple(dist.get_process_group_ranks(group))
    return Transfer(kind, size, group.group_name, ranks, waits_later or kind in ("send", "receive"), name)


def list_inner_transfers(operation: Any, args: tuple[Any, ...]) -> list[Transfer]:
    """Return the collectives inside an operation of context parallelism, which fake tensors never come to."""
    packet = getattr(operation, "overloadpacket", None)
    if packet not in _INNER:
        return []
    group = next(get_group(value) for value in args if isinstance(value, str))
    ranks = tuple(dist.get_process_group_ranks(group))
    tensors = list_tensors(args)
    transfers = []
    for kind, places in _INNER[packet]:
        size = sum_bytes([tensors[place] for place in places])
        whole = size * group.size() if kind == "all-gather" else size
        transfers.append(Transfer(kind, whole, group.group_name, ranks, name=str(packet)))
    return transfers


# Keys and values are gathered, in the backward pass again, and their gradients are exchanged. By places among the tensor arguments.
_INNER: dict[Any, tuple[tuple[str, tuple[int, ...]], ...]] = {
    SHARDED_ATTENTION.overloadpacket: (("all-gather", (1, 2)),),
    torch.ops.bloomery.sharded_attention_backward: (("all-gather", (2, 3)), ("all-to-all", (2, 3))),
    EXCHANGE_HEADS.overloadpacket: (("all-to-all", (0,)),),
}


def _find_group(args: tuple[Any, ...]) -> ProcessGroup | None:
    for value in args:
        if isinstance(value, ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return ProcessGroup.unbox(value)
        if isinstance(value, str):
            try:
                return get_group(value)
            except (ValueError, RuntimeError, KeyError):
                continue  # the name of a reduction
    return None
