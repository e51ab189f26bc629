"""What a layer with products in float8 has beside its weights: a recipe, and a state to scale by and to count in."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from trainer.low_precision.recipe import KINDS, Kind, Recipe
from trainer.low_precision.scaling import Quantized, get_amax, get_scale, measure

PARTS = ("scale", "amax", "counts")
"""What a layer's state has of each kind of tensor."""


def get_part(state: Sequence[Tensor], part: str, kind: Kind) -> Tensor:
    """Return one buffer of `Float8Layer.get_state`."""
    return state[PARTS.index(part) * len(KINDS) + KINDS.index(kind)]


def find_scale(
    kind: Kind, recipe: Recipe, state: Sequence[Tensor], find_amax: Callable[[], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return the scale of a tensor, with one scale, and its amax, fp32, if that had to be found for it. Both 0-dim."""
    if recipe.scaling_of(kind) != "dynamic":
        return get_part(state, "scale", kind), None
    amax = find_amax().float()
    return get_scale(amax, recipe.dtype_of(kind), power_of_2=recipe.power_of_2), amax


def record_amax(amax: Tensor, kind: Kind, state: Sequence[Tensor]) -> None:
    """Raise the largest magnitude in a layer's state to `amax`, 0-dim fp32: the same however often a forward pass is recomputed."""
    recorded = get_part(state, "amax", kind)
    recorded.copy_(torch.maximum(recorded, amax))


class Float8Layer(nn.Module):
    """A layer that multiplies by one weight, by a recipe.

    Where the recipe has a state, there are float32 buffers for each of `KINDS`, which no state dict of the model holds:
    `scale_<kind>`, 0-dim, where it is not found out anew; `amax_<kind>`, 0-dim, the largest magnitude since it was last set to
    zero; and `counts_<kind>`, (3,), see `scaling.measure`.
    """

    recipe: Recipe
    scale_input: Tensor
    scale_weight: Tensor
    amax_weight: Tensor
    counts_input: Tensor
    counts_weight: Tensor

    def get_current_recipe(self) -> Recipe:
        """Return the recipe for a pass at this moment: validation must leave no trace."""
        return self.recipe if self.training else self.recipe._replace(records=(False, False, False), measures=False)

    def make_state(
        self, scales: Sequence[float] = (1.0, 1.0, 1.0), *, device: torch.device | str | None = None
    ) -> None:
        """Make the buffers, if the recipe needs any, or make them new. scales: of each of `KINDS`. device: by default, where they are."""
        if self.recipe.has_state:
            # Not where weights are: those that are offloaded lie elsewhere than where they are used.
            device = self.scale_input.device if device is None else device
            for kind, scale in zip(KINDS, scales, strict=True):
                self.register_buffer(f"scale_{kind}", torch.tensor(scale, device=device), persistent=False)
                self.register_buffer(f"amax_{kind}", torch.zeros((), device=device), persistent=False)
                self.register_buffer(f"counts_{kind}", torch.zeros(3, device=device), persistent=False)

    def get_state(self) -> tuple[Tensor, ...]:
        """Return all buffers of the state, for `get_part`."""
        if not self.recipe.has_state:
            return ()
        return tuple(getattr(self, f"{part}_{kind}") for part in PARTS for kind in KINDS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Layer":
        # A change of the model's dtype is not one of its scales'.
        names = [f"{part}_{kind}" for part in PARTS for kind in KINDS] if self.recipe.has_state else []
        kept = {name: self._buffers.pop(name) for name in names}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self


def list_state(model: nn.Module) -> list[Tensor]:
    """Return all that the layers of `model` scale by, record and count in."""
    return [buffer for layer in model.modules() if isinstance(layer, Float8Layer) for buffer in layer.get_state()]


def measure_rows(
    x: Tensor, x8: Quantized, kind: Kind, state: Sequence[Tensor], *, counted: Tensor | None = None
) -> None:
    """Note in a layer's state how a tensor was cast. counted: see `scaling.measure`"""
    seen = x if counted is None else torch.where(counted, x, 0)
    record_amax(get_amax(seen).float(), kind, state)
    measure(x, x8, get_part(state, "counts", kind), counted=counted)
