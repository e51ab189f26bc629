"""What a run in float8 does besides its layers' products: between the passes and the update, and after the update."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainer.config.schema_quantize import (
    FLOAT8_ALIGNMENT,
    FLOAT8_CONVERTERS,
    FLOAT8_EXPERTS_CONVERTER,
    Float8LinearConfig,
    QuantizeConfig,
)
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.simple_fsdp import list_layouts
from trainer.low_precision.convert import check_device
from trainer.low_precision.float8_experts import list_products
from trainer.low_precision.float8_feed_forward import fuse_feed_forwards
from trainer.low_precision.float8_layer import Float8Layer
from trainer.low_precision.float8_linear import Float8Linear, become_float8
from trainer.low_precision.measurement import Measurement
from trainer.low_precision.recipe import build_recipe
from trainer.low_precision.scaling_history import Scales, ScalingHistory, set_static_scales, write_static_scales
from trainer.low_precision.shard_gather import SimpleWeightGather, become_shard_gathering
from trainer.low_precision.weight_gather import WeightGather, apply_weight_gather

logger = logging.getLogger(__name__)


class Float8Training:
    """The steps of a model that may have float8 layers. Without any, each method returns at once."""

    def __init__(
        self,
        *,
        gather: WeightGather | None = None,
        history: ScalingHistory | None = None,
        measurements: Sequence[Measurement] = (),
        write_scales: Callable[[Scales], None] | None = None,
    ) -> None:
        """gather: whose scales are to be found after each update. write_scales: what to do with scales at the end."""
        self._gather = gather
        self.history = history
        """Of the layers here, where amaxes are recorded."""
        self._measurements = measurements
        self._write_scales = write_scales

    def begin_step(self, step: int, *, is_logged: bool = True) -> None:
        """Prepare for the passes of a step. is_logged: whether its metrics will be. Collective over the ranks that share weights."""
        if self._gather is not None:
            self._gather.begin_step()
        if is_logged:
            for measurement in self._measurements:
                measurement.begin_step(step)

    def before_update(self) -> dict[str, Tensor]:
        """Take note of what the passes of a step have recorded, and return its metrics, if any. Collective over all ranks."""
        metrics: dict[str, Tensor] = {}
        for measurement in self._measurements:
            for name, value in measurement.collect().items():
                metrics[name] = torch.maximum(metrics[name], value) if name in metrics else value  # the worst of all
        if self.history is not None:
            self.history.sync()
        return metrics

    def after_update(self) -> None:
        """Take note of new weights. Collective over the ranks that share them."""
        if self._gather is not None:
            self._gather.precompute_scales()

    def forget(self) -> None:
        """Forget what belongs to the weights and the passes up to now: others are about to be loaded, in the middle of a run."""
        if self.history is not None:
            self.history.forget()
        if self._gather is not None:
            self._gather.forget_scales()

    def states(self) -> dict[str, ScalingHistory]:
        """Return what belongs into checkpoints, by name."""
        return {} if self.history is None else {"float8": self.history}

    def finish(self) -> None:
        """Do what is due at the end of a run. Collective."""
        if self.history is not None and self._write_scales is not None:
            self._write_scales(self.history.get_static_scales())


def build_float8_training(
    model: nn.Module,
    *,
    converters: Sequence[str],
    quantize: QuantizeConfig,
    dims: ParallelDims,
    device: torch.device,
) -> Float8Training:
    """Set up what a parallelized `model`, whose parameters have their memory, needs for its float8 layers, if it is to have any.

    converters: `model.converters`. Collective over all ranks: a pipeline's stage without such layers, too, takes part.

    Raises:
        ValueError: static scales that are not given.
    """
    if not FLOAT8_CONVERTERS.union([FLOAT8_EXPERTS_CONVERTER]).isdisjoint(converters):
        logger.info("MFU compares with the peak of bfloat16, also in float8")

    def build_measurements(layers: Mapping[str, Float8Layer], freq: int) -> list[Measurement]:
        if freq == 0:
            return []
        pp_group = dims.mesh("pp").get_group() if dims.pp > 1 else None
        return [Measurement(layers, freq=freq, group=dims.stage_group(), pp_group=pp_group, device=device)]

    measurements: list[Measurement] = []
    if FLOAT8_EXPERTS_CONVERTER in converters:
        products = list_products(model)
        for product in products.values():
            product.make_state()
        measurements += build_measurements(products, quantize.grouped_mm.float8.measure_freq)
    section = quantize.linear.float8
    if FLOAT8_CONVERTERS.isdisjoint(converters) or section.backend == "te":  # whose layers do all that themselves
        return Float8Training(measurements=measurements)
    layers, recipe = _get_layers(model), build_recipe(section)
    measurements += build_measurements(layers, section.measure_freq)
    gather = history = write_scales = None
    if recipe.has_state:
        set_static_scales(layers, section)
    if any(recipe.records):
        history = ScalingHistory(layers, section=section, group=dims.stage_group())
    if section.enable_fsdp_float8_all_gather and dims.fsdp > 1:
        precomputes = section.precompute_float8_dynamic_scale_for_fsdp and recipe.scaling_of("weight") == "dynamic"
        gather = _set_up_gather(model, list(layers.values()), dims.mesh("fsdp"), precomputes)
    if section.write_scales_file is not None:
        write_scales = functools.partial(_write_scales_of_all, Path(section.write_scales_file))
    return Float8Training(gather=gather, history=history, measurements=measurements, write_scales=write_scales)


def _set_up_gather(
    model: nn.Module, layers: list[Float8Linear], mesh: DeviceMesh, precomputes: bool
) -> WeightGather | None:
    """Have weights gathered in float8. Return what finds their scales after each update, if anything does."""
    if list_layouts(model):
        linears = [become_shard_gathering(layer) for layer in layers]
        return SimpleWeightGather(linears, mesh.get_group()) if precomputes else None
    of_weights = apply_weight_gather(model, mesh)
    return of_weights if precomputes else None


def _get_layers(model: nn.Module) -> dict[str, Float8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def _write_scales_of_all(path: Path, scales: Scales) -> None:
    """Write the scales of all ranks' layers on rank 0. Collective."""
    gathered: list[Scales | None] = [scales]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, scales)
    if not dist.is_initialized() or dist.get_rank() == 0:
        merged = {name: of for part in gathered if part is not None for name, of in part.items()}
        write_static_scales(path, merged)
        logger.info("wrote the scales of %d layers to %s", len(merged), path)


