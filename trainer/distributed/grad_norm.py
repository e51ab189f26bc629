"""Norm and clipping of gradients, over every mesh that shards them, without waiting for the device."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[torch.nn.Parameter], max_norm: float, *, pp_mesh: DeviceMesh | None = None
) -> torch.Tensor:
    """Scale all gradients down so that their joint 2-norm is at most `max_norm`, and return the norm from before.

    The norm is a 0-dim fp32 tensor, the same on all ranks, still on the device: nothing waits for it here (offloaded gradients aside). With a
    `max_norm` of 0 gradients stay as they are. Gradients may lie on different meshes. With `pp_mesh` the stages of a
    pipeline, which hold different parameters, count too. A norm that is not finite makes the gradients NaN or 0.

    Collective: all ranks call it with the same parameters in the same order (pipeline stages aside).
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    total_norm = get_total_norm(grads, pp_mesh=pp_mesh)
    if max_norm > 0 and grads:
        scale = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
        for device, local_grads in _by_device(_local(grad) for grad in grads).items():
            torch._foreach_mul_(local_grads, scale.to(device))
    return total_norm


@torch.no_grad()
def get_total_norm(grads: list[torch.Tensor], *, pp_mesh: DeviceMesh | None = None) -> torch.Tensor:
    """Return the joint 2-norm of tensors, DTensors or not, as `clip_grad_norm` does."""
    # Tensors sharded over the same groups are added up before one reduction.
    squares: dict[tuple[dist.ProcessGroup, ...], torch.Tensor] = {}
    groups_of = [_sharding_groups(grad) for grad in grads]
    device = _reduction_device(grads, pp_mesh)
    for groups in dict.fromkeys(groups_of):
        local_grads = [_local(grad) for grad, its in zip(grads, groups_of, strict=True) if its == groups]
        total = torch.zeros((), dtype=torch.float32, device=device)
        for tensors in _by_device(local_grads).values():
            norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
            total += norms.square().sum().to(device)
        for group in groups:
            dist.all_reduce(total, group=group)
        squares[groups] = total
    square = torch.stack(list(squares.values())).sum() if squares else torch.zeros((), device=device)
    if pp_mesh is not None:
        dist.all_reduce(square, group=pp_mesh.get_group())
    return square.sqrt()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding_groups(grad: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Groups over which the parts of a gradient lie. Over a replicated axis every rank has the whole already."""
    if not isinstance(grad, DTensor):
        return ()
    assert not any(p.is_partial() for p in grad.placements), f"gradient not reduced yet: {grad.placements}"
    return tuple(
        grad.device_mesh.get_group(axis)
        for axis, placement in enumerate(grad.placements)
        if not placement.is_replicate() and grad.device_mesh.size(axis) > 1
    )


def _reduction_device(grads: list[torch.Tensor], pp_mesh: DeviceMesh | None) -> torch.device:
    """Where to add up: with offloaded gradients on the mesh's device, so that its own backend can reduce."""
    mesh = next((grad.device_mesh for grad in grads if isinstance(grad, DTensor)), pp_mesh)
    if mesh is not None and mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return grads[0].device if grads else torch.device("cpu")


def _by_device(tensors: Iterable[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    grouped: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        grouped.setdefault(tensor.device, []).append(tensor)
    return grouped
