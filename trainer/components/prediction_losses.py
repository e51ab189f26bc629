"""Tell how well each depth of multi-token prediction does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.common.multi_token import DepthLoss


class PredictionLosses:
    """The loss of each further token that is predicted, over all ranks and microbatches of a step.

    The depths' own sums are in the model (`DepthLoss`), on the ranks that have the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        depth: int,
        weight: float,
        sum_over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """depth, weight: the model's `mtp_depth` and `mtp_weight`. sum_over_ranks: of a tensor, over the ranks whose losses add up."""
        self.depth, self.weight = depth, weight
        self.sum_over_ranks = sum_over_ranks
        self.device = device
        self._depths = [module for module in model.modules() if isinstance(module, DepthLoss)]
        assert len(self._depths) in (0, depth), "all depths are on the rank of the loss"

    def begin_step(self) -> None:
        """Forget the step before."""
        for depth in self._depths:
            depth.reset()

    def measure(self, *, loss: Tensor, valid_tokens: Tensor) -> dict[str, Tensor]:
        """Return `mtp/loss_K` of each depth K from 1, the mean over the labels K places further ahead, and `mtp/main_loss`, that of the
        next token alone: 0-dim each, still on the device, in nats per token. Nothing for a model without further depths.

        loss: of the step, over all ranks, all depths included. valid_tokens: its labels. Collective.
        """
        if not self.depth:
            return {}
        sums = torch.zeros(2, self.depth, dtype=torch.float64, device=self.device)
        for column, depth in enumerate(self._depths):
            sums[0, column], sums[1, column] = depth.total, depth.n_labels
        totals, n_labels = self.sum_over_ranks(sums).unbind()
        main = loss - self.weight * totals.mean() / valid_tokens
        means = totals / n_labels  # nan where no label is that far ahead
        return {"mtp/main_loss": main} | {f"mtp/loss_{k}": mean for k, mean in enumerate(means.unbind(), start=1)}
