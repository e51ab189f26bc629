"""Activation checkpointing: recompute in backward what forward need not keep (Chen et al., arXiv 1604.06174).

A block is checkpointed by replacing its `forward`, so that module and parameter names stay as they are, in checkpoints, in
optimizer patterns and in this program's own globs.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.plan import ParallelPlan, match_modules
from trainer.config.schema_parallel import ActivationCheckpointConfig
from trainer.distributed.sequence_collectives import EXCHANGE_HEADS
from trainer.distributed.sharded_attention import OPERATION as SHARDED_ATTENTION

logger = logging.getLogger(__name__)

# Matmuls, of which every second is kept: they cost the most time to recompute, and the most memory to keep.
_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default}

# Kept always: attention and communication cost much time for the size of what they return. The maximum is that of float8
# scaling: one number that cost a pass over a tensor. The choice of experts, made again, could come out another way.
_KEPT = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten.max.default,
    torch.ops.aten.topk.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    flex_attention,
    SHARDED_ATTENTION,
    EXCHANGE_HEADS,  # but not the gathered keys and values, which are larger by the degree
}


def apply_activation_checkpoint(
    model: nn.Module,
    *,
    plan: ParallelPlan,
    section: ActivationCheckpointConfig,
    compiles_blocks: bool = False,
    dump_folder: str | Path | None = None,
) -> None:
    """Checkpoint the plan's blocks in place, as the section says. Before compilation and sharding.

    compiles_blocks: whether the blocks will be compiled. dump_folder: where the chart of the memory budget goes.

    Raises:
        ValueError: an option that is neither `op` nor a positive number, or a memory budget without compilation.
    """
    if section.mode == "none":
        return
    if section.mode == "memory_budget":
        _set_memory_budget(section, compiles_blocks, dump_folder)
        return
    modules = dict(model.named_modules())
    names = match_modules(plan.blocks, modules)
    every, by_operation = 1, False
    if section.mode == "selective":
        by_operation = section.selective_ac_option == "op"
        every = 1 if by_operation else _parse_every(section.selective_ac_option)
    checkpointed = [name for place, name in enumerate(names) if (_get_number(name, place) + 1) % every == 0]
    for name in checkpointed:
        block = modules[name]
        contexts = _get_selective_contexts(block, section) if by_operation else None
        block.forward = _checkpointed(block.forward, section, contexts)
    logger.debug("activation checkpointing of %d of %d blocks", len(checkpointed), len(names))


def _get_number(name: str, place: int) -> int:
    """Return the number of a block in the whole model, of which a pipeline's rank has a part: that in its name, if any."""
    last = name.rpartition(".")[2]
    return int(last) if last.isdecimal() else place


def _parse_every(option: str) -> int:
    if not option.isdecimal() or int(option) < 1:
        raise ValueError(
            f"activation_checkpoint.selective_ac_option = {option!r} must be 'op', to choose by operation, or a number "
            "n of 1 or more, to recompute every nth block"
        )
    return int(option)


def _checkpointed(
    forward: Callable[..., Any], section: ActivationCheckpointConfig, contexts: Callable[[], tuple] | None
) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": section.preserve_rng_state,
        "determinism_check": section.determinism_check,
        "debug": section.debug,
        "early_stop": section.early_stop,
    }
    if contexts is not None:
        options["context_fn"] = contexts

    @functools.wraps(forward)
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return checkpointed_forward


def _get_selective_contexts(block: nn.Module, section: ActivationCheckpointConfig) -> Callable[[], tuple]:
    """Return the contexts of one forward and its recomputation: which operations' results to keep."""
    recomputed_shapes = {
        tuple(reversed(_get_local_shape(module.weight)))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and any(part in name for part in section.per_op_sac_force_recompute_mm_shapes_by_fqns)
    }

    def get_contexts() -> tuple:
        # Forward and recomputation run the same operations in the same order, so both count alike.
        matmuls = {False: 0, True: 0}

        def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if op in _MATMULS and tuple(args[1].shape) not in recomputed_shapes:
                matmuls[ctx.is_recompute] += 1
                if matmuls[ctx.is_recompute] % 2 == 1:
                    return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(decide)

    return get_contexts


def _get_local_shape(weight: torch.Tensor) -> torch.Size:
    """Return the shape that a product sees: that of this rank's part under tensor parallelism."""
    return weight.to_local().shape if isinstance(weight, DTensor) else weight.shape


def _set_memory_budget(
    section: ActivationCheckpointConfig, compiles_blocks: bool, dump_folder: str | Path | None
) -> None:
    """Have the compiler choose what to recompute, for the share `memory_budget` of the memory it would need (0 to 1)."""
    if not compiles_blocks:
        raise ValueError(
            "activation_checkpoint.mode = 'memory_budget' is the compiler's choice, so that it needs compile.enable "
            "with 'model' in compile.components; without it use 'selective' or 'full'"
        )
    if not 0.0 <= section.memory_budget <= 1.0:
        raise ValueError(f"activation_checkpoint.memory_budget = {section.memory_budget} must lie between 0 and 1")
    import torch._functorch.config as functorch_config

    functorch_config.activation_memory_budget = section.memory_budget
    if section.visualize_memory_budget_pareto:
        folder = Path(dump_folder or ".") / "memory_budget_pareto"
        folder.mkdir(parents=True, exist_ok=True)
        functorch_config.memory_budget_pareto_dir = str(folder)
        functorch_config.visualize_memory_budget_pareto = True
