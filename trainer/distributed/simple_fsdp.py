"""Data parallelism that the compiler can see (SimpleFSDP, arXiv 2411.00284): weights are gathered where they are read.

Each parameter is a sharded DTensor, the same one that FSDP2 would make of it, so that optimizer, clipping and checkpoints know no
difference. Its module becomes one of a class of its own, whose property of the parameter's name gathers the weight on each read, and
reduces its gradient: as operations of the network, so that a compiled graph holds them, and passes over the graph decide what is
freed after forward, what is gathered together, and when (`weight_passes.py`).

What the graph reads is this rank's shard as a plain tensor, whose gradient is handed over to the DTensor. A graph over DTensors
compiles slowly, does not compile with recomputation on the CPU (torch 2.13), and its cached form would be loaded by ranks whose
shards have another shape.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from models.plan import ParallelPlan
from trainer.config.errors import UserError
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.fsdp import find_experts, get_expert_placement, refuse_mixed_precision
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_collectives import Layout, gather_weight

_KEY = "parallelism.data_parallel_implementation = 'simple_fsdp'"


def apply_simple_fsdp(model: nn.Module, *, plan: ParallelPlan, dims: ParallelDims, training: TrainingConfig) -> None:
    """Shard or replicate the weights of `model`, on the meta device, in place. After everything else that is applied to it.

    Before the first forward pass of `model` its modules' attributes are the sharded DTensors, to be initialized; from then on each
    read of one is a collective. A parameter that two modules share stays one, and is gathered for each.

    Raises:
        ValueError: mixed precision without a process group, or shared parameters that cannot be served.
    """
    if not dims.has_mesh:
        refuse_mixed_precision(training)
        return
    _check_memory(model)
    targets: dict[nn.Module, _Target] = {}
    for part in find_experts(model, plan) if dims.spreads_experts else []:
        placement = get_expert_placement(part, dims.efsdp)(next(part.parameters()))
        targets |= dict.fromkeys(part.modules(), _get_target(dims, "efsdp", dim=placement.dim))
    dense = _get_target(dims, "fsdp", dim=0)
    links: dict[nn.Parameter, _Link] = {}
    for module in list(model.modules()):
        layouts = {}
        for name, whole in module._parameters.items():
            if whole is not None:
                link = _find_link(links, whole, targets.get(module, dense), training)
                module._parameters[name] = link.parameter
                link.readers.append((module, name))
                layouts[name] = link.layout
        if layouts:
            _become_gathering(module, layouts)
    model.register_forward_pre_hook(functools.partial(_link_shards, tuple(links.values())))


def list_layouts(model: nn.Module) -> dict[str, Layout]:
    """Return how each parameter is spread, by its name. Empty for a model without SimpleFSDP."""
    return {
        f"{prefix}.{name}".removeprefix("."): layout
        for prefix, module in model.named_modules()
        for name, layout in module.__dict__.get("_layouts", {}).items()
    }


def check_even_shards(model: nn.Module) -> None:
    """Check that all ranks have as much of each weight, and thereby the same graphs.

    Raises:
        UserError: they have not. Each would then order collectives by estimates of its own: they hang, or mix up weights.
    """
    uneven = [f"{name} over {x.shards}" for name, x in list_layouts(model).items() if x.size % x.shards]
    if uneven:
        raise UserError(
            f"compile.graph_passes = 'auto_bucketing' needs shards of equal size, and ranks cannot share {', '.join(uneven[:4])}"
            f"{' and others' if len(uneven) > 4 else ''} evenly. Use 'transformer_block_bucketing' or 'none', or another "
            "parallelism.data_parallel_shard_degree"
        )


# Sharding.


@dataclass(frozen=True)
class _Target:
    """Over what parameters are spread."""

    mesh: DeviceMesh
    replicates: bool
    """Whether the first axis of the mesh replicates."""
    shards: bool
    """Whether the last axis of the mesh shards."""
    dim: int


@dataclass(eq=False)
class _Link:
    """A parameter, and the modules that read it, by its names there."""

    parameter: nn.Parameter
    target: _Target
    layout: Layout
    readers: list[tuple[Any, str]]


def _get_target(dims: ParallelDims, shard_axis: str, *, dim: int) -> _Target:
    if dims.dp_replicate == 1:
        return _Target(dims.mesh(shard_axis), replicates=False, shards=True, dim=dim)
    if {"fsdp": dims.fsdp, "efsdp": dims.efsdp}[shard_axis] == 1:
        return _Target(dims.mesh("dp_replicate"), replicates=True, shards=False, dim=dim)
    hybrid = {"fsdp": "hsdp", "efsdp": "ehsdp"}[shard_axis]
    return _Target(dims.mesh(hybrid), replicates=True, shards=True, dim=dim)


def _check_memory(model: nn.Module) -> None:
    """Check that parameters share memory only by being one and the same: a view of another could not follow it to its shards."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        other = owners.setdefault(local.untyped_storage()._cdata, name)
        if other != name:
            raise ValueError(
                f"{_KEY}: {name} and {other} share memory, but are two parameters, which sharding would part. Tie them by giving "
                "both modules the same nn.Parameter, or use 'fsdp2'"
            )


