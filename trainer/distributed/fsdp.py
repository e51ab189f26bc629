"""Data parallelism: sharded (FSDP2), replicated (DDP), and both (HSDP), by one mechanism.

Master weights and optimizer states have `training.dtype`; forward and backward run in `training.mixed_precision_param`.
Gradients are summed over ranks, never averaged: the trainer divides the loss by the global number of tokens.
"""

import logging
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Literal

import torch
import torch.nn as nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from models.plan import ParallelPlan, match_modules
from trainer.config.errors import UserError
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.copy_engine import agree_on_obstacle, apply_copy_engine, find_obstacle
from trainer.distributed.parallel_dims import ParallelDims
from trainer.low_precision.gradient_wire import apply_float8_gradients

logger = logging.getLogger(__name__)

Accumulation = Literal["sharded", "unsharded"]

# Share of the device memory that gradients held whole between microbatches may take (`fsdp_accumulation = "auto"`).
_WHOLE_GRADIENTS_SHARE = 0.1


def apply_data_parallel(
    model: nn.Module,
    *,
    plan: ParallelPlan,
    dims: ParallelDims,
    parallelism: ParallelismConfig,
    training: TrainingConfig,
) -> None:
    """Shard or replicate the weights of `model` in place, one communication group for each of the plan's units.

    What no unit names (tied embeddings) belongs to the root. In one process with a process group the same code runs, on
    a mesh of one, so that mixed precision is the same; without a process group only plain fp32 is left to do: nothing.

    Raises:
        ValueError: a glob of the plan matches nothing, mixed precision is asked for without a process group, or (`UserError`)
            copy engines or gradients in float8 where they cannot be used.
    """
    if not dims.has_mesh:
        refuse_mixed_precision(training)
        return
    units = find_units(model, plan)
    experts = find_experts(model, plan) if dims.spreads_experts else []
    # One kind for all: FSDP2 does not go with replicas that know nothing of it.
    replicated_only = dims.dp_replicate > 1 and dims.fsdp == 1 and (not experts or dims.efsdp == 1)
    if experts:
        # Before the blocks that they are in, which then leave them out.
        wrap_experts = _get_wrapper(dims, training, shard_axis="efsdp", replicated_only=replicated_only)
        for part in experts:
            wrap_experts([part], reshards_after_forward(parallelism, pp=dims.pp, used_again_at_once=False))
    wrap = _get_wrapper(dims, training, shard_axis="fsdp", replicated_only=replicated_only)
    for position, unit in enumerate(units):
        is_last = position == len(units) - 1
        wrap(unit, reshards_after_forward(parallelism, pp=dims.pp, used_again_at_once=is_last))
    wrap([model], reshards_after_forward(parallelism, pp=dims.pp, used_again_at_once=True))
    for module in _fsdp_modules(model):
        # With a plain sum reduction and no division the sum is exact, gloo can do it, and so can NCCL inside a switch.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The host waits within each block with experts, and comes too late to ask for their weights, or for the next block's.
    prefetch = max(parallelism.fsdp_prefetch, 1 if experts and dims.efsdp > 1 else 0)
    if prefetch > 0:
        _set_prefetch(units, experts, prefetch)
    # Under a pipeline ranks would wait for their device, to make buffers on first use, while neighbours wait for them.
    if parallelism.fsdp_collectives != "nccl" and dims.fsdp > 1 and dims.pp == 1:
        _use_copy_engine(model, experts=experts, dims=dims, parallelism=parallelism, training=training)
    if training.gradient_wire_dtype == "float8":
        _send_float8_gradients(model, dims=dims, parallelism=parallelism, training=training)


def _send_float8_gradients(
    model: nn.Module, *, dims: ParallelDims, parallelism: ParallelismConfig, training: TrainingConfig
) -> None:
    if dims.fsdp == 1 and dims.dp_replicate > 1:
        raise ValueError(
            "training.gradient_wire_dtype = 'float8' is for sharded weights, and there are only replicas, whose gradients are "
            "all-reduced. Lower parallelism.data_parallel_replicate_degree, or leave it out"
        )
    if dims.fsdp == 1:
        logger.info("training.gradient_wire_dtype = float8 has no effect: there is no other rank to send gradients to")
        return
    device = torch.device(dims.mesh("fsdp").device_type)
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            f"training.gradient_wire_dtype = 'float8' needs GPUs of compute capability 8.9 or later, and this is "
            f"{torch.cuda.get_device_name()}. Leave it out"
        )
    wire = _choose_wire_dtype(model, parallelism=parallelism, training=training, device=device)
    apply_float8_gradients(_fsdp_modules(model), wire_dtype=wire, must_keep_apart=dims.tp > 1)
    logger.info("FSDP sends gradients in float8 and adds them up in float32")


def refuse_mixed_precision(training: TrainingConfig) -> None:
    """Check that nothing is asked for that takes a process group, where there is none.

    Raises:
        ValueError: mixed precision.
    """
    if training.mixed_precision_param != training.dtype:
        raise ValueError(
            f"training.mixed_precision_param = {training.mixed_precision_param!r} with training.dtype = "
            f"{training.dtype!r} needs a process group, of one process if need be (start with torchrun)"
        )


