"""What torch does in a time that grows with the number of ranks, or with the square of that of parameters, done without.

FSDP2 cuts each weight into as many tensors as there are ranks to take one of them, and where it shards another dim than the first, to
join them in another order. DTensor looks at all tensors of a fused optimizer once for each of them (torch 2.12 and 2.13). With
thousands of ranks and fake tensors that takes longer than all else.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param
from torch.distributed.tensor import _sharding_prop
from torch.distributed.tensor.placement_types import _StridedShard

from trainer.planner.operations import Work, sum_bytes
from trainer.planner.recorder import Recorder


@contextlib.contextmanager
def shortcuts_taken(recorder: Recorder) -> Iterator[None]:
    """Take them for a while. The outcome is the same; what FSDP2 joins is noted as the one kernel that it is."""
    with contextlib.ExitStack() as stack:
        functions: dict[str, Callable[..., Any]] = {"chunk": Chunks, "cat": _join_for(recorder)}
        for owner, name, replacement in (
            (_fsdp_param, "_chunk_with_empty", Chunks),
            (_fsdp_collectives, "torch", _TorchWith(functions)),
            (_sharding_prop, _PROPAGATE, _propagate_flag()),
        ):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


class Chunks:
    """What `torch.chunk` returns, each part made when it is asked for. Where there are fewer rows than parts, the last are empty, as
    FSDP2 has them.
    """

    def __init__(self, tensor: Tensor, n_parts: int, dim: int = 0) -> None:
        self.tensor, self.n_parts, self.dim = tensor, n_parts, dim
        self.most = -(-tensor.size(dim) // n_parts)
        """Rows of the first part."""

    def __len__(self) -> int:
        return self.n_parts

    def __getitem__(self, place: int) -> Tensor:
        if not 0 <= place < self.n_parts:
            raise IndexError(place)
        begin, rows = place * self.most, self.tensor.size(self.dim)
        if begin >= rows:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, begin, min(self.most, rows - begin))


class _TorchWith:
    """The module, but for some functions."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _join_for(recorder: Recorder) -> Callable[..., Tensor]:
    def join(parts: Any, dim: int = 0, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(parts, Chunks):
            return torch.cat(parts, dim) if out is None else torch.cat(parts, dim, out=out)
        whole = parts.tensor
        recorder.spend(Work("memory", bytes=2 * sum_bytes([whole]), name="cat"))
        if out is not None:
            return out
        shape = list(whole.shape)
        shape[parts.dim] = parts.most
        shape[dim] *= parts.n_parts
        return recorder.make(tuple(shape), torch.empty(shape, device="meta").stride(), whole.dtype)

    return join


_PROPAGATE = "_propagate_use_strided_shard_flag"


def _propagate_flag() -> Callable[[Any, Any], None]:
    """Return DTensor's function that passes a flag on from an operation's inputs, called with one input for each value of it."""
    propagate = getattr(_sharding_prop, _PROPAGATE, None)
    seen: list[Any] = [None, None]

    def propagate_from_few(strategy: Any, schema: Any) -> None:
        if seen[0] is not schema:
            specs = {
                spec.use_strided_shard_as_shard_order: spec
                for spec in schema.args_spec
                if any(isinstance(placement, _StridedShard) for placement in spec.placements)
            }
            seen[:] = schema, SimpleNamespace(args_spec=tuple(specs.values()))
        assert propagate is not None, "only what is there is replaced"
        propagate(strategy, seen[1])

    return propagate_from_few