def _find_link(
    links: dict[nn.Parameter, _Link], whole: nn.Parameter, target: _Target, training: TrainingConfig
) -> _Link:
    """Return the link of a parameter: that of another module, if it is shared."""
    if whole not in links:
        layout, sharded = _build_shard(whole, target, training)
        links[whole] = _Link(sharded, target, layout, [])
    link = links[whole]
    if link.target != target:
        module, name = link.readers[0]
        raise ValueError(
            f"{_KEY} cannot serve {name} of a {type(module).__name__}: it is shared by modules that are spread over different ranks, "
            "experts and others. Untie them"
        )
    return link


def _build_shard(whole: nn.Parameter, target: _Target, training: TrainingConfig) -> tuple[Layout, nn.Parameter]:
    """Return the layout of a parameter, and this rank's part of it: the DTensor that FSDP2 makes."""
    local, spec = (whole._local_tensor, whole._spec) if isinstance(whole, DTensor) else (whole.detach(), None)
    if local.ndim == 0:
        raise ValueError(f"{_KEY}: a parameter of no dims cannot be sharded. Give it one dim of one element")
    shard_group = target.mesh.get_group(target.mesh.ndim - 1) if target.shards else None
    replicate_group = target.mesh.get_group(0) if target.replicates else None
    layout = Layout(
        dim=target.dim,
        size=local.shape[target.dim],
        shards=shard_group.size() if shard_group else 1,
        shard_group=shard_group.group_name if shard_group else "",
        replicas=replicate_group.size() if replicate_group else 1,
        replicate_group=replicate_group.group_name if replicate_group else "",
        forward_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
    )
    # One object for all that are alike: compiled blocks, which share a graph, are told apart by what they hold.
    layout = _layouts.setdefault(layout, layout)
    placements: list[Placement] = [Replicate()] if target.replicates else []
    if shard_group:
        placements.append(_get_shard_placement(target.dim, spec))
        begin, end = layout.get_range(shard_group.rank())
        local = local.narrow(target.dim, begin, end - begin).clone(memory_format=torch.contiguous_format)
    mesh = target.mesh
    if spec is not None:
        placements += spec.placements
        mesh = DeviceMesh._concatenate([mesh, spec.mesh])
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    sharded = DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=whole.requires_grad)
    return layout, nn.Parameter(sharded, whole.requires_grad)


_layouts: dict[Layout, Layout] = {}


def _get_shard_placement(dim: int, inner: DTensorSpec | None) -> Placement:
    """Return how data parallelism cuts a dim that `inner`, tensor or expert parallelism, may have cut before."""
    axes = enumerate(inner.placements) if inner is not None else ()
    parts = prod(inner.mesh.size(axis) for axis, placement in axes if placement.is_shard(dim)) if inner else 1
    return _StridedShard(dim, split_factor=parts) if parts > 1 else Shard(dim)


