"""A linear layer whose matrix products are in float8: x w^T forward, and g w and g^T x backward.

Letters: M tokens, K features in, N features out. x: (M, K); w: (N, K); g, the gradient of the output: (M, N).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from trainer.low_precision.float8_layer import Float8Layer, find_scale, get_part, measure_rows, record_amax
from trainer.low_precision.float8_tensor import Float8Tensor, as_high_precision
from trainer.low_precision.fused_cast import cast_both_ways
from trainer.low_precision.matmul import multiply
from trainer.low_precision.recipe import E4M3, Kind, Recipe
from trainer.low_precision.scaling import Quantized, cast, get_amax, measure, quantize


class Float8Linear(Float8Layer, nn.Linear):
    """`nn.Linear` by a recipe. Its parameters are those of `nn.Linear`, in name, shape and dtype."""

    input_group: str = ""
    """Layers with the same one, if it is not empty, get the same input: they share the buffers for it, so that a compiled block casts
    it once."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)"""
        y = self.multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x w^T. x: (..., K); weight: (N, K), a part of `weight` maybe. Either can be a `Float8Tensor`."""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        recipe = self.get_current_recipe()
        function = _RowwiseProduct if recipe.is_rowwise else _TensorwiseProduct
        y = function.apply(rows, weight, recipe, *self.get_state())
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"


def become_float8(module: nn.Linear, recipe: Recipe) -> None:
    """Make a plain `nn.Linear` a `Float8Linear`, in place. Names, parameters and hooks stay."""
    assert type(module) is nn.Linear, f"{type(module).__name__} may compute something else than nn.Linear does"
    module.__class__ = Float8Linear
    assert isinstance(module, Float8Linear)
    module.recipe = recipe
    module.make_state(device=module.weight.device)


class BothWays(NamedTuple):
    """One matrix as it takes part in two products: values laid out by rows for the one, by columns for the other.

    Where there is one layout, `multiply` makes the other.
    """

    rows: Quantized
    columns: Quantized


@torch._dynamo.allow_in_graph
class _TensorwiseProduct(torch.autograd.Function):
    """One scale for each tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, *state: Tensor) -> Tensor:
        x8, w8 = cast_by_recipe(x, "input", recipe, state), cast_by_recipe(weight, "weight", recipe, state)
        # Not saved for backward: what is recorded changes before it runs.
        ctx.recipe, ctx.dtypes, ctx.state = recipe, (x.dtype, weight.dtype), state
        ctx.save_for_backward(*x8.columns, *choose_kept(weight, w8, recipe))
        return multiply(x8.rows, w8.rows.t(), out_dtype=x.dtype, fast=True, emulate=recipe.emulate, pads=recipe.pads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe, (x_dtype, weight_dtype), state = ctx.recipe, ctx.dtypes, ctx.state
        x_data, x_scale, *weight = ctx.saved_tensors
        g8 = cast_by_recipe(grads[0], "grad_output", recipe, state)
        grad_x = grad_weight = None
        options = {"fast": False, "emulate": recipe.emulate, "pads": recipe.pads}
        if ctx.needs_input_grad[0]:
            grad_x = multiply(g8.rows, restore_weight(weight, recipe, state), out_dtype=x_dtype, **options)
        if ctx.needs_input_grad[1]:
            grad_weight = multiply(g8.columns.t(), Quantized(x_data, x_scale), out_dtype=weight_dtype, **options)
        return grad_x, grad_weight, None, *(None for _ in state)


def cast_by_recipe(x: Tensor, kind: Kind, recipe: Recipe, state: Sequence[Tensor]) -> BothWays:
    """Cast a matrix with one scale as the recipe says, and record what it says. state: see `Float8Layer.get_state`"""
    if isinstance(x, Float8Tensor):
        return BothWays(x.quantized, x.quantized)
    dtype, records = recipe.dtype_of(kind), recipe.records_of(kind)
    scale, amax = find_scale(kind, recipe, state, lambda: get_amax(x))
    if recipe.fuses_cast_of(kind):
        rows, columns, seen = cast_both_ways(x, scale, dtype)
        both = BothWays(Quantized(rows, scale), Quantized(columns.t(), scale))
    else:
        seen = get_amax(x).float() if records and amax is None else amax
        one = Quantized(cast(x, scale, dtype), scale)
        both = BothWays(one, one)
    if records:
        assert seen is not None, "found with the scale, or here"
        record_amax(seen, kind, state)
    if recipe.measures:
        measure(x, both.rows, get_part(state, "counts", kind))
    return both


def choose_kept(weight: Tensor, w8: BothWays, recipe: Recipe) -> tuple[Tensor, ...]:
    """Return what to keep of a weight for g w: what was cast, or what it can be had from again."""
    return (weight,) if recipe.recomputes_weight or isinstance(weight, Float8Tensor) else w8.columns


def restore_weight(kept: Sequence[Tensor], recipe: Recipe, state: Sequence[Tensor]) -> Quantized:
    """Return a weight for g w. kept: see `choose_kept`"""
    return Quantized(*kept) if len(kept) == 2 else cast_by_recipe(kept[0], "weight", recipe, state).columns


@torch._dynamo.allow_in_graph
class _RowwiseProduct(torch.autograd.Function):
    """A scale for each row of a product's first factor and for each column of its second.

    What takes part in two products is cast twice, along either dim. With `keeps_weight_gradient` g^T x is in high precision, and
    w has one scale in g w, so that each is cast along one dim (torchao's `rowwise_with_gw_hp`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, *state: Tensor) -> Tensor:
        x_rows, w_rows = _quantize_along(x, E4M3, recipe, dim=1), _quantize_along(weight, E4M3, recipe, dim=1)
        x_columns = (x,) if recipe.keeps_weight_gradient else _quantize_along(x, E4M3, recipe, dim=0)
        w_columns = (weight,) if recipe.recomputes_weight else _quantize_columns(weight, recipe)
        ctx.recipe, ctx.dtypes, ctx.n_of_x, ctx.state = recipe, (x.dtype, weight.dtype), len(x_columns), state
        if recipe.measures:
            measure_rows(x, x_rows, "input", state)
            measure_rows(weight, w_rows, "weight", state)
        ctx.save_for_backward(*x_columns, *w_columns)
        return multiply(x_rows, w_rows.t(), out_dtype=x.dtype, fast=True, emulate=recipe.emulate, pads=recipe.pads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe, (x_dtype, weight_dtype), g = ctx.recipe, ctx.dtypes, grads[0]
        x, weight = ctx.saved_tensors[: ctx.n_of_x], ctx.saved_tensors[ctx.n_of_x :]
        grad_x = grad_weight = None
        options = {"fast": False, "emulate": recipe.emulate, "pads": recipe.pads}
        if ctx.needs_input_grad[0]:
            w8 = Quantized(*weight) if len(weight) == 2 else _quantize_columns(weight[0], recipe)
            g_rows = _quantize_along(g, recipe.grad_dtype, recipe, dim=1)
            grad_x = multiply(g_rows, w8, out_dtype=x_dtype, **options)
            if recipe.measures:
                measure_rows(g, g_rows, "grad_output", ctx.state)
        if ctx.needs_input_grad[1]:
            if recipe.keeps_weight_gradient:
                grad_weight = (g.t() @ x[0]).to(weight_dtype)
            else:
                g8 = _quantize_along(g, recipe.grad_dtype, recipe, dim=0)
                grad_weight = multiply(g8.t(), Quantized(*x), out_dtype=weight_dtype, **options)
        return grad_x, grad_weight, None, *(None for _ in ctx.state)


def _quantize_along(x: Tensor, dtype: torch.dtype, recipe: Recipe, dim: int | None) -> Quantized:
    return quantize(as_high_precision(x), dtype, dim=dim, power_of_2=recipe.power_of_2)


def _quantize_columns(weight: Tensor, recipe: Recipe) -> Quantized:
    """Cast a weight as second factor of g w."""
    if not recipe.keeps_weight_gradient:
        return _quantize_along(weight, E4M3, recipe, dim=0)
    w8 = _quantize_along(weight, E4M3, recipe, dim=None)
    return Quantized(w8.data, w8.scale.expand(1, weight.shape[1]))
