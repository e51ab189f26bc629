"""Tensor parallelism in float8: activations and gradients are cast before they are gathered, at half the traffic.

The forward gathering before a module whose linear layers are all in float8, and that of gradients behind a rowwise one. Sums
over ranks (reduce-scatters) stay in high precision. A matrix that is cut has a scale for each part.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from trainer.distributed.tensor_collectives import TensorAxis, all_gather, all_reduce_max, reduce_scatter
from trainer.distributed.tensor_parallel import STYLES, Site, Style, apply_gather_seq, apply_rowwise
from trainer.low_precision.float8_linear import Float8Linear
from trainer.low_precision.float8_tensor import Float8Tensor, as_high_precision
from trainer.low_precision.recipe import E4M3, Kind, Recipe
from trainer.low_precision.scaling import cast, get_amax, get_scale


def _gather_float8(x: Tensor, dtype: torch.dtype, axis: TensorAxis, recipe: Recipe) -> Float8Tensor:
    """Gather the tokens of all ranks in float8, with one scale. x: (B, s, D) -> (B, S, D)"""
    amax = all_reduce_max(get_amax(x), axis)
    scale = get_scale(amax, dtype, power_of_2=recipe.power_of_2)
    data = all_gather(cast(x, scale, dtype).view(torch.uint8), 1, axis).view(dtype)
    return Float8Tensor(data, scale, x.dtype)


@torch._dynamo.allow_in_graph
class _GatherSequence(torch.autograd.Function):
    """As `tensor_collectives.gather_sequence`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis, recipe: Recipe) -> Tensor:
        ctx.axis = axis
        return _gather_float8(x, E4M3, axis, recipe)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(as_high_precision(grads[0]), 1, ctx.axis), None, None


@torch._dynamo.allow_in_graph
class _ScatterSequence(torch.autograd.Function):
    """As `tensor_collectives.scatter_sequence`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis, recipe: Recipe) -> Tensor:
        ctx.axis, ctx.recipe = axis, recipe
        return reduce_scatter(x, 1, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather_float8(grads[0], ctx.recipe.grad_dtype, ctx.axis, ctx.recipe), None, None


class Float8GatherSequence(nn.Module):
    """Gathers the first argument in float8. x: (B, s, D), which the module gets as (B, S, D), a `Float8Tensor`"""

    axis: TensorAxis
    recipe: Recipe

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(_GatherSequence.apply(x, self.axis, self.recipe), *args, **kwargs)


class Float8RowwiseLinear(nn.Linear):
    """As `tensor_parallel.RowwiseLinear`, with gradients gathered in float8. x: (B, S, in / degree) -> (B, s, out)"""

    axis: TensorAxis
    local_weight: Tensor
    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, Float8Linear)
        return _ScatterSequence.apply(self.multiply(x, self.local_weight), self.axis, self.recipe)


def _casts_alone(linear: Float8Linear, kind: Kind) -> bool:
    """Whether one scale, by what a tensor holds, is all that a layer needs of it."""
    return not linear.recipe.is_rowwise and linear.recipe.is_stateless(kind)


def _apply_gather_seq(site: Site) -> None:
    linears = [module for module in site.module.modules() if isinstance(module, nn.Linear)]
    # What is to stay in high precision must not be given less. Past amaxes are each layer's own.
    if linears and all(isinstance(module, Float8Linear) and _casts_alone(module, "input") for module in linears):
        site.become(Float8GatherSequence, recipe=linears[0].recipe)
    else:
        apply_gather_seq(site)


def _apply_rowwise(site: Site) -> None:
    if isinstance(site.module, Float8Linear) and _casts_alone(site.module, "grad_output"):
        apply_rowwise(site, Float8RowwiseLinear)
    else:
        apply_rowwise(site)


FLOAT8_STYLES: dict[str, Style] = {**STYLES, "gather_seq": _apply_gather_seq, "rowwise": _apply_rowwise}
"""For a model that may have float8 layers."""
