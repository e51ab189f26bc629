"""Which linear layers of a model compute in float8."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch._inductor.config
import torch.nn as nn

from models.common.output import Output
from models.common.router import Router
from models.plan import ParallelPlan, match_modules
from trainer.config.schema_quantize import FLOAT8_ALIGNMENT, FLOAT8_CONVERTERS, Float8LinearConfig, QuantizeConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.low_precision.float8_linear import Float8Linear, become_float8
from trainer.low_precision.recipe import Recipe, build_recipe

logger = logging.getLogger(__name__)

SECTION = "quantize.linear.float8"
AUTO_FILTER = "auto_filter_small_kn"
"""In `filter_fqns`: leave out what is too small to gain."""


@dataclass
class Conversion:
    """What became of each linear layer, by name."""

    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Features in and out, of every one."""
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The same on one rank of tensor parallelism, of those in float8."""
    kept: dict[str, str] = field(default_factory=dict)
    """Why some stay in high precision."""

    @property
    def converted(self) -> list[str]:
        """Names of those in float8."""
        return [name for name in self.shapes if name not in self.kept]

    def describe(self) -> Iterator[str]:
        """Yield a line for each kind of layer: those of all blocks are one."""
        kinds: dict[tuple[str, tuple[int, int], str], int] = {}
        for name, shape in self.shapes.items():
            fate = f"stays in high precision: {self.kept[name]}" if name in self.kept else "converted"
            kind = (re.sub(r"\.\d+\.", ".*.", name), shape, fate)
            kinds[kind] = kinds.get(kind, 0) + 1
        for (name, (n_in, n_out), fate), count in kinds.items():
            times = f"{count} x " if count > 1 else ""
            yield f"{times}{name} ({n_in} -> {n_out}): {fate}"


def apply_low_precision(
    model: nn.Module, *, converters: Sequence[str], quantize: QuantizeConfig, plan: ParallelPlan, dims: ParallelDims
) -> None:
    """Convert `model`, on the meta device, in place: all of it, before it is cut for any parallelism. Log what became of it.

    Raises:
        ValueError: see `check_low_precision`.
    """
    if FLOAT8_CONVERTERS.isdisjoint(converters):
        return
    section = quantize.linear.float8
    if build_recipe(section).is_rowwise:
        # Else compiled norms hand scales by rows values that are not rounded to bf16: the loss stalls, and is NaN after some dozen
        # steps (pytorch issue 150859).
        torch._inductor.config.emulate_precision_casts = True
    conversion = apply_float8(model, section=section, tp=plan.tp, tp_degree=dims.tp)
    if section.enable_fsdp_float8_all_gather:
        check_even_shards(conversion.parts, dims.fsdp)
    for line in conversion.describe():
        logger.info("float8, %s: %s", section.recipe_name or "tensorwise", line)


def check_low_precision(
    model: nn.Module, *, converters: Sequence[str], quantize: QuantizeConfig, plan: ParallelPlan, dims: ParallelDims
) -> None:
    """Check that `model`, which stays as it is, can be converted on this device.

    Raises:
        ValueError: see `plan_float8` and `check_device`, or weights that FSDP cannot gather in float8.
    """
    if FLOAT8_CONVERTERS.isdisjoint(converters):
        return
    section = quantize.linear.float8
    check_device(section)
    parts = plan_float8(model, section=section, tp=plan.tp, tp_degree=dims.tp).parts
    if section.enable_fsdp_float8_all_gather:
        check_even_shards(parts, dims.fsdp)


def apply_float8(
    model: nn.Module, *, section: Float8LinearConfig, tp: Mapping[str, str], tp_degree: int = 1
) -> Conversion:
    """Have the linear layers of `model` that `plan_float8` names compute in float8, in place. Before anything else is applied to it.

    Names, shapes and dtypes of parameters stay, so that checkpoints fit with and without.

    Raises:
        ValueError: see `plan_float8` and `check_device`.
    """
    check_device(section)
    conversion, recipe = plan_float8(model, section=section, tp=tp, tp_degree=tp_degree), build_recipe(section)
    modules = dict(model.named_modules())
    styles = _get_styles(modules, tp)
    for name in conversion.converted:
        module, parent_name = modules[name], name.rpartition(".")[0]
        assert isinstance(module, nn.Linear)
        become_float8(module, recipe)
        assert isinstance(module, Float8Linear)
        if styles.get(name, "").startswith("colwise") and styles.get(parent_name) == "gather_seq":
            module.input_group = parent_name  # each gets what the parent gathered
    return conversion


def plan_float8(
    model: nn.Module, *, section: Float8LinearConfig, tp: Mapping[str, str], tp_degree: int = 1
) -> Conversion:
    """Return what is to become of each linear layer of `model`.

    The output matrix and routers of experts stay in high precision; so do layers that `section.filter_fqns` names, and those with
    a dim, in or out, on each of `tp_degree` ranks, that is no multiple of 16. tp: the plan's style of modules, by glob.

    Raises:
        ValueError: a pattern that is part of no name, or nothing left to convert.
    """
    recipe = build_recipe(section)
    modules = dict(model.named_modules())
    _check_patterns(section.filter_fqns, modules)
    styles = _get_styles(modules, tp)
    conversion = Conversion()
    for name, module in modules.items():
        if isinstance(module, Output):
            conversion.shapes[name] = (module.weight.shape[1], module.weight.shape[0])
            conversion.kept[name] = "output matrix"
        elif isinstance(module, nn.Linear):
            conversion.shapes[name] = (module.in_features, module.out_features)
            part = _get_part(module, styles.get(name, ""), tp_degree)
            reason = _find_reason(name, module, part, modules[name.rpartition(".")[0]], section, recipe)
            if reason is None:
                conversion.parts[name] = part
            else:
                conversion.kept[name] = reason
    if not conversion.converted:
        raise ValueError(
            f"model.converters has {SECTION}, but no linear layer can be converted: "
            f"{'; '.join(conversion.describe()) or 'the model has none'}. Take it out of model.converters"
        )
    return conversion


def _get_styles(modules: Mapping[str, nn.Module], tp: Mapping[str, str]) -> dict[str, str]:
    """Return the plan's style of each module that has one, by name."""
    return {name: style for glob, style in tp.items() for name in match_modules(glob, modules)}


