"""How well scales fit: what they cut off above, and lose below, in each tensor of each float8 layer."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.low_precision.float8_layer import Float8Layer
from trainer.low_precision.recipe import KINDS, Recipe
from trainer.low_precision.scaling import get_scale

logger = logging.getLogger(__name__)

# A share of elements cut off that is no accident, and by how much it must have grown to be worth another line.
_WARNED_SHARE, _WARNED_GROWTH = 1e-4, 2.0
_SHOWN = 4


class Measurement:
    """Counts, in some steps, what layers cast badly. Letters: L layers, 3 kinds of tensors (`KINDS`)."""

    def __init__(
        self,
        layers: Mapping[str, Float8Layer],
        *,
        freq: int,
        group: dist.ProcessGroup | None = None,
        pp_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """layers: by name, each with its state, the same on all ranks of `group`; a pipeline's stage may have none. freq: in
        steps. pp_group: of the stages. device: for what goes over it."""
        self.layers = dict(layers)
        self._device = torch.device(device)
        self._freq = freq
        self._group = group
        self._pp_group = pp_group
        self._is_on = False
        self._last_shares = torch.zeros(len(self.layers), len(KINDS))

    def begin_step(self, step: int) -> None:
        """Have layers count in this step, if it is one to measure. Before its first pass."""
        self._is_on = step % self._freq == 0
        if self._is_on:
            self._set_measures(True)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Return metrics by name, 0-dim, of this step if it was measured: of the layers here, and the worst of all layers.

        After all passes of the step, before scales change. Collective. Tensors of which nothing was counted, such as inputs that
        came in float8 from other ranks, are left out.
        """
        if not self._is_on:
            return {}
        self._is_on = False
        worst = torch.zeros(2, device=self._device)
        by_layer: dict[str, Tensor] = {}
        if self.layers:
            worst, by_layer = self._collect_here()
        if self._pp_group is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._pp_group)
        return {"float8/saturated_max": worst[0], "float8/underflowed_max": worst[1]} | by_layer

    def _collect_here(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the largest shares cut off and lost, (2,), and the metrics of each layer. Collective over the group."""
        counts, amaxes, scales = (self._take(part) for part in ("counts", "amax", "scale"))
        self._clear()
        if dist.is_initialized():
            dist.all_reduce(counts, group=self._group)
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self._group)
        shares = counts[..., 1:] / counts[..., :1].clamp(min=1)  # (L, 3, 2): cut, lost
        self._warn_of_growth(shares[..., 0].cpu())
        metrics: dict[str, Tensor] = {}
        was_counted = (counts[..., 0] > 0).tolist()
        for row, (name, layer) in enumerate(self.layers.items()):
            for column, kind in enumerate(KINDS):
                if was_counted[row][column]:
                    key = f"float8/{name}/{kind}"
                    amax = amaxes[row, column]
                    is_dynamic = layer.recipe.scaling_of(kind) == "dynamic"
                    now = get_scale(amax, layer.recipe.dtype_of(kind), power_of_2=layer.recipe.power_of_2)
                    metrics[f"{key}/amax"] = amax
                    metrics[f"{key}/scale"] = now if is_dynamic else scales[row, column]
                    metrics[f"{key}/saturated"] = shares[row, column, 0]
                    metrics[f"{key}/underflowed"] = shares[row, column, 1]
        return shares.flatten(0, 1).amax(dim=0), metrics

    def _take(self, part: str) -> Tensor:
        """Return a part of all layers' states, (L, 3) or (L, 3, 3)."""
        buffers = [getattr(layer, f"{part}_{kind}") for layer in self.layers.values() for kind in KINDS]
        return torch.stack(buffers).unflatten(0, (len(self.layers), len(KINDS)))

    def _clear(self) -> None:
        """End the measurement. Amaxes that are remembered beyond the step are for `ScalingHistory` to take."""
        buffers = []
        self._set_measures(False)
        for layer in self.layers.values():
            buffers += [getattr(layer, f"counts_{kind}") for kind in KINDS]
            buffers += [getattr(layer, f"amax_{kind}") for kind in KINDS if not layer.recipe.records_of(kind)]
        torch._foreach_zero_(buffers)

    def _set_measures(self, measures: bool) -> None:
        """Tell the layers. Those of equal recipes share one, before and after, or compiled blocks would be compiled again."""
        recipes: dict[Recipe, Recipe] = {}
        for layer in self.layers.values():
            layer.recipe = recipes.setdefault(layer.recipe, layer.recipe._replace(measures=measures))

    def _warn_of_growth(self, shares: Tensor) -> None:
        """Name the tensors of which more is cut off than there was. shares: (L, 3), on the host"""
        has_grown = (shares > _WARNED_SHARE) & (shares > _WARNED_GROWTH * self._last_shares)
        self._last_shares = shares
        if has_grown.any() and (not dist.is_initialized() or dist.get_rank(self._group) == 0):
            names = list(self.layers)
            found = sorted(
                (
                    (shares[row, column].item(), f"{KINDS[column]} of {names[row]}")
                    for row, column in has_grown.nonzero().tolist()
                ),
                reverse=True,
            )
            logger.warning("float8 saturation grows: %s", _list(found))


def _list(found: Sequence[tuple[float, str]]) -> str:
    more = f", and {len(found) - _SHOWN} more tensors" if len(found) > _SHOWN else ""
    return ", ".join(f"{share:.2%} of the {name} is cut off" for share, name in found[:_SHOWN]) + more
