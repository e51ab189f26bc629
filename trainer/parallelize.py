"""The one order in which techniques are applied to a model. Each is one call, and lives in a file of its own."""

import torch.nn as nn

from models.plan import ParallelPlan
from trainer.config.schema import JobConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.compile import apply_compile, compiles_model
from trainer.distributed.compile_backends import build_weight_backend
from trainer.distributed.context_parallel import apply_context_parallel, require_positions
from trainer.distributed.expert_parallel import apply_expert_parallel
from trainer.distributed.fsdp import apply_data_parallel
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.pipeline_stages import Stage, separate_copies, split_into_stages
from trainer.distributed.simple_fsdp import apply_simple_fsdp, check_even_shards
from trainer.distributed.tensor_parallel import apply_tensor_parallel
from trainer.low_precision.convert import apply_low_precision, count_tokens
from trainer.low_precision.float8_tensor_parallel import FLOAT8_STYLES


def parallelize(model: nn.Module, *, plan: ParallelPlan, dims: ParallelDims, config: JobConfig) -> list[Stage]:
    """Spread `model`, still on the meta device, over the meshes of `dims`, in place. Return this rank's pipeline stages, if any.

    Afterwards `trainer.distributed.weight_init.init_weights` gives it memory and values.

    Raises:
        ValueError: settings that do not fit the model or each other, or a plan that does not fit the model.
    """
    names = [name for name, _ in model.named_modules()]
    plan.check(names)
    apply_low_precision(
        model,
        converters=config.model.converters,
        quantize=config.quantize,
        plan=plan,
        dims=dims,
        tokens=count_tokens(config.training, config.parallelism),
    )
    spreads_experts = _build_expert_mesh(plan, dims)
    stages: list[Stage] = []
    if dims.pp > 1:
        rank = dims.mesh("pp").get_local_rank()
        stages = split_into_stages(model, plan=plan, parallelism=config.parallelism, rank=rank)
        plan = plan.restrict_to([name for name, _ in model.named_modules()])
    compiles_blocks = compiles_model(config.compile)
    if _is_simple(config):
        plan = plan.with_weights_in_pieces()
    if spreads_experts:
        apply_expert_parallel(model, plan=plan, dims=dims, backend=config.parallelism.expert_parallel_comm_backend)
    if dims.tp > 1:
        apply_tensor_parallel(
            model,
            plan=plan,
            mesh=dims.mesh("tp"),
            compiles_blocks=compiles_blocks,
            async_tp=config.parallelism.enable_async_tensor_parallel,
            localizes=not _is_simple(config),
            styles=FLOAT8_STYLES,
        )
    separate_copies(model, stages)
    if dims.cp > 1:
        apply_context_parallel(model, plan=plan, mesh=dims.mesh("cp"), parallelism=config.parallelism)
        for stage in stages:
            require_positions(stage.module)
    # Recomputation becomes part of the compiled graph, and both run inside FSDP's hooks, on gathered weights.
    apply_activation_checkpoint(
        model,
        plan=plan,
        section=config.activation_checkpoint,
        compiles_blocks=compiles_blocks,
        spreads_experts=spreads_experts,
        dump_folder=config.job.dump_folder,
    )
    parts = [stage.module for stage in stages] or [model]
    for part in [model] if config.compile.scope == "block" else parts:
        _compile(part, plan, dims, config, spreads_experts)
    for part in parts:
        _spread_weights(part, plan.restrict_to([name for name, _ in part.named_modules()]), dims, config)
    return stages


def _build_expert_mesh(plan: ParallelPlan, dims: ParallelDims) -> bool:
    """Build the mesh of experts that are on several ranks. Return whether there are such."""
    if dims.ep > 1 and not plan.experts:
        raise ValueError(f"parallelism.expert_parallel_degree = {dims.ep}: this model's plan names no experts. Use 1")
    spreads_experts = bool(plan.experts) and dims.spreads_experts
    if spreads_experts:
        dims.build_expert_mesh()
    return spreads_experts


def _compile(part: nn.Module, plan: ParallelPlan, dims: ParallelDims, config: JobConfig, spreads_experts: bool) -> None:
    """Compile a part of the model. What SimpleFSDP will gather in it is known by then, but not yet there."""
    plan = plan.restrict_to([name for name, _ in part.named_modules()])
    backend = None
    if _is_simple(config) and compiles_model(config.compile):
        backend = build_weight_backend(
            part, plan=plan, dims=dims, parallelism=config.parallelism, section=config.compile
        )
    apply_compile(part, plan=plan, section=config.compile, spreads_experts=spreads_experts, backend=backend)


def _spread_weights(part: nn.Module, plan: ParallelPlan, dims: ParallelDims, config: JobConfig) -> None:
    """Apply data parallelism to a part of the model."""
    if not _is_simple(config):
        apply_data_parallel(part, plan=plan, dims=dims, parallelism=config.parallelism, training=config.training)
        return
    apply_simple_fsdp(part, plan=plan, dims=dims, training=config.training)
    if compiles_model(config.compile) and config.compile.get_backend()[1] == "auto_bucketing":
        check_even_shards(part)


def _is_simple(config: JobConfig) -> bool:
    return config.parallelism.data_parallel_implementation == "simple_fsdp"
