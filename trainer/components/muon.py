"""Muon for matrices that are sharded over ranks.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by its nearest
semi-orthogonal matrix. That is a function of the whole matrix: applied to each rank's shard it gives a plausible but
wrong update. Here every matrix is brought together on one rank, orthogonalized there, and handed back in shards, with
the matrices dealt out evenly, so that the work is divided as well. Two all-to-alls in bf16 carry it. The arithmetic on
a matrix is that of `torch.optim.Muon` in one process, bit for bit.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

_TRANSPORT_DTYPE = torch.bfloat16  # Newton-Schulz rounds its input to bf16 and returns bf16: nothing is lost on the way


class _Layout(NamedTuple):
    """Where the rows of a matrix are: split over the ranks of one mesh axis."""

    group: dist.ProcessGroup
    ranks: int
    rank: int
    device_type: str


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` whose parameters may be plain tensors or DTensors with any placements.

    Rows split over one mesh axis (FSDP, HSDP) take the divided path. Any other sharding (tensor parallelism) gathers
    the whole matrix on every rank. State: `momentum_buffer`, placed as the parameter is.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over the ranks that share the parameters."""
        assert closure is None, "ShardedMuon takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for bucket, layout in _buckets(parameters):
                directions = [self._advance_momentum(p, group) for p in bucket]
                for parameter, update in zip(bucket, _orthogonalize(bucket, directions, layout, group), strict=True):
                    _apply(parameter, update, group)

    def _advance_momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Move the momentum on and return the direction, both as this rank's shard."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None, "only parameters with a gradient come here"
        gradient, momentum = _local(parameter.grad), _local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _row_axis(parameter: Tensor) -> int | None:
    """Return the mesh axis over which the rows of a matrix are split, None where it is sharded in another way or not."""
    if not isinstance(parameter, DTensor):
        return None
    split = [axis for axis, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
    if len(split) != 1:
        return None
    placement = parameter.placements[split[0]]
    # type(): a _StridedShard is a Shard in some versions, and its shards are not in the order of the ranks.
    return split[0] if type(placement) is Shard and placement.dim == 0 else None


def _buckets(parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], _Layout | None]]:
    """Deal the parameters into buckets of one matrix for each rank, matrices of like size together.

    The order depends only on the order and shapes of the parameters: it is the same on all ranks.
    """
    divided: dict[tuple[DeviceMesh, int], list[DTensor]] = {}
    for parameter in parameters:
        axis = _row_axis(parameter)
        if axis is None:
            yield [parameter], None
        else:
            assert isinstance(parameter, DTensor), "only DTensors have a row axis"
            divided.setdefault((parameter.device_mesh, axis), []).append(parameter)
    for (mesh, axis), members in divided.items():
        layout = _Layout(mesh.get_group(axis), mesh.size(axis), mesh.get_local_rank(axis), mesh.device_type)
        members.sort(key=lambda matrix: (matrix.numel(), tuple(matrix.shape)), reverse=True)
        for start in range(0, len(members), layout.ranks):
            yield list(members[start : start + layout.ranks]), layout


def _orthogonalize(
    bucket: list[Tensor], directions: list[Tensor], layout: _Layout | None, group: dict[str, Any]
) -> list[Tensor]:
    """Return this rank's shards of the orthogonalized directions, (local rows, columns) each, in bf16."""
    if layout is not None:
        return _orthogonalize_divided(bucket, directions, layout, group)
    (parameter,), (direction,) = bucket, directions
    if not isinstance(parameter, DTensor):
        return [_newton_schulz(direction, group)]
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(
        direction, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole = DTensor.from_local(_newton_schulz(sharded.full_tensor(), group), mesh, [Replicate()] * mesh.ndim)
    return [whole.redistribute(placements=placements).to_local()]


def _orthogonalize_divided(
    bucket: list[Tensor], directions: list[Tensor], layout: _Layout, group: dict[str, Any]
) -> list[Tensor]:
    """Bring matrix i of the bucket together on rank i, orthogonalize it there and send its rows back."""
    assert len(bucket) <= layout.ranks, "a bucket holds at most one matrix for each rank"
    shards = [d.to(device=layout.device_type, dtype=_TRANSPORT_DTYPE) for d in directions]
    sizes = [shard.numel() for shard in shards] + [0] * (layout.ranks - len(shards))
    mine = bucket[layout.rank] if layout.rank < len(bucket) else None
    rows = _rows_by_rank(mine.shape[0], layout.ranks) if mine is not None else [0] * layout.ranks
    columns = mine.shape[1] if mine is not None else 0
    my_sizes = [count * columns for count in rows]

    outgoing = torch.cat([shard.reshape(-1) for shard in shards])
    gathered = outgoing.new_empty(sum(my_sizes))
    dist.all_to_all_single(gathered, outgoing, my_sizes, sizes, group=layout.group)
    if mine is not None:
        gathered = _newton_schulz(gathered.view(mine.shape), group).reshape(-1)
    dist.all_to_all_single(outgoing, gathered, sizes, my_sizes, group=layout.group)
    results = outgoing.split([shard.numel() for shard in shards])
    return [result.view(d.shape).to(d.device) for result, d in zip(results, directions, strict=True)]


def _rows_by_rank(rows: int, ranks: int) -> list[int]:
    """Return the rows of each rank's shard: DTensor cuts as `torch.chunk` does, and the last ranks may have none."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


def _newton_schulz(direction: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the orthogonalized matrix in bf16, by Jordan's quintic iteration X <- aX + (bA + cA^2)X with A = XX^T.

    The matrix products are those of `torch.optim.Muon`, whose own function is private and has changed its signature.
    """
    a, b, c = group["ns_coefficients"]
    x = direction.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=group["eps"])  # spectral norm at most 1
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT  # (short side, short side)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _lr_for_shape(group: dict[str, Any], shape: torch.Size) -> float:
    """Return the learning rate for a matrix: Jordan's scaling, or that of Moonlight (https://arxiv.org/abs/2502.16982)."""
    rows, columns = shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return group["lr"] * 0.2 * math.sqrt(max(rows, columns))
    return group["lr"] * math.sqrt(max(1, rows / columns))


def _apply(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    """Decay the weights and take the step, in place on this rank's shard."""
    weight = _local(parameter)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(update, alpha=-_lr_for_shape(group, parameter.shape))