def _use_copy_engine(
    model: nn.Module,
    *,
    experts: list[nn.Module],
    dims: ParallelDims,
    parallelism: ParallelismConfig,
    training: TrainingConfig,
) -> None:
    mesh = dims.mesh("fsdp")
    device = torch.device(mesh.device_type)
    obstacle = agree_on_obstacle(find_obstacle(mesh.get_group()), device)
    if obstacle is not None:
        if parallelism.fsdp_collectives == "copy_engine":
            raise UserError(
                f"parallelism.fsdp_collectives = 'copy_engine' cannot be used: {obstacle}. Use 'nccl', or shard within hosts by "
                "parallelism.data_parallel_shard_degree and data_parallel_replicate_degree"
            )
        logger.info("FSDP communicates through the process group's backend: %s", obstacle, extra={"is_fallback": True})
        return
    wire = _choose_wire_dtype(model, parallelism=parallelism, training=training, device=device)
    apply_copy_engine(model, group=mesh.get_group(), wire_dtype=wire, others=experts)
    logger.info("FSDP communicates by copy engines, gradients as %s", wire)


def _choose_wire_dtype(
    model: nn.Module, *, parallelism: ParallelismConfig, training: TrainingConfig, device: torch.device
) -> torch.dtype:
    """Return in what dtype gradients lose nothing before they are summed."""
    accumulation = choose_accumulation(model, parallelism=parallelism, training=training, device=device)
    # Gradients that were added up over microbatches are fp32 already; any other is as exact in the dtype it was made in.
    wire = training.mixed_precision_param if accumulation == "sharded" else training.mixed_precision_reduce
    dtype: torch.dtype = getattr(torch, wire)
    return dtype


def _get_wrapper(
    dims: ParallelDims, training: TrainingConfig, *, shard_axis: Literal["fsdp", "efsdp"], replicated_only: bool
) -> Callable[[list[nn.Module], bool], None]:
    """Return the function that makes one communication group of some modules, given whether to reshard after forward."""
    hybrid = {"fsdp": "hsdp", "efsdp": "ehsdp"}[shard_axis]
    mesh = dims.mesh("dp_replicate" if replicated_only else hybrid if dims.dp_replicate > 1 else shard_axis)
    mixed_precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        # Activations take the dtype of the weights by themselves; a cast of all inputs would round what must stay fp32.
        cast_forward_inputs=False,
    )
    offload = (
        CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if training.enable_cpu_offload else OffloadPolicy()
    )

    def wrap(modules: list[nn.Module], reshard_after_forward: bool) -> None:
        target: Any = modules if len(modules) > 1 else modules[0]
        if replicated_only:
            replicate(target, mesh=mesh, mp_policy=mixed_precision, offload_policy=offload)
            return
        fully_shard(
            target,
            mesh=mesh,
            mp_policy=mixed_precision,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=get_expert_placement(modules[0], dims.efsdp) if shard_axis == "efsdp" else None,
        )

    return wrap


def get_expert_placement(experts: nn.Module, ranks: int) -> Callable[[nn.Parameter], Shard]:
    """Return along which dim to shard the weights of the experts that are together on one rank, (experts, rows, columns).

    Where there are too few experts to be dealt out evenly, the rows of each are: else some ranks would hold more, and those
    with less would receive padding.
    """
    shapes = [
        weight.to_local().shape if isinstance(weight, DTensor) else weight.shape for weight in experts.parameters()
    ]
    is_uneven = any(shape[0] % ranks for shape in shapes) and not any(shape[1] % ranks for shape in shapes)
    return lambda _: Shard(1 if is_uneven else 0)


def reshards_after_forward(parallelism: ParallelismConfig, *, pp: int, used_again_at_once: bool) -> bool:
    """Whether a unit frees its gathered weights after forward. Backward gathers them again, one unit at a time."""
    if parallelism.fsdp_reshard_after_forward == "default":
        # Under pipeline parallelism each microbatch would gather all weights again.
        return pp == 1 and not used_again_at_once
    return parallelism.fsdp_reshard_after_forward == "always"


def find_units(model: nn.Module, plan: ParallelPlan) -> list[list[nn.Module]]:
    """Return the modules of each unit, in the order of the forward pass."""
    modules = dict(model.named_modules())
    units: list[list[nn.Module]] = []
    for globs in plan.fsdp_units:
        matched = [[modules[name] for name in match_modules(glob, modules)] for glob in globs]
        if len(globs) == 1:
            units.extend([module] for module in matched[0])
        else:
            units.append([module for of_glob in matched for module in of_glob])
    return units