# For training loops of one's own.

_OF_A_RUN = ("filter_fqns", "keep_first_blocks", "keep_last_blocks", "speed_table", "fp8_opt_level")
"""Settings that the trainer follows, and `convert_to_float8_training` cannot."""


def convert_to_float8_training(
    model: nn.Module,
    *,
    config: Float8LinearConfig | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Have the `nn.Linear`s of `model` compute in float8, in place, and return it: for any network and any training loop.

    config: by default `tensorwise`. With delayed scaling, or `write_scales_file`, call `sync_float8_amax_and_scale_history` between
    the last backward pass and the update of each step, and keep `model.float8_history.state_dict()` with your checkpoints.
    module_filter_fn: given a module and its name, whether to convert it; by default all but those with a dim that is no
    multiple of 16. What FSDP needs for `enable_fsdp_float8_all_gather` is `weight_gather.apply_weight_gather`.

    Raises:
        ValueError: nothing to convert, another back end than native, settings that only the trainer follows, a device that cannot
            multiply so, or static scales that are not given.
    """
    config = config or Float8LinearConfig()
    _check_own_loop(config)
    check_device(config)
    recipe = build_recipe(config)

    def is_aligned(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(
            size % FLOAT8_ALIGNMENT for size in (module.in_features, module.out_features)
        )

    chosen = module_filter_fn or is_aligned
    layers: dict[str, Float8Linear] = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and chosen(module, name):
            become_float8(module, recipe)
            assert isinstance(module, Float8Linear)
            layers[name] = module
    if not layers:
        raise ValueError("the model has no nn.Linear that is to be converted to float8")
    if recipe.fuses_feed_forward:
        fuse_feed_forwards(model)
    if recipe.has_state:
        set_static_scales(layers, config)
    if any(recipe.records):
        model.float8_history = ScalingHistory(layers, section=config)  # type: ignore[assignment]  # no module
    return model


def _check_own_loop(config: Float8LinearConfig) -> None:
    if config.backend != "native":
        raise ValueError(
            f"quantize.linear.float8.backend = {config.backend!r}: only native layers go into a loop of one's own"
        )
    ignored = [name for name in _OF_A_RUN if getattr(config, name) != getattr(Float8LinearConfig(), name)]
    if ignored:
        raise ValueError(
            f"{', '.join(f'{name} = {getattr(config, name)!r}' for name in ignored)}: is for a run of the trainer. Choose layers by "
            "module_filter_fn, and optimizer and gradients in a loop of one's own"
        )


def sync_float8_amax_and_scale_history(model: nn.Module) -> None:
    """Take note of the amaxes of a step, and set the scales of the next: after all backward passes, before the update.

    model: what `convert_to_float8_training` returned, or a module around it. Collective over all ranks: each has all layers.

    Raises:
        ValueError: nothing in it records amaxes.
    """
    found = (getattr(module, "float8_history", None) for module in model.modules())
    # A module around it (torch.compile's) shows the same one again.
    histories = list(dict.fromkeys(history for history in found if isinstance(history, ScalingHistory)))
    if not histories:
        raise ValueError("no float8 layer of this model records amaxes: its scaling is dynamic or static")
    for history in histories:
        history.sync()
