"""Delayed scaling: tensors are cast by the largest magnitudes of past steps (arXiv 2209.05433, section 4.3).

Layers record the largest magnitude of each tensor in the course of a step; `ScalingHistory.sync`, between the last backward pass and
the update, brings those of all ranks together by one all-reduce, remembers them, and sets the scales of the next step. So a
step's scales are the same in all its passes, whatever is recomputed or accumulated.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.errors import UserError
from trainer.config.schema_quantize import Float8LinearConfig
from trainer.low_precision.float8_layer import PARTS
from trainer.low_precision.float8_linear import Float8Linear
from trainer.low_precision.recipe import KINDS, build_recipe
from trainer.low_precision.scaling import get_scale

logger = logging.getLogger(__name__)

Scales = dict[str, dict[str, float]]
"""Of each layer, by name, and kind."""


class ScalingHistory:
    """Past amaxes of some layers, all of one recipe, and what follows from them. Part of every checkpoint.

    Letters: H steps remembered, L layers, and 3 kinds of tensors (`KINDS`).
    """

    def __init__(
        self, layers: Mapping[str, Float8Linear], *, section: Float8LinearConfig, group: dist.ProcessGroup | None = None
    ) -> None:
        """layers: by name, the same on all ranks of `group`, each with its state. A pipeline's stage may have none."""
        self.layers = dict(layers)
        self._section = section
        self._group = group
        self._recipe = build_recipe(section)
        self.steps = 0
        """Steps that have been recorded."""
        self._history = torch.zeros(section.amax_history_len, len(self.layers), len(KINDS))
        self._peaks = torch.zeros(len(self.layers), len(KINDS))
        self._is_delayed = torch.tensor([scaling == "delayed" for scaling in self._recipe.scalings])
        self.amaxes = torch.zeros(len(self.layers), len(KINDS))
        """(L, 3): those of the last step, over all ranks. Zero where nothing was recorded."""
        self._set_recipe()

    @torch.no_grad()
    def sync(self) -> None:
        """Take note of a step, and set the scales of the next. Once a step, after all backward passes: collective.

        An amax that is zero, infinite or NaN says nothing: history and scale of that tensor stay as they are.
        """
        amaxes = self._collect("amax")
        self._move_to(amaxes.device)
        amaxes = torch.where(amaxes.isnan(), math.inf, amaxes)  # a maximum over ranks may lose a NaN
        if self.layers and dist.is_initialized():
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self._group)
        says = amaxes.isfinite() & (amaxes > 0)
        self.amaxes = amaxes
        self._peaks = torch.where(says, torch.maximum(self._peaks, amaxes), self._peaks)
        self._history = torch.where(says, torch.cat([amaxes[None], self._history[:-1]]), self._history)
        # Static and dynamic tensors that are recorded, to write scales or to be shown, are not scaled by it.
        says = says & self._is_delayed
        past = self._history.amax(dim=0) if self._section.amax_compute_algo == "max" else self._history[0]
        scales = torch.where(says, self._get_scales(past), self._collect("scale"))
        self._assign("scale", scales)
        self._assign("amax", torch.zeros_like(amaxes))
        self.steps += 1
        self._set_recipe()

    def forget(self) -> None:
        """Forget what was recorded since the last `sync`."""
        if self.layers:
            self._assign("amax", torch.zeros(len(self.layers), len(KINDS), device=self._collect("amax").device))

    def _get_scales(self, amaxes: Tensor) -> Tensor:
        """Return the scales of amaxes (..., L, 3), `margin` powers of two below the largest possible ones."""
        columns = [
            get_scale(amaxes[..., place], self._recipe.dtype_of(kind), power_of_2=self._recipe.power_of_2)
            for place, kind in enumerate(KINDS)
        ]
        return torch.stack(columns, dim=-1) / 2.0**self._section.margin

    def _set_recipe(self) -> None:
        """Scale by what tensors hold until there is a past. One change, at which compiled blocks are compiled again."""
        is_warming_up = self.steps < self._section.delayed_warmup_steps
        recipe = self._recipe.as_dynamic() if is_warming_up else self._recipe
        for layer in self.layers.values():
            layer.recipe = recipe

    def _collect(self, part: str) -> Tensor:
        """Return the layers' scales or amaxes. (L, 3)"""
        flat = self._list_buffers(part)
        return torch.stack(flat).view(len(self.layers), len(KINDS)) if flat else torch.zeros(0, len(KINDS))

    def _assign(self, part: str, values: Tensor) -> None:
        if self.layers:
            torch._foreach_copy_(self._list_buffers(part), list(values.flatten().unbind()))

    def _list_buffers(self, part: str) -> list[Tensor]:
        return [getattr(layer, f"{part}_{kind}") for layer in self.layers.values() for kind in KINDS]

    def _move_to(self, device: torch.device) -> None:
        if self._history.device != device:
            # Once: a copy from the host in each step would make it wait for the device.
            self._history, self._peaks = self._history.to(device), self._peaks.to(device)
            self._is_delayed = self._is_delayed.to(device)

    # Checkpoints.

    def state_dict(self) -> dict[str, Tensor]:
        """Return scales (3,) and past amaxes (H, 3) of each layer, by name, and the number of steps."""
        scales = self._collect("scale").detach()
        state: dict[str, Tensor] = {"steps": torch.tensor(self.steps)}
        for place, name in enumerate(self.layers):
            state[f"{name}.scale"] = scales[place].clone()
            state[f"{name}.amax_history"] = self._history[:, place].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all of it. Of a history of another length the newest steps that fit are taken."""
        scales = self._collect("scale")
        self._move_to(scales.device)
        self.steps = int(state["steps"])
        if self._section.write_scales_file is not None and self.steps and not self._peaks.any():
            logger.warning(
                "the scales for %s will be of what is seen from now on: what the run had seen in its first %d steps is in no checkpoint",
                self._section.write_scales_file, self.steps,
            )  # fmt: skip
        if self.layers:
            self._assign("scale", torch.stack([state[f"{name}.scale"].to(scales) for name in self.layers]))
            history = torch.stack([state[f"{name}.amax_history"] for name in self.layers], dim=1)
            kept = min(len(history), len(self._history))
            self._history.zero_()[:kept] = history[:kept].to(scales)
        self._set_recipe()

    # Scales for later runs.

    def get_static_scales(self) -> Scales:
        """Return the scales that would just have held all that this process recorded. Kinds never recorded are left out."""
        scales = self._get_scales(self._peaks).tolist()
        return {
            name: {kind: scales[row][column] for column, kind in enumerate(KINDS) if self._peaks[row, column] > 0}
            for row, name in enumerate(self.layers)
        }


def read_static_scales(section: Float8LinearConfig) -> tuple[dict[str, float], Scales]:
    """Return the static scales that the settings give: of all layers by kind, and of single ones, which go first.

    Raises:
        ValueError: the file is not there, or not one of scales.
    """
    given = (section.static_scale_input, section.static_scale_weight, section.static_scale_grad_output)
    common: dict[str, float] = {kind: scale for kind, scale in zip(KINDS, given, strict=True) if scale is not None}
    if section.static_scales_file is None:
        return common, {}
    try:
        scales = json.loads(Path(section.static_scales_file).read_text(encoding="utf-8"))["scales"]
        return common, {str(name): {kind: float(s) for kind, s in of.items()} for name, of in scales.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"quantize.linear.float8.static_scales_file = {section.static_scales_file!r} cannot be read as a file of scales "
            f"({error!r}): make one by a run with quantize.linear.float8.write_scales_file"
        ) from error


def write_static_scales(path: Path, scales: Scales) -> None:
    """Write scales for `static_scales_file`: JSON, layer by layer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 1, "scales": scales}, indent=1) + "\n", encoding="utf-8")


