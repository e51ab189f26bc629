"""Activation checkpointing: recompute in backward what forward need not keep (Chen et al., arXiv 1604.06174).

A block is checkpointed by replacing its `forward`, so that module and parameter names stay as they are, in checkpoints, in
optimizer patterns and in this program's own globs.

The choice of experts is kept in every mode (but under `activation_checkpoint.debug`). Made again from scores that a fused kernel,
or one chosen anew, rounds in another way, it could differ: gradients would be those of other experts, and exchanges between
ranks of other sizes.
"""

import functools
import logging
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.common.grouped_mm import GROUPED_MM
from models.common.router import Router
from models.plan import ParallelPlan, match_modules
from trainer.config.schema_parallel import ActivationCheckpointConfig
from trainer.distributed.expert_dispatch import COPY_TO_HOST
from trainer.distributed.flop_formulas import register_flop_formulas
from trainer.distributed.sequence_collectives import EXCHANGE_HEADS, SUM_COUNTS
from trainer.distributed.sharded_attention import OPERATION as SHARDED_ATTENTION

logger = logging.getLogger(__name__)

# Matmuls, of which every second is kept: they cost the most time to recompute, and the most memory to keep. With the way to
# the matrix from their second argument, transposed where it goes in as it is stored: (..., in, out).
_MATMULS: dict[Any, Callable[[torch.Size], tuple[int, ...]]] = {
    torch.ops.aten.mm.default: tuple,
    torch.ops.aten._scaled_mm.default: tuple,
    torch.ops.aten._grouped_mm.default: tuple,
    torch.ops.aten._scaled_grouped_mm.default: tuple,
    GROUPED_MM: lambda shape: _transpose(shape),
}

_EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default

# What decides which experts work on which token, and numbers that all ranks had to meet for, or the host had to wait for.
_CHOICES = {torch.ops.aten.topk.default, SUM_COUNTS, COPY_TO_HOST}

# Kept always: attention and communication cost much time for the size of what they return. The maximum is that of float8
# scaling: one number that cost a pass over a tensor.
_KEPT = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten.max.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    _EXCHANGE,
    flex_attention,
    SHARDED_ATTENTION,
    EXCHANGE_HEADS,  # but not the gathered keys and values, which are larger by the degree
    *_CHOICES,
}

_SMALLEST_BUDGET = 1e-9

Contexts = Callable[[], tuple]
"""Makes the contexts of one forward pass and of its recomputation."""


def apply_activation_checkpoint(
    model: nn.Module,
    *,
    plan: ParallelPlan,
    section: ActivationCheckpointConfig,
    compiles_blocks: bool = False,
    spreads_experts: bool = False,
    dump_folder: str | Path | None = None,
) -> None:
    """Checkpoint the plan's blocks in place, as the section says. Before compilation and sharding.

    compiles_blocks: whether the blocks will be compiled. spreads_experts: whether experts are on several ranks: by operation, the
    pieces of their blocks are checkpointed one by one, and what travels between ranks is kept. dump_folder: where the
    chart of the memory budget goes.

    Raises:
        ValueError: an option that is neither `op` nor a positive number, or a memory budget without compilation.
    """
    if section.mode == "none":
        return
    if section.mode == "memory_budget":
        _set_memory_budget(section, compiles_blocks, dump_folder)
        _keep_choices(model, section)
        return
    modules = dict(model.named_modules())
    names = match_modules(plan.blocks, modules)
    every, by_operation = 1, False
    if section.mode == "selective":
        by_operation = section.selective_ac_option == "op"
        every = 1 if by_operation else _parse_every(section.selective_ac_option)
    checkpointed = [name for place, name in enumerate(names) if (_get_number(name, place) + 1) % every == 0]
    # Selection sees every operation, those of FSDP's hooks around the experts too, which differ from pass to pass.
    pieces = plan.list_pieces(modules, spreads_experts=spreads_experts and by_operation)
    if compiles_blocks and spreads_experts and not by_operation:
        _keep_memory_of_choices()
    for name in checkpointed:
        block = modules[name]
        contexts: Contexts | None = None
        if by_operation:
            contexts = _get_selective_contexts(block, section)
        elif _has_router(block) and not section.debug:  # torch's report has contexts of its own
            contexts = _build_contexts(CheckpointPolicy.PREFER_RECOMPUTE)
        replace_methods(block, pieces[name], functools.partial(_checkpointed, section=section, contexts=contexts))
    logger.debug("activation checkpointing of %d of %d blocks", len(checkpointed), len(names))


