"""A feed-forward part all of whose layers are in float8, as one function: what is between its products is one pass each way.

It computes what its layers compute one by one, bit for bit where `swiglu_cast` has no kernel. Apart, they would bring h = silu(a) * b
and the gradients of a and b to memory in high precision, to be read again and cast.

Letters: M tokens, D model width, F width of the hidden layer. x: (M, D); a = x w1^T, b = x w3^T and h: (M, F); y = h w2^T: (M, D); g,
ga, gb and gh are the gradients of y, a, b and h.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from models.common.feed_forward import FeedForward
from trainer.low_precision.float8_layer import find_scale, get_part, record_amax
from trainer.low_precision.float8_linear import BothWays, Float8Linear, cast_by_recipe, choose_kept, restore_weight
from trainer.low_precision.matmul import multiply
from trainer.low_precision.recipe import Recipe
from trainer.low_precision.scaling import Quantized, get_amax
from trainer.low_precision.swiglu_cast import swiglu, swiglu_backward, swiglu_backward_cast, swiglu_cast

State = Sequence[Tensor]
"""See `Float8Layer.get_state`."""


class Float8FeedForward(FeedForward):
    """`FeedForward` of three `Float8Linear`s. Its parameters are those of `FeedForward`, in name, shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)"""
        if not self._is_one_function(x):
            return super().forward(x)
        w1, w2, w3 = self.w1, self.w2, self.w3
        assert isinstance(w1, Float8Linear)
        assert isinstance(w2, Float8Linear)
        assert isinstance(w3, Float8Linear)
        states = *w1.get_state(), *w3.get_state(), *w2.get_state()
        rows = x.reshape(-1, x.shape[-1])
        y = _SwiGLU.apply(rows, w1.weight, w3.weight, w2.weight, w1.get_current_recipe(), *states)
        return y.view(x.shape)

    def _is_one_function(self, x: Tensor) -> bool:
        """Whether the layers are to compute together: alike, and no more than a `Float8Linear` does."""
        linears, first = (self.w1, self.w2, self.w3), self.w1
        if not all(isinstance(linear, Float8Linear) and _is_plain(linear) for linear in linears):
            return False
        assert isinstance(first, Float8Linear)
        recipe = first.get_current_recipe()
        is_alike = all(linear.get_current_recipe() == recipe for linear in linears)  # type: ignore[operator]
        return is_alike and recipe.fuses_feed_forward and not torch.is_autocast_enabled(x.device.type)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer's product is all that a call of it does: no tensor parallelism, no hooks, no bias."""
    is_own = type(linear).forward is Float8Linear.forward and "forward" not in linear.__dict__
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return is_own and linear.bias is None and not any(len(of_kind) for of_kind in hooks)


def fuse_feed_forwards(model: nn.Module) -> None:
    """Have each feed-forward part of `model` whose layers are all in float8 compute as one function, in place. Names, parameters and
    hooks stay, and so does what a part with layers that are not alike, or changed later, computes."""
    for module in model.modules():
        if type(module) is FeedForward and all(isinstance(part, Float8Linear) for part in module.children()):
            module.__class__ = Float8FeedForward


