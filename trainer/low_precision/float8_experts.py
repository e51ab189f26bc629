"""Experts of a mixture in float8: grouped matrix products with a scale for each row of both factors.

Of the three products of a weight, two are in float8: the output and the gradient of the rows. The gradient of the weights sums over
the rows of a group, whose number is no multiple of 16; it stays in high precision, as under `rowwise_with_gw_hp`.

Letters: R rows, G groups (experts), I and O widths in and out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from models.common.grouped_mm import get_weight_gradients, grouped_mm
from models.common.moe import GroupedExperts
from trainer.config.schema_quantize import FLOAT8_ALIGNMENT, Float8GroupedMMConfig
from trainer.low_precision.float8_layer import Float8Layer, measure_rows
from trainer.low_precision.recipe import E4M3, Recipe
from trainer.low_precision.scaling import Quantized, quantize

SECTION = "quantize.grouped_mm.float8"
WEIGHTS = ("w1", "w2", "w3")


class GroupedProduct(Float8Layer):
    """The product of rows with one of the weights of their experts, in float8: see `models.common.grouped_mm.grouped_mm`."""

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        """recipe: see `build_expert_recipe`. device: of the state."""
        super().__init__()
        self.recipe = recipe
        self.make_state(device=device)

    def forward(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Return rows @ weights[g]^T for each group's rows. rows: (R, I); weights: (G, O, I); ends: (G,) int32 -> (R, O)"""
        return _GroupedProduct.apply(rows, weights, ends, self.get_current_recipe(), *self.get_state())


def build_expert_recipe(section: Float8GroupedMMConfig) -> Recipe:
    """Return what the settings ask for."""
    return Recipe(
        is_rowwise=True,
        keeps_weight_gradient=True,
        power_of_2=True,
        emulate=section.emulate,
        keeps_counts=section.measure_freq > 0,
    )


@torch._dynamo.allow_in_graph
class _GroupedProduct(torch.autograd.Function):
    """rows: (R, I); weights: (G, O, I); ends: (G,) -> (R, O). Rows beyond the last end, NaN maybe, spoil no others."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor, recipe: Recipe, *state: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        ctx.recipe, ctx.state = recipe, state
        rows8, weights8 = _quantize(rows, dim=1), _quantize(weights, dim=2)
        if recipe.measures:
            measure_rows(rows, rows8, "input", state, counted=_find_counted(rows, ends))
            measure_rows(weights, weights8, "weight", state)
        return _multiply(rows8, weights8, ends, out_dtype=rows.dtype, emulate=recipe.emulate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weights, ends) = grads, ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            by_columns = _quantize(weights, dim=1)
            weights8 = Quantized(by_columns.data.transpose(1, 2).contiguous(), by_columns.scale.transpose(1, 2))
            grad8 = _quantize(grad, dim=1)
            grad_rows = _multiply(grad8, weights8, ends, out_dtype=rows.dtype, emulate=ctx.recipe.emulate)
            if ctx.recipe.measures:
                measure_rows(grad, grad8, "grad_output", ctx.state, counted=_find_counted(grad, ends))
        if ctx.needs_input_grad[1]:
            grad_weights = get_weight_gradients(grad, rows, weights, ends)
        return grad_rows, grad_weights, None, None, *(None for _ in ctx.state)


def _find_counted(rows: Tensor, ends: Tensor) -> Tensor:
    """Return which rows are some expert's: (R, 1) bool."""
    return (torch.arange(rows.shape[0], device=rows.device) < ends[-1]).unsqueeze(-1)


def _quantize(x: Tensor, dim: int) -> Quantized:
    return quantize(x, E4M3, dim=dim, power_of_2=True)


def _multiply(a: Quantized, b: Quantized, ends: Tensor, *, out_dtype: torch.dtype, emulate: bool) -> Tensor:
    """Return a @ b[g]^T for each group's rows. a: (R, I), scales (R, 1); b: (G, O, I), contiguous, scales (G, O, 1)"""
    if emulate:
        return grouped_mm(a.dequantize(), b.dequantize(), ends).to(out_dtype)
    scale_a, scale_b = a.scale.reciprocal().flatten(), b.scale.reciprocal().flatten(1)
    product = torch._scaled_grouped_mm(
        a.data.contiguous(),
        b.data.transpose(1, 2),
        scale_a,
        scale_b,
        offs=ends,
        out_dtype=torch.bfloat16,  # the only one there is
        use_fast_accum=True,  # as torchao: the kernel by rows is made for it
    )
    return product.to(out_dtype)