# Reading.


def _become_gathering(module: nn.Module, layouts: dict[str, Layout]) -> None:
    """Make the module one of a class whose attributes gather: the same for all modules of a class, for compiled blocks to share a graph."""
    module.__dict__.update(_layouts=layouts, _shards={}, _placed=None)
    weight = module._parameters.get("weight")
    if getattr(module, "reads_placed_weight", False) and isinstance(weight, DTensor):
        names = weight.device_mesh.mesh_dim_names
        assert names is not None, "`ParallelDims` names all axes"
        assert names[-1] == "tp", f"a weight on {names} is not cut by tensor parallelism alone"
        axis = weight.device_mesh["tp"]
        module.__dict__["_placed"] = (axis, weight.placements[-1:], weight.shape, weight.stride())
    module.__class__ = _get_gathering_class(type(module), tuple(layouts))


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _get_gathering_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    if (cls, names) in _classes:
        return _classes[cls, names]
    properties = {name: property(_build_getter(name)) for name in names}
    if "weight" in names:
        # What the styles of tensor parallelism read: this rank's part.
        properties |= {"local_weight": properties["weight"], "weight": property(_get_placed_weight)}
    _classes[cls, names] = type(f"Gathering{cls.__name__}", (cls,), properties)
    return _classes[cls, names]


def _build_getter(name: str) -> Callable[[nn.Module], Any]:
    def get(module: Any) -> Any:
        if name not in module._shards:
            return module._parameters[name]
        if name == "weight" and hasattr(module, "gather_weight"):  # one in low precision has its own way
            return module.gather_weight(module._shards[name], module._layouts[name])
        return gather_weight(module._shards[name], module._layouts[name])

    return get


def _get_placed_weight(module: Any) -> Any:
    """Return the weight: where tensor parallelism cuts the vocabulary, as the DTensor that its modules ask for."""
    weight = module.local_weight
    if module._placed is None or "weight" not in module._shards:
        return weight
    mesh, placements, shape, stride = module._placed
    return DTensor.from_local(weight, mesh, placements, run_check=False, shape=shape, stride=stride)


# Between the DTensors, which the rest of the program knows, and the plain shards, which the network reads.


@torch.no_grad()
def _link_shards(links: Sequence[_Link], *_: Any) -> None:
    """Have modules read the memory of their parameters, wherever that is by now. Before each forward pass; mostly there is nothing to do."""
    for link in links:
        parameter = link.parameter
        assert isinstance(parameter, DTensor)
        local = parameter._local_tensor
        module, name = link.readers[0]
        shard = module._shards.get(name)
        if shard is not None and torch._C._is_alias_of(shard, local):  # type: ignore[attr-defined]
            continue
        if local.is_meta:
            raise RuntimeError(
                f"a parameter {name} of {type(module).__name__} was not initialized: it is still on the meta device"
            )
        shard = nn.Parameter(local.detach(), parameter.requires_grad)
        if parameter.requires_grad:
            shard.register_post_accumulate_grad_hook(functools.partial(_hand_over_gradient, link.parameter))
        for reader, its_name in link.readers:
            reader._shards[its_name] = shard


@torch.no_grad()
def _hand_over_gradient(parameter: nn.Parameter, shard: Tensor) -> None:
    """Add a shard's gradient to that of its parameter, as FSDP2 does with each microbatch."""
    grad, shard.grad = shard.grad, None
    assert grad is not None, "the hook runs after it was made"
    assert isinstance(parameter, DTensor)
    if parameter.grad is None:
        parameter.grad = DTensor(grad, parameter._spec, requires_grad=False)
    else:
        assert isinstance(parameter.grad, DTensor)
        parameter.grad._local_tensor.add_(grad)
