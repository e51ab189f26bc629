"""SimpleFSDP gathers weights of float8 layers in float8: half the bytes of bfloat16, as operations of the compiled graph.

As `weight_gather.py` does for FSDP2, bit for bit: one scale serves the shards of all ranks, and what travels is bytes, since gloo knows
no float8.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.distributed.weight_collectives import Layout, gather_shards, reduce_gradient
from trainer.low_precision.float8_layer import get_part, record_amax
from trainer.low_precision.float8_linear import Float8Linear
from trainer.low_precision.float8_tensor import Float8Tensor, as_high_precision
from trainer.low_precision.recipe import E4M3, Recipe
from trainer.low_precision.scaling import Quantized, cast, get_amax, get_scale, measure
from trainer.low_precision.weight_gather import WeightGather

_ops = torch.ops._c10d_functional


@torch._dynamo.allow_in_graph
class _GatherFloat8Weight(torch.autograd.Function):
    """As `weight_collectives.gather_weight`. scale: of the whole weight, if it is known; state: see `Float8Layer.get_state`"""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, layout: Layout, recipe: Recipe, scale: Tensor | None, *state: Tensor
    ) -> Float8Tensor:
        ctx.layout, ctx.rows, ctx.dtype, ctx.n_of_state = layout, shard.shape[layout.dim], shard.dtype, len(state)
        if recipe.scaling_of("weight") != "dynamic":
            scale = get_part(state, "scale", "weight")
        records = recipe.records_of("weight")
        if scale is None or records:
            amax = get_amax(shard).float()
            if records:
                # Of this shard: the ranks' amaxes are brought together once a step, with all others.
                record_amax(amax, "weight", state)
            if scale is None:
                amax = _ops.wait_tensor(_ops.all_reduce(amax, "max", layout.shard_group))
                scale = get_scale(amax, E4M3, power_of_2=recipe.power_of_2)
        data = cast(shard, scale, E4M3)
        if recipe.measures:
            measure(shard, Quantized(data, scale), get_part(state, "counts", "weight"))
        whole = gather_shards(data.view(torch.uint8), layout).view(E4M3)
        return Float8Tensor(whole, scale, layout.forward_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        reduced = reduce_gradient(as_high_precision(grads[0]), ctx.layout, ctx.rows)
        return reduced.to(ctx.dtype), None, None, None, *[None] * ctx.n_of_state


class ShardGatheringLinear(Float8Linear):
    """A float8 layer whose weight SimpleFSDP gathers in float8."""

    gather_scale: Tensor | None = None
    """0-dim float32: of the whole weight as it is now. None: to be found out at each gathering."""

    def gather_weight(self, shard: Tensor, layout: Layout) -> Tensor:
        """Return the whole weight, a `Float8Tensor`. Collective. See `weight_collectives.gather_weight`."""
        return _GatherFloat8Weight.apply(shard, layout, self.get_current_recipe(), self.gather_scale, *self.get_state())


class _Shard:
    """The shard of one layer, for `WeightGather`."""

    def __init__(self, linear: ShardGatheringLinear) -> None:
        self._linear = linear

    @property
    def shard(self) -> Tensor:
        """This rank's part of the weight, in high precision."""
        weight = self._linear._parameters["weight"]
        assert isinstance(weight, DTensor), "SimpleFSDP comes first"
        return weight._local_tensor

    @property
    def scale(self) -> Tensor | None:
        """Of the whole weight."""
        return self._linear.gather_scale

    @scale.setter
    def scale(self, scale: Tensor) -> None:
        # In place, for graphs to find it where it was.
        if self._linear.gather_scale is None:
            self._linear.gather_scale = scale.clone()
        else:
            self._linear.gather_scale.copy_(scale)


class SimpleWeightGather(WeightGather):
    """The scales of all float8 weights that SimpleFSDP gathers, which are always known beforehand."""

    def __init__(self, linears: Sequence[ShardGatheringLinear], group: dist.ProcessGroup) -> None:
        shards: Any = [_Shard(linear) for linear in linears]
        super().__init__(shards, group, power_of_2=linears[0].recipe.power_of_2 if linears else False)
        self.precompute_scales()
        self._is_stale = True  # a checkpoint may be loaded yet

    def forget_scales(self) -> None:
        """Find out scales before the next step, since the weights change otherwise than by an update."""
        self._is_stale = True

    def begin_step(self) -> None:
        """Find out scales, if weights may have changed otherwise than by an update. Collective."""
        if self._is_stale:
            self.precompute_scales()
        self._is_stale = False


def become_shard_gathering(linear: Float8Linear) -> ShardGatheringLinear:
    """Have SimpleFSDP, applied already, gather the weight of a layer in float8. Names, parameters and hooks stay."""
    linear.__class__ = _get_class(type(linear))
    assert isinstance(linear, ShardGatheringLinear)
    return linear


_classes: dict[type, type[ShardGatheringLinear]] = {}


def _get_class(cls: type[Float8Linear]) -> type[ShardGatheringLinear]:
    """Return the class that is both: always the same one, for compiled blocks to share a graph."""
    if cls not in _classes:
        _classes[cls] = type(f"Float8{cls.__name__}", (cls, ShardGatheringLinear), {})
    return _classes[cls]