def _find_reason(
    name: str,
    module: nn.Linear,
    part: tuple[int, int],
    parent: nn.Module,
    section: Float8LinearConfig,
    recipe: Recipe,
) -> str | None:
    """Return why a linear layer stays in high precision, None if it does not."""
    pattern = next((pattern for pattern in section.filter_fqns if pattern in name), None)
    if isinstance(parent, Router):
        return "router"
    if type(module) is not nn.Linear:
        return f"a class of its own, {type(module).__name__}"
    if pattern is not None:
        return f"filter_fqns has {pattern!r}"
    if any(size % FLOAT8_ALIGNMENT for size in part):
        return f"{part[0]} -> {part[1]} on a rank, not multiples of {FLOAT8_ALIGNMENT}"
    if AUTO_FILTER in section.filter_fqns and is_too_small(*part, recipe):
        return "too small to gain"
    return None


def is_too_small(n_in: int, n_out: int, recipe: Recipe) -> bool:
    """Whether casts cost about what the products gain, for K = n_in and N = n_out: torchao's thresholds, measured on H100."""
    if recipe.is_rowwise:
        return n_out <= 2048 or n_in <= 1024 or (n_out <= 4096 and n_in <= 2048)
    return n_in <= 4096 and n_out <= 1024


def _get_part(module: nn.Linear, style: str, degree: int) -> tuple[int, int]:
    """Return features in and out on one rank of tensor parallelism."""
    n_in, n_out = module.in_features, module.out_features
    if style == "rowwise":
        return n_in // degree, n_out
    # Replicated heads of keys and values are larger than that, by a whole factor.
    return n_in, n_out // degree if style.startswith("colwise") else n_out


def _check_patterns(patterns: Sequence[str], names: Mapping[str, nn.Module]) -> None:
    unknown = [p for p in patterns if p != AUTO_FILTER and (not p or not any(p in name for name in names))]
    if unknown:
        raise ValueError(
            f"{SECTION}.filter_fqns = {list(patterns)}: {', '.join(map(repr, unknown))} is part of no module's name. Names are like "
            f"{', '.join(name for name, module in names.items() if isinstance(module, nn.Linear))[:200]}"
        )


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
    if not torch.cuda.is_available():
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
