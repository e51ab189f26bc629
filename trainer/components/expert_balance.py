"""Keep the experts of a mixture evenly busy, and tell how busy they are."""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from models.common.moe import MoE
from trainer.distributed.parallel_dims import ParallelDims

logger = logging.getLogger(__name__)


class ExpertBalance:
    """Counts the tokens of each expert over all ranks, and once an optimizer step moves the routers' biases against the counts
    (Wang et al., arXiv 2408.15664). The biases are buffers of the model, and so part of checkpoints.
    """

    def __init__(
        self,
        layers: dict[str, MoE],
        *,
        bias_update_speed: float,
        groups: list[dist.ProcessGroup],
        pp_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        is_forced: bool = False,
    ) -> None:
        """layers: by name. bias_update_speed: what a bias moves in a step. groups: over which counts are added up. pp_group:
        stages of the pipeline, which have other layers. is_forced: whether tokens are dealt out in turn.
        """
        self.is_forced = is_forced
        self.pp_group = pp_group
        self.device = torch.device(device)
        self.layers = layers
        self.bias_update_speed = bias_update_speed
        self.groups = groups
        self._counts: Tensor | None = None

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Move the biases by the counts of the step that is done, and begin to count anew. The host waits for nothing.

        Collective. skip: 0-dim bool or 0/1, whether the step is left out, which leaves out this as well.
        """
        if not self.layers:
            return
        mixtures = list(self.layers.values())
        counts = torch.stack([mixture.tokens_per_expert for mixture in mixtures])  # (layers, experts)
        for group in self.groups:
            dist.all_reduce(counts, group=group)
        speed: Any = self.bias_update_speed * (1.0 - skip.float())
        for mixture, its_counts in zip(mixtures, counts.unbind(), strict=True):
            mixture.router.update_expert_bias(its_counts, speed)
            mixture.tokens_per_expert.zero_()
        self._counts = counts

    def forget(self) -> None:
        """Begin to count anew, without the step that is under way."""
        for mixture in self.layers.values():
            mixture.tokens_per_expert.zero_()

    def measure(self) -> dict[str, Tensor]:
        """Return how even the load of the last step was, for the worst layer and by layer: 0-dim each, still on the device.

        max_over_mean: tokens of the busiest expert over those of the mean one: 1 is even. entropy: of the shares, over its
        largest value: 1 is even. dropped: no token ever is, but a count that does not add up would show. forced_balance: 1
        where tokens were dealt out in turn, which is a benchmark and no training. Layers are those of this rank.

        Collective over the stages of a pipeline.
        """
        worst, by_layer = None, {}
        if self._counts is not None:
            counts = self._counts.double()
            totals = counts.sum(dim=1)
            shares = counts / totals.clamp(min=1).unsqueeze(1)
            max_over_mean = shares.amax(dim=1) * counts.shape[1]
            entropy = torch.special.entr(shares).sum(dim=1) / math.log(counts.shape[1])
            worst = torch.stack([max_over_mean.max(), -entropy.min(), totals.max() - totals.min()])
            for row, name in enumerate(self.layers):
                by_layer[f"experts/{name}/max_over_mean"] = max_over_mean[row]
                by_layer[f"experts/{name}/entropy"] = entropy[row]
        if self.pp_group is not None:
            if worst is None:  # a stage of dense layers
                worst = torch.full((3,), -math.inf, dtype=torch.float64, device=self.device)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.pp_group)
        if worst is None:
            return {}
        values = {"experts/max_over_mean": worst[0], "experts/entropy": -worst[1], "experts/dropped": worst[2]}
        if self.is_forced:
            values["experts/forced_balance"] = torch.ones(())
        return values | by_layer


def build_expert_balance(
    model: nn.Module, *, args: Any, dims: ParallelDims, device: torch.device, force_load_balance: bool = False
) -> ExpertBalance:
    """Return what keeps the mixtures of `model`, of which there may be none, evenly busy.

    args: of the model; those of one with experts have `n_experts` and `bias_update_speed`. force_load_balance: deal tokens
    out in turn (`debug.moe_force_load_balance`), whatever the routers say.
    """
    layers = {name.removesuffix(".moe"): module for name, module in model.named_modules() if isinstance(module, MoE)}
    for mixture in layers.values():
        mixture.router.force_load_balance = force_load_balance
    has_experts = getattr(args, "n_experts", 0) > 0
    if has_experts and force_load_balance:
        logger.warning(
            "debug.moe_force_load_balance = true deals tokens out to the experts in turn: a benchmark, and no training",
            extra={"same_on_all_ranks": True},
        )
    # Ranks of tensor parallelism route tokens of their own, too: each has a part of every sequence.
    further = [axis for axis, degree in (("dp_replicate", dims.dp_replicate), ("tp", dims.tp)) if degree > 1]
    axes = ["fsdp", *further] if dims.has_mesh else []
    return ExpertBalance(
        layers,
        bias_update_speed=getattr(args, "bias_update_speed", 0.0),
        groups=[dims.mesh(axis).get_group() for axis in axes],
        pp_group=dims.mesh("pp").get_group() if has_experts and dims.pp > 1 else None,
        device=device,
        is_forced=has_experts and force_load_balance,
    )
