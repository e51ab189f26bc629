"""Data parallelism: sharded (FSDP2), replicated (DDP), and both (HSDP), by one mechanism.

Master weights and optimizer states have `training.dtype`; forward and backward run in `training.mixed_precision_param`.
Gradients are summed over ranks, never averaged: the trainer divides the loss by the global number of tokens.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn as nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from models.plan import ParallelPlan, match_modules
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.copy_engine import agree_on_obstacle, apply_copy_engine, find_obstacle
from trainer.distributed.parallel_dims import ParallelDims

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
        ValueError: a glob of the plan matches nothing, mixed precision is asked for without a process group, or copy engines
            where they cannot be used.
    """
    if not dims.has_mesh:
        if training.mixed_precision_param != training.dtype:
            raise ValueError(
                f"training.mixed_precision_param = {training.mixed_precision_param!r} with training.dtype = "
                f"{training.dtype!r} needs a process group, of one process if need be (start with torchrun)"
            )
        return
    wrap = _get_wrapper(dims, training)
    units = _find_units(model, plan)
    for position, unit in enumerate(units):
        is_last = position == len(units) - 1
        wrap(unit, _reshards_after_forward(parallelism, pp=dims.pp, used_again_at_once=is_last))
    wrap([model], _reshards_after_forward(parallelism, pp=dims.pp, used_again_at_once=True))
    for module in _fsdp_modules(model):
        # With a plain sum reduction and no division the sum is exact, gloo can do it, and so can NCCL inside a switch.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if parallelism.fsdp_prefetch > 0:
        _set_prefetch([unit[0] for unit in units], parallelism.fsdp_prefetch)
    # Under a pipeline ranks would wait for their device, to make buffers on first use, while neighbours wait for them.
    if parallelism.fsdp_collectives != "nccl" and dims.fsdp > 1 and dims.pp == 1:
        _use_copy_engine(model, dims=dims, parallelism=parallelism, training=training)


def _use_copy_engine(
    model: nn.Module, *, dims: ParallelDims, parallelism: ParallelismConfig, training: TrainingConfig
) -> None:
    mesh = dims.mesh("fsdp")
    device = torch.device(mesh.device_type)
    obstacle = agree_on_obstacle(find_obstacle(mesh.get_group()), device)
    if obstacle is not None:
        if parallelism.fsdp_collectives == "copy_engine":
            raise ValueError(
                f"parallelism.fsdp_collectives = 'copy_engine' cannot be used: {obstacle}. Use 'nccl', or shard within hosts by "
                "parallelism.data_parallel_shard_degree and data_parallel_replicate_degree"
            )
        logger.info("FSDP communicates through the process group's backend: %s", obstacle)
        return
    accumulation = choose_accumulation(model, parallelism=parallelism, training=training, device=device)
    # Gradients that were added up over microbatches are fp32 already; any other is as exact in the dtype it was made in.
    wire = training.mixed_precision_param if accumulation == "sharded" else training.mixed_precision_reduce
    apply_copy_engine(model, group=mesh.get_group(), wire_dtype=getattr(torch, wire))
    logger.info("FSDP communicates by copy engines, gradients as %s", wire)


def _get_wrapper(dims: ParallelDims, training: TrainingConfig) -> Callable[[list[nn.Module], bool], None]:
    """Return the function that makes one communication group of some modules, given whether to reshard after forward."""
    replicated_only = dims.dp_replicate > 1 and dims.fsdp == 1
    mesh = dims.mesh("dp_replicate" if replicated_only else "hsdp" if dims.dp_replicate > 1 else "fsdp")
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
        )

    return wrap


def _reshards_after_forward(parallelism: ParallelismConfig, *, pp: int, used_again_at_once: bool) -> bool:
    """Whether a unit frees its gathered weights after forward. Backward gathers them again, one unit at a time."""
    if parallelism.fsdp_reshard_after_forward == "default":
        # Under pipeline parallelism each microbatch would gather all weights again.
        return pp == 1 and not used_again_at_once
    return parallelism.fsdp_reshard_after_forward == "always"


def _find_units(model: nn.Module, plan: ParallelPlan) -> list[list[nn.Module]]:
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


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _set_prefetch(units: list[nn.Module], ahead: int) -> None:
    """Have each unit start gathering the weights of the next `ahead` units, in forward and in backward order."""
    for order, method in (
        (units, FSDPModule.set_modules_to_forward_prefetch),
        (units[::-1], FSDPModule.set_modules_to_backward_prefetch),
    ):
        for position, unit in enumerate(order):
            upcoming = order[position + 1 : position + 1 + ahead]
            if upcoming:
                method(unit, upcoming)  # type: ignore[arg-type]  # all of them are FSDPModule by now


def choose_accumulation(
    model: nn.Module, *, parallelism: ParallelismConfig, training: TrainingConfig, device: torch.device
) -> Accumulation:
    """Return how gradients accumulate over microbatches: `parallelism.fsdp_accumulation` with `auto` decided.

    Whole gradients cost 4 bytes a parameter of `model` and save all reductions but the last. FSDP2 holds them in the dtype
    of the reduction, so that `auto` refuses a bf16 one: sums over many microbatches would lose bits there.
    """
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
    if device.type != "cuda":
        return "unsharded"
    # Under tensor parallelism the whole of a gradient is this rank's part of the matrix.
    whole_bytes = 4 * sum(p.numel() for p in model.parameters()) / parallelism.tensor_parallel_degree
    device_bytes = torch.cuda.get_device_properties(device).total_memory
    return "unsharded" if whole_bytes <= _WHOLE_GRADIENTS_SHARE * device_bytes else "sharded"


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
