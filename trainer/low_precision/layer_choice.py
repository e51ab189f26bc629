"""Which linear layers of a model are to compute in float8, and why others are not."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from models.common.output import Output
from models.common.router import Router
from models.plan import ParallelPlan, match_modules
from trainer.config.schema_quantize import FLOAT8_ALIGNMENT, SPEED_FILTER, Float8LinearConfig
from trainer.low_precision.recipe import build_recipe
from trainer.low_precision.speed_table import find_speed_table, read_speed_table

SECTION = "quantize.linear.float8"
SIZE_FILTER = "auto_filter_small_kn"
"""In `filter_fqns`: leave out what is too small to gain."""

SlowReason = Callable[[int, int], str | None]
"""Why a layer of K features in and N out, on one rank, would not gain, if so."""


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


def plan_float8(
    model: nn.Module, *, section: Float8LinearConfig, plan: ParallelPlan, tp_degree: int = 1, tokens: int = 0
) -> Conversion:
    """Return what is to become of each linear layer of `model`.

    The output matrix and routers of experts stay in high precision; so do layers that `section.filter_fqns` names, those of the
    first and last blocks that it keeps, and those with a dim, in or out, on each of `tp_degree` ranks, that is no multiple of 16.
    tokens: of one forward pass of a layer, for measured speeds.

    Raises:
        ValueError: a pattern that is part of no name, no table of speeds where one is needed, or nothing left to convert.
    """
    find_slow = _build_slow_reason(section, tokens)
    modules = dict(model.named_modules())
    _check_patterns(section.filter_fqns, modules)
    styles, kept_blocks = get_styles(modules, plan.tp), _find_kept_blocks(section, plan, modules)
    conversion = Conversion()
    for name, module in modules.items():
        if isinstance(module, Output):
            conversion.shapes[name] = (module.weight.shape[1], module.weight.shape[0])
            conversion.kept[name] = "output matrix"
        elif isinstance(module, nn.Linear):
            conversion.shapes[name] = (module.in_features, module.out_features)
            part = _get_part(module, styles.get(name, ""), tp_degree)
            reason = next((why for block, why in kept_blocks.items() if name.startswith(f"{block}.")), None)
            reason = reason or _find_reason(name, module, part, modules[name.rpartition(".")[0]], section, find_slow)
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


def get_styles(modules: Mapping[str, nn.Module], tp: Mapping[str, str]) -> dict[str, str]:
    """Return the plan's style of each module that has one, by name."""
    return {name: style for glob, style in tp.items() for name in match_modules(glob, modules)}


def _find_kept_blocks(
    section: Float8LinearConfig, plan: ParallelPlan, modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Return the blocks at either end that stay in high precision, and the reason."""
    first, last = section.keep_first_blocks, section.keep_last_blocks
    if first == last == 0:
        return {}
    blocks = match_modules(plan.blocks, modules)
    kept = dict.fromkeys(blocks[len(blocks) - last :] if last else [], f"keep_last_blocks = {last}")
    return kept | dict.fromkeys(blocks[:first], f"keep_first_blocks = {first}")


def _find_reason(
    name: str,
    module: nn.Linear,
    part: tuple[int, int],
    parent: nn.Module,
    section: Float8LinearConfig,
    find_slow: SlowReason,
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
    return find_slow(*part)


def _build_slow_reason(section: Float8LinearConfig, tokens: int) -> SlowReason:
    recipe_name, by_size = section.recipe_name or "tensorwise", SIZE_FILTER in section.filter_fqns
    is_rowwise, table = build_recipe(section).is_rowwise, None
    if SPEED_FILTER in section.filter_fqns:
        gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        table = read_speed_table(find_speed_table(section.speed_table, gpu_name), recipe_name)

    def find_slow(n_in: int, n_out: int) -> str | None:
        if by_size and is_too_small(n_in, n_out, is_rowwise=is_rowwise):
            return "too small to gain"
        speedup = math.inf if table is None else table.look_up(tokens, n_in, n_out)
        if speedup > 1.0 or table is None:
            return None
        note = f" ({table.device})" if "estimated" in table.device else ""
        return f"x {speedup:.2f} of bf16's speed with {tokens} tokens{note}"

    return find_slow


def is_too_small(n_in: int, n_out: int, *, is_rowwise: bool) -> bool:
    """Whether casts cost about what the products gain, for K = n_in and N = n_out: torchao's thresholds, measured on H100."""
    if is_rowwise:
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
    unknown = [
        p for p in patterns if p not in (SIZE_FILTER, SPEED_FILTER) and (not p or not any(p in name for name in names))
    ]
    if unknown:
        raise ValueError(
            f"{SECTION}.filter_fqns = {list(patterns)}: {', '.join(map(repr, unknown))} is part of no module's name. Names are like "
            f"{', '.join(name for name, module in names.items() if isinstance(module, nn.Linear))[:200]}"
        )