def set_static_scales(layers: Mapping[str, Float8Linear], section: Float8LinearConfig) -> None:
    """Make the state of layers anew, with the scales that the settings give where scaling is static.

    Raises:
        ValueError: the scale of a layer is given nowhere, or is no positive number.
    """
    common, single = read_static_scales(section)
    for name, layer in layers.items():
        scales = [1.0, 1.0, 1.0]
        for place, kind in enumerate(KINDS):
            if layer.recipe.scaling_of(kind) != "static":
                continue
            scale = single.get(name, {}).get(kind, common.get(kind))
            if scale is None or not 0 < scale < math.inf:
                raise UserError(
                    f"quantize.linear.float8.scaling_type_{kind} is static, but {name} has the scale {scale}. Give all layers one by "
                    f"quantize.linear.float8.static_scale_{kind}, or each its own by static_scales_file, which a run with "
                    "write_scales_file makes"
                )
            scales[place] = scale
        layer.make_state(scales)
    _share_inputs(layers)


def _share_inputs(layers: Mapping[str, Float8Linear]) -> None:
    """Have layers that get the same input use the same buffers for it, where they are to scale it alike."""
    first_of: dict[tuple[str, float], Float8Linear] = {}
    for layer in layers.values():
        if layer.input_group:
            first = first_of.setdefault((layer.input_group, layer.scale_input.item()), layer)
            for part in PARTS:
                layer._buffers[f"{part}_input"] = first._buffers[f"{part}_input"]