def plan_float8_experts(
    model: nn.Module, *, section: Float8GroupedMMConfig, degree: int = 1
) -> dict[str, tuple[int, int, int]]:
    """Return the experts that `section.fqns` names: their number, width and hidden width, by name. degree: ranks that cut the latter.

    Raises:
        ValueError: a pattern that is part of no name of experts, or widths that cannot be multiplied in float8.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, GroupedExperts)}
    _check_patterns(section.fqns, experts)
    chosen: dict[str, tuple[int, int, int]] = {}
    for name, module in experts.items():
        if any(pattern in name for pattern in section.fqns):
            n_experts, hidden_dim, dim = module.w1.shape
            if dim % FLOAT8_ALIGNMENT or hidden_dim % (degree * FLOAT8_ALIGNMENT):
                raise ValueError(
                    f"{SECTION}.fqns = {list(section.fqns)}: experts of {name} are {dim} -> {hidden_dim // degree} on a rank, not multiples "
                    f"of {FLOAT8_ALIGNMENT}. Take them out of fqns"
                )
            chosen[name] = (n_experts, dim, hidden_dim)
    return chosen


def _check_patterns(patterns: Sequence[str], experts: Mapping[str, GroupedExperts]) -> None:
    if not patterns:
        raise ValueError(
            f"model.converters has {SECTION}, but {SECTION}.fqns names nothing: set it to ['experts'] for all experts"
        )
    unknown = [pattern for pattern in patterns if not pattern or not any(pattern in name for name in experts)]
    if unknown:
        known = f"Names are like {', '.join(experts)[:200]}" if experts else "The model has no experts"
        raise ValueError(
            f"{SECTION}.fqns = {list(patterns)}: {', '.join(map(repr, unknown))} is part of no name of experts. {known}"
        )


def apply_float8_experts(model: nn.Module, *, section: Float8GroupedMMConfig, degree: int = 1) -> list[str]:
    """Have experts of `model` multiply in float8, in place, and return a line for the log about each kind. Parameters stay.

    Raises:
        ValueError: see `plan_float8_experts` and `check_expert_device`.
    """
    check_expert_device(section)
    chosen = plan_float8_experts(model, section=section, degree=degree)
    recipe = build_expert_recipe(section)
    for name in chosen:
        experts = model.get_submodule(name)
        assert isinstance(experts, GroupedExperts)
        for weight in WEIGHTS:
            setattr(experts, f"product_{weight}", GroupedProduct(recipe, experts.w1.device))
    kinds: dict[tuple[tuple[int, ...], str], int] = {}
    for name, experts in model.named_modules():
        if isinstance(experts, GroupedExperts):
            fate = "converted" if name in chosen else "stay in high precision: fqns does not name them"
            kind = (tuple(experts.w1.shape), fate)
            kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{n} x {e} experts ({dim} -> {hidden} -> {dim}): {fate}" for ((e, hidden, dim), fate), n in kinds.items()]


def list_products(model: nn.Module) -> dict[str, GroupedProduct]:
    """Return the products of experts that are in float8, by the names of their weights."""
    found = (
        (f"{name}.{weight}", getattr(experts, f"product_{weight}"))
        for name, experts in model.named_modules()
        if isinstance(experts, GroupedExperts)
        for weight in WEIGHTS
    )
    return {name: product for name, product in found if isinstance(product, GroupedProduct)}


def check_expert_device(section: Float8GroupedMMConfig) -> None:
    """Check that the device of this process has the grouped product: Hopper alone has that by rows (torch 2.11 to 2.13).

    Raises:
        ValueError: it has not.
    """
    if section.emulate:
        return
    have = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if have is None or have[0] != 9:
        name = "the CPU" if have is None else f"{torch.cuda.get_device_name()} ({have[0]}.{have[1]})"
        raise ValueError(
            f"{SECTION} needs a GPU of compute capability 9.0 (H100, H200), for torch's grouped product in float8, and this is {name}. Set "
            f"{SECTION}.emulate = true to try it slowly, or take {SECTION} out of model.converters"
        )
