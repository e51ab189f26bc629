"""FSDP2 gathers weights of float8 layers in float8: half the bytes of bfloat16, and no cast afterwards.

FSDP2 asks a shard for what to gather, and how to make a weight of it, by the methods `fsdp_pre_all_gather` and
`fsdp_post_all_gather`. They are given here to the shards as attributes: the shards themselves stay plain tensors, which
optimizers and checkpoints need not know about. What travels is bytes, since gloo knows no float8.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from trainer.low_precision.float8_linear import Float8Linear
from trainer.low_precision.float8_tensor import Float8Tensor
from trainer.low_precision.recipe import E4M3
from trainer.low_precision.scaling import Quantized, get_scale, measure
from trainer.low_precision.shard_cast import cast_shard


class ShardGather:
    """How one shard is gathered. One scale serves the shards of all ranks."""

    def __init__(self, shard: Tensor, linear: Float8Linear) -> None:
        self._shard = weakref.ref(shard)
        self._linear = linear
        self.scale: Tensor | None = None
        """For dynamic scaling: of the whole weight as it is now, where that is known; else it is found out at each gathering."""

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], tuple[Tensor]]:
        """Return the bytes to gather, in the shape of the shard, and the scale. Collective, if the scale is not known."""
        shard, recipe = self.shard, self._linear.recipe
        is_dynamic = recipe.scaling_of("weight") == "dynamic"
        scale = self.scale if is_dynamic else self._linear.scale_weight
        if scale is None:
            # One pass, where `get_amax` outside of compiled code makes several.
            amax = torch.linalg.vector_norm(shard, float("inf"), dtype=torch.float32)
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=mesh.get_group())
            scale = get_scale(amax, E4M3, power_of_2=recipe.power_of_2)
        # Recorded of this shard: the ranks' amaxes are brought together once a step, with all others.
        amax_of_step = self._linear.amax_weight if recipe.records_of("weight") else None
        data = cast_shard(shard, scale, E4M3, amax=amax_of_step)
        if recipe.measures:
            measure(shard, Quantized(data, scale), self._linear.counts_weight)
        return (data.view(torch.uint8),), (scale,)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: tuple[Tensor],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the weight over the gathered bytes, and these; with `out`, which is over them already, set its scale."""
        (data,), (scale,) = all_gather_outputs, metadata
        if scale.is_cuda:
            scale.record_stream(torch.cuda.current_stream())  # it was made on the stream that gathers
        if out is None:
            return Float8Tensor(data.view(E4M3), scale, param_dtype), (data,)
        weight = out._local_tensor if isinstance(out, DTensor) else out
        assert isinstance(weight, Float8Tensor)
        weight._scale = scale
        return None

    @property
    def shard(self) -> Tensor:
        """This rank's part of the weight, in high precision."""
        shard = self._shard()
        assert shard is not None, "a weight was replaced after its gathering was set up"
        return shard


class WeightGather:
    """The gathering of all float8 weights of a model."""

    def __init__(self, shards: list[ShardGather], group: dist.ProcessGroup, *, power_of_2: bool) -> None:
        self.shards = shards
        self._group = group
        self._power_of_2 = power_of_2

    def begin_step(self) -> None:
        """Prepare for the passes of a step."""

    def forget_scales(self) -> None:
        """Find out scales at each gathering again, since the weights change otherwise than by an update."""
        for gather in self.shards:
            gather.scale = None

    @torch.no_grad()
    def precompute_scales(self) -> None:
        """Find the scales of all weights, as they are now, by one all-reduce. Call it after each change of weights: collective."""
        if not self.shards:
            return
        amaxes = torch.stack(torch._foreach_norm([gather.shard for gather in self.shards], float("inf")))
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self._group)
        scales = get_scale(amaxes, E4M3, power_of_2=self._power_of_2)
        for gather, scale in zip(self.shards, scales.unbind(), strict=True):
            gather.scale = scale


def apply_weight_gather(model: nn.Module, mesh: DeviceMesh) -> WeightGather:
    """Have FSDP2, applied to `model` already, gather the weights of float8 layers in float8 over `mesh`.

    After the parameters have their memory, before the first forward pass. The rows of each weight on a rank of tensor
    parallelism are a multiple of the ranks of `mesh` (`convert.check_even_shards`).
    """
    shards, power_of_2 = [], False
    for linear in model.modules():
        if isinstance(linear, Float8Linear):
            weight = linear.weight
            assert isinstance(weight, DTensor), "FSDP comes first"
            shard: Any = weight._local_tensor
            gather = ShardGather(shard, linear)
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = (
                gather.fsdp_pre_all_gather,
                gather.fsdp_post_all_gather,
            )
            shards.append(gather)
            power_of_2 = linear.recipe.power_of_2
    return WeightGather(shards, mesh.get_group(), power_of_2=power_of_2)