def find_experts(model: nn.Module, plan: ParallelPlan) -> list[nn.Module]:
    """Return what expert parallelism spreads over meshes of its own."""
    modules = dict(model.named_modules())
    return [modules[f"{name}.experts"] for name in match_modules(plan.experts, modules)] if plan.experts else []


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _set_prefetch(units: list[list[nn.Module]], experts: list[nn.Module], ahead: int) -> None:
    """Have each unit start gathering the weights of the next `ahead` units, in forward and in backward order.

    Experts come after the block that they are in, in both. What is gathered and then not used stays in memory until the backward pass
    ends. So neither asks for more when its turn may come again: experts run once more where their block is recomputed, and leave it to
    the block, whose turn in the forward pass comes once, to ask for both; a block that learns of the gradient of its balance loss
    after its experts are done asks, in the backward pass, only for them, as FSDP2 does by itself, once.
    """
    inside: dict[nn.Module, list[nn.Module]] = {}
    for unit in units:
        modules = {module for part in unit for module in part.modules()}
        inside[unit[0]] = [module for module in experts if module in modules]
    forward = [module for unit in units for module in (unit[0], *inside[unit[0]])]
    for position, module in enumerate(forward):
        if module in inside:
            end = position + 1 + len(inside[module]) + ahead
            module.set_modules_to_forward_prefetch(forward[position + 1 : end])  # type: ignore[operator]
    backward = [module for unit in reversed(units) for module in (unit[0], *inside[unit[0]])]
    for position, module in enumerate(backward):
        upcoming = backward[position + 1 : position + 1 + ahead]
        if upcoming and not inside.get(module):
            module.set_modules_to_backward_prefetch(upcoming)  # type: ignore[operator]


def choose_accumulation(
    model: nn.Module,
    *,
    parallelism: ParallelismConfig,
    training: TrainingConfig,
    device: torch.device,
    device_bytes: int | None = None,
) -> Accumulation:
    """Return how gradients accumulate over microbatches: `parallelism.fsdp_accumulation` with `auto` decided.

    device_bytes: memory of the device, where it is another than the one that is here. Whole gradients cost 4 bytes a parameter of `model` and save all reductions but the last. FSDP2 holds them in the dtype
    of the reduction, so that `auto` refuses a bf16 one: sums over many microbatches would lose bits there.
    """
    if parallelism.data_parallel_implementation == "simple_fsdp":
        return "sharded"
    reduces_in_fp32 = training.mixed_precision_reduce == "float32"
    if parallelism.fsdp_accumulation != "auto":
        if parallelism.fsdp_accumulation == "unsharded" and not reduces_in_fp32:
            logger.warning(
                "parallelism.fsdp_accumulation = 'unsharded' adds microbatches up in the dtype of the reduction: "
                "training.mixed_precision_reduce = 'bfloat16' loses bits there",
                extra={"same_on_all_ranks": True},
            )
        return parallelism.fsdp_accumulation
    if not reduces_in_fp32:
        return "sharded"
    if device_bytes is None:
        if device.type != "cuda":
            return "unsharded"
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    whole_bytes = 4 * sum(_count_gathered(p) for p in model.parameters())
    return "unsharded" if whole_bytes <= _WHOLE_GRADIENTS_SHARE * device_bytes else "sharded"


def _count_gathered(parameter: nn.Parameter) -> int:
    """Return the elements of a parameter as FSDP gathers it: of a matrix that tensor parallelism cuts, or of experts, this rank's."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names
    assert names is not None, "`ParallelDims` names all axes"
    parts = [
        mesh.size(axis)
        for axis, (name, placement) in enumerate(zip(names, parameter.placements, strict=True))
        if name in ("tp", "ep", "etp") and not placement.is_replicate()
    ]
    return parameter.numel() // prod(parts)


def set_gradient_sync(
    model: nn.Module,
    is_last_microbatch: bool,
    *,
    accumulation: Accumulation = "sharded",
    reshard_after_forward: str = "default",
) -> None:
    """Say before a microbatch's forward whether it is the step's last, so that reductions wait for it where they can.

    sharded: every microbatch is reduce-scattered, and all-reduced over replicas only at the last.
    unsharded: nothing is reduced before the last; with `reshard_after_forward = "never"` weights, too, stay gathered from the
    first microbatch to the last. `reshard_after_forward` is `parallelism.fsdp_reshard_after_forward`.
    """
    if not isinstance(model, FSDPModule):
        return
    # Not `set_is_last_backward`: it would leave FSDP2 the past microbatch's order of units, so that the first unit's
    # backward gathers that microbatch's last unit again, and the host waits for it before the optimizer (2.11 to 2.13).
    if accumulation == "sharded":
        model.set_requires_all_reduce(is_last_microbatch)
    else:
        model.set_requires_gradient_sync(is_last_microbatch)
        model.set_reshard_after_backward(is_last_microbatch or reshard_after_forward != "never")


def reshard(model: nn.Module) -> None:
    """Free all gathered weights, so that `model.parameters()` are again those that the optimizer and checkpoints know.

    Call it after forward passes without a backward (validation): units that stay gathered after forward otherwise show
    their gathered copies. Does nothing to a model that is not data parallel.
    """
    for module in _fsdp_modules(model):
        module.reshard()
