"""A model's conversion to low precision, and what keeps it from that."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn as nn

from models.plan import ParallelPlan
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_quantize import (
    FLOAT8_CONVERTERS,
    FLOAT8_EXPERTS_CONVERTER,
    Float8LinearConfig,
    QuantizeConfig,
)
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.low_precision.float8_experts import apply_float8_experts, check_expert_device, plan_float8_experts
from trainer.low_precision.float8_feed_forward import fuse_feed_forwards
from trainer.low_precision.float8_linear import Float8Linear, become_float8
from trainer.low_precision.layer_choice import SECTION, Conversion, get_styles, plan_float8
from trainer.low_precision.recipe import build_recipe
from trainer.low_precision.transformer_engine import apply_transformer_engine, import_transformer_engine

logger = logging.getLogger(__name__)


def apply_low_precision(
    model: nn.Module,
    *,
    converters: Sequence[str],
    quantize: QuantizeConfig,
    plan: ParallelPlan,
    dims: ParallelDims,
    tokens: int = 0,
) -> None:
    """Convert `model`, on the meta device, in place: all of it, before it is cut for any parallelism. Log what became of it.

    tokens: see `count_tokens`.

    Raises:
        ValueError: see `check_low_precision`.
    """
    converts_experts, section = FLOAT8_EXPERTS_CONVERTER in converters, quantize.linear.float8
    converts_linears = not FLOAT8_CONVERTERS.isdisjoint(converters)
    if converts_experts or (converts_linears and build_recipe(section).is_rowwise):
        # Else compiled norms hand scales by rows values that are not rounded to bf16: the loss stalls, and is NaN after some dozen
        # steps (pytorch issue 150859).
        torch._inductor.config.emulate_precision_casts = True
    if converts_experts:
        for line in apply_float8_experts(model, section=quantize.grouped_mm.float8, degree=dims.etp):
            logger.info("float8, rowwise: %s", line)
    if not converts_linears:
        return
    group = dims.stage_group() if section.backend == "te" else None
    conversion = apply_float8(model, section=section, plan=plan, tp_degree=dims.tp, tokens=tokens, group=group)
    if section.enable_fsdp_float8_all_gather:
        check_even_shards(conversion.parts, dims.fsdp)
    for line in conversion.describe():
        logger.info("float8, %s: %s", section.recipe_name or "tensorwise", line)


def check_low_precision(
    model: nn.Module,
    *,
    converters: Sequence[str],
    quantize: QuantizeConfig,
    plan: ParallelPlan,
    dims: ParallelDims,
    tokens: int = 0,
) -> None:
    """Check that `model`, which stays as it is, can be converted on this device.

    Raises:
        ValueError: see `plan_float8`, `plan_float8_experts` and `check_device`, or weights that FSDP cannot gather in float8.
    """
    if FLOAT8_EXPERTS_CONVERTER in converters:
        check_expert_device(quantize.grouped_mm.float8)
        plan_float8_experts(model, section=quantize.grouped_mm.float8, degree=dims.etp)
    if FLOAT8_CONVERTERS.isdisjoint(converters):
        return
    section = quantize.linear.float8
    check_device(section)
    parts = plan_float8(model, section=section, plan=plan, tp_degree=dims.tp, tokens=tokens).parts
    if section.enable_fsdp_float8_all_gather:
        check_even_shards(parts, dims.fsdp)


def count_tokens(training: TrainingConfig, parallelism: ParallelismConfig) -> int:
    """Return how many tokens a layer sees in one forward pass: ranks of tensor parallelism bring theirs together."""
    in_pipeline = parallelism.pipeline_parallel_degree > 1
    rows = parallelism.pipeline_parallel_microbatch_size if in_pipeline else training.local_batch_size
    return rows * training.seq_len // parallelism.context_parallel_degree


def apply_float8(
    model: nn.Module,
    *,
    section: Float8LinearConfig,
    plan: ParallelPlan,
    tp_degree: int = 1,
    tokens: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Conversion:
    """Have the linear layers of `model` that `plan_float8` names compute in float8, in place. Before anything else is applied to it.

    Names, shapes and dtypes of parameters stay, so that checkpoints fit with and without. group: see
    `apply_transformer_engine`.

    Raises:
        ValueError: see `plan_float8` and `check_device`.
    """
    check_device(section)
    conversion = plan_float8(model, section=section, plan=plan, tp_degree=tp_degree, tokens=tokens)
    if section.backend == "te":
        apply_transformer_engine(model, conversion.converted, section=section, group=group)
        return conversion
    recipe, modules = build_recipe(section), dict(model.named_modules())
    styles = get_styles(modules, plan.tp)
    for name in conversion.converted:
        module, parent_name = modules[name], name.rpartition(".")[0]
        assert isinstance(module, nn.Linear)
        become_float8(module, recipe)
        assert isinstance(module, Float8Linear)
        if styles.get(name, "").startswith("colwise") and styles.get(parent_name) == "gather_seq":
            module.input_group = parent_name  # each gets what the parent gathered
    if recipe.fuses_feed_forward:
        fuse_feed_forwards(model)
    return conversion


def check_even_shards(parts: Mapping[str, tuple[int, int]], degree: int) -> None:
    """Check that FSDP can cut weights into equal parts, as gathering them in float8 needs.

    parts: features in and out, by name, after tensor parallelism.

    Raises:
        ValueError: there is one that it cannot.
    """
    for name, (_, rows) in parts.items():
        if rows % degree:
            raise ValueError(
                f"{SECTION}.enable_fsdp_float8_all_gather = true needs shards of equal size, and FSDP cannot cut the {rows} rows of "
                f"{name}.weight into {degree}. Shard over another number of ranks (parallelism.data_parallel_shard_degree times "
                f"context_parallel_degree), add {name!r} to {SECTION}.filter_fqns, or set enable_fsdp_float8_all_gather = false"
            )


def check_device(section: Float8LinearConfig) -> None:
    """Check that the device of this process can multiply in float8.

    Raises:
        ValueError: it cannot.
    """
    if section.emulate:
        return
    recipe = build_recipe(section)
    if section.backend == "te":
        import_transformer_engine()
    if not torch.cuda.is_available():
        if section.backend == "te":
            raise ValueError(f"{SECTION}.backend = 'te' needs a GPU, and this process has none. Use 'native'")
        if recipe.is_rowwise and torch.__version__ < "2.13":
            raise ValueError(
                f"{SECTION}.recipe_name = {section.recipe_name!r}: torch {torch.__version__} has no such product on the CPU, "
                f"torch 2.13 has. Set {SECTION}.emulate = true"
            )
        return
    have, needed = torch.cuda.get_device_capability(), (9, 0) if recipe.is_rowwise else (8, 9)
    if have < needed:
        raise ValueError(
            f"{SECTION}.recipe_name = {section.recipe_name or 'tensorwise'!r} needs a GPU of compute capability {needed[0]}.{needed[1]} "
            f"or more, and {torch.cuda.get_device_name()} has {have[0]}.{have[1]}. Set {SECTION}.emulate = true to try it slowly, or take "
            f"{SECTION} out of model.converters"
        )