@torch._dynamo.allow_in_graph
class _SwiGLU(torch.autograd.Function):
    """y of x. `states` are those of w1, w3 and w2, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, recipe: Recipe, *states: Tensor
    ) -> Tensor:  # fmt: skip
        of1, of3, of2 = _part(states)
        options: Any = {"out_dtype": x.dtype, "fast": True, "emulate": recipe.emulate, "pads": recipe.pads}
        x8_of1 = cast_by_recipe(x, "input", recipe, of1)
        w1_8 = cast_by_recipe(w1, "weight", recipe, of1)
        a = multiply(x8_of1.rows, w1_8.rows.t(), **options)
        x8_of3 = x8_of1 if _share_input(of1, of3) else cast_by_recipe(x, "input", recipe, of3)
        w3_8 = cast_by_recipe(w3, "weight", recipe, of3)
        b = multiply(x8_of3.rows, w3_8.rows.t(), **options)
        h8 = _cast_hidden(a, b, recipe, of2)
        w2_8 = cast_by_recipe(w2, "weight", recipe, of2)
        kept = [choose_kept(w, w8, recipe) for w, w8 in ((w1, w1_8), (w3, w3_8), (w2, w2_8))]
        ctx.recipe, ctx.states, ctx.counts = recipe, states, [len(of_weight) for of_weight in kept]
        ctx.dtypes = (x.dtype, w1.dtype, w3.dtype, w2.dtype)
        ctx.save_for_backward(*x8_of1.columns, *x8_of3.columns, a, b, h8.scale, *kept[0], *kept[1], *kept[2])
        return multiply(h8, w2_8.rows.t(), **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe, states, needs = ctx.recipe, ctx.states, ctx.needs_input_grad
        of1, of3, of2 = _part(states)
        x_data1, x_scale1, x_data3, x_scale3, a, b, h_scale, *kept = ctx.saved_tensors
        w1, w3, w2 = _cut(kept, ctx.counts)
        x_dtype, w1_dtype, w3_dtype, w2_dtype = ctx.dtypes
        options: Any = {"fast": False, "emulate": recipe.emulate, "pads": recipe.pads}
        grad_x = grad_w1 = grad_w3 = grad_w2 = None
        g8 = cast_by_recipe(grads[0], "grad_output", recipe, of2)
        if any(needs[:3]):
            gh = multiply(g8.rows, restore_weight(w2, recipe, of2), out_dtype=x_dtype, **options)
            records = needs[0] or needs[1], needs[0] or needs[2]
            ga8, gb8, h8 = _cast_gradients(gh, a, b, h_scale, recipe, (of1, of3), records)
            if needs[0]:
                grad_x = multiply(ga8.rows, restore_weight(w1, recipe, of1), out_dtype=x_dtype, **options)
                grad_x = grad_x + multiply(gb8.rows, restore_weight(w3, recipe, of3), out_dtype=x_dtype, **options)
            if needs[1]:
                x8 = Quantized(x_data1, x_scale1)
                grad_w1 = multiply(ga8.columns.t(), x8, out_dtype=w1_dtype, **options)
            if needs[2]:
                x8 = Quantized(x_data3, x_scale3)
                grad_w3 = multiply(gb8.columns.t(), x8, out_dtype=w3_dtype, **options)
        else:
            h8 = Quantized(swiglu_cast(a, b, h_scale, False)[0], h_scale)
        if needs[3]:
            grad_w2 = multiply(g8.columns.t(), h8, out_dtype=w2_dtype, **options)
        return grad_x, grad_w1, grad_w3, grad_w2, None, *(None for _ in states)


def _part(states: State) -> list[State]:
    size = len(states) // 3
    return [states[place * size : (place + 1) * size] for place in range(3)]


def _cut(kept: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    first, second, _ = counts
    return [kept[:first], kept[first : first + second], kept[first + second :]]


def _share_input(one: State, other: State) -> bool:
    """Whether two layers cast the input that both get by, and record it in, the same buffers."""
    return not one or get_part(one, "amax", "input") is get_part(other, "amax", "input")


def _cast_hidden(a: Tensor, b: Tensor, recipe: Recipe, state: State) -> Quantized:
    """Return h by rows. state: of w2"""
    records = recipe.records_of("input")
    scale, amax = find_scale("input", recipe, state, lambda: get_amax(swiglu(a, b)))
    rows, seen = swiglu_cast(a, b, scale, records and amax is None)
    if records:
        record_amax(seen if amax is None else amax, "input", state)
    return Quantized(rows, scale)


def _cast_gradients(
    gh: Tensor, a: Tensor, b: Tensor, h_scale: Tensor, recipe: Recipe, states: tuple[State, State], needed: tuple[bool, bool]
) -> tuple[BothWays, BothWays, Quantized]:  # fmt: skip
    """Return ga, gb, and h by columns. states: of w1 and w3; needed: whether ga, gb is"""

    @functools.cache
    def find_amaxes() -> list[Tensor]:
        return [get_amax(gradient) for gradient in swiglu_backward(gh, a, b)]

    ga_scale, ga_amax = find_scale("grad_output", recipe, states[0], lambda: find_amaxes()[0])
    gb_scale, gb_amax = find_scale("grad_output", recipe, states[1], lambda: find_amaxes()[1])
    records = recipe.records_of("grad_output")
    ga_rows, ga_columns, gb_rows, gb_columns, h_columns, seen = swiglu_backward_cast(
        gh, a, b, h_scale, ga_scale, gb_scale, records and ga_amax is None
    )
    if records:
        for amax, found, state, is_needed in zip((ga_amax, gb_amax), seen.unbind(), states, needed, strict=True):
            if is_needed:
                record_amax(found if amax is None else amax, "grad_output", state)
    ga8 = BothWays(Quantized(ga_rows, ga_scale), Quantized(ga_columns.t(), ga_scale))
    gb8 = BothWays(Quantized(gb_rows, gb_scale), Quantized(gb_columns.t(), gb_scale))
    return ga8, gb8, Quantized(h_columns.t(), h_scale)