def replace_methods(block: nn.Module, paths: Iterable[str], change: Callable[[Callable], Callable]) -> None:
    """Replace methods of a block and of modules in it, by path (`forward`, `moe.route`), with what `change` makes of them."""
    for path in paths:
        owner_name, _, method = path.rpartition(".")
        owner = block.get_submodule(owner_name)
        setattr(owner, method, change(getattr(owner, method)))


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
    forward: Callable[..., Any], *, section: ActivationCheckpointConfig, contexts: Contexts | None
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

    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    # The compiler keeps graphs by code object. Of one code it does not see (2.11) which method it calls: after a method's graph
    # was made, another method of the same module would run it.
    method = getattr(forward, "__func__", forward)
    checkpointed_forward.__code__ = _codes.setdefault(method, checkpointed_forward.__code__.replace())
    return functools.wraps(forward)(checkpointed_forward)


_codes: dict[Callable[..., Any], types.CodeType] = {}


def _has_router(block: nn.Module) -> bool:
    return any(isinstance(module, Router) for module in block.modules())


def _build_contexts(otherwise: CheckpointPolicy) -> Contexts:
    """Return the contexts that keep choices. otherwise: what becomes of all else."""

    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_of_counts = op is _EXCHANGE and not args[0].is_floating_point()
        return CheckpointPolicy.MUST_SAVE if is_of_counts or op in _CHOICES else otherwise

    return functools.partial(create_selective_checkpoint_contexts, decide)


def _keep_memory_of_choices() -> None:
    """Have inductor write to each piece of memory once. Where experts are on several ranks, blocks are recomputed outside of
    graphs, and the choice, an operation that a graph of inductor's calls, is kept by its memory: later kernels must leave that alone.
    """
    import torch._inductor.config as inductor_config

    inductor_config.allow_buffer_reuse = False
    inductor_config.inplace_buffers = False


def _keep_choices(model: nn.Module, section: ActivationCheckpointConfig) -> None:
    """Forbid the compiler to make choices again, whatever else it recomputes."""
    contexts = _build_contexts(CheckpointPolicy.PREFER_SAVE)
    for module in model.modules():
        if isinstance(module, Router):
            replace_methods(module, ["forward"], functools.partial(_checkpointed, section=section, contexts=contexts))


def _get_selective_contexts(block: nn.Module, section: ActivationCheckpointConfig) -> Contexts:
    """Return the contexts of one forward and its recomputation: which operations' results to keep."""
    recomputed_shapes = {
        _transpose(_get_local_shape(parameter))
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1 and any(part in name for part in section.per_op_sac_force_recompute_mm_shapes_by_fqns)
    }

    def get_contexts() -> tuple:
        # Forward and recomputation run the same operations in the same order, so both count alike.
        matmuls = {False: 0, True: 0}

        def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if op in _MATMULS and _MATMULS[op](args[1].shape) not in recomputed_shapes:
                matmuls[ctx.is_recompute] += 1
                if matmuls[ctx.is_recompute] % 2 == 1:
                    return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(decide)

    return get_contexts


def _transpose(shape: torch.Size) -> tuple[int, ...]:
    *groups, rows, columns = shape
    return *groups, columns, rows


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

    register_flop_formulas()
    # Of 0 the compiler would make an exception, and recompute even what it must not.
    functorch_config.activation_memory_budget = max(section.memory_budget, _SMALLEST_BUDGET)
    if section.visualize_memory_budget_pareto:
        folder = Path(dump_folder or ".") / "memory_budget_pareto"
        folder.mkdir(parents=True, exist_ok=True)
        functorch_config.memory_budget_pareto_dir = str(folder)
        functorch_config.visualize_memory_budget_pareto = True
