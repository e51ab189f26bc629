"""Loss on held-out data."""

import logging
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

LossOfBatch = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


class Validator:
    """Measures the mean loss over the validation data: each token counts the same, on whichever rank it is."""

    def __init__(
        self,
        *,
        model: nn.Module,
        batches: Callable[[], Iterator[dict[str, Tensor]]],
        loss_of_batch: LossOfBatch,
        sum_over_ranks: Callable[[Tensor], Tensor],
        freq: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """batches: starts a pass over the data, with the same number of batches on every rank.
        loss_of_batch: batch -> summed loss and number of valid labels, 0-dim each. freq: steps between validations.
        should_stop: asked before each batch, with the same answer on every rank: whether to break off.
        """
        self.model = model
        self.batches = batches
        self.loss_of_batch = loss_of_batch
        self.sum_over_ranks = sum_over_ranks
        self.freq = freq
        self.should_stop = should_stop
        self.has_run = False
        """Whether a validation has begun."""

    def should_run(self, step: int, *, last: bool) -> bool:
        """Whether a validation is due after this step."""
        return last or step % self.freq == 0

    @torch.no_grad()
    def run(self) -> tuple[float, float] | None:
        """Return the mean loss in nats per token, and the seconds it took; None if it was to stop.

        Raises:
            UserError: the validation data has not one valid label.
        """
        began = time.perf_counter()
        self.has_run = True
        self.model.eval()
        totals: Tensor | None = None
        try:
            for batch in self.batches():
                if self.should_stop():
                    return None
                loss_sum, valid = self.loss_of_batch(batch)
                pair = torch.stack([loss_sum.double(), valid.double()])
                totals = pair if totals is None else totals + pair
        finally:
            self.model.train()
        if totals is None:
            raise UserError("the validation data has no batch; see validation.dataset and validation.seq_len")
        loss_sum, valid = self.sum_over_ranks(totals).tolist()
        if valid == 0:
            raise UserError("the validation data has no valid label; see validation.dataset and validation.seq_len")
        return loss_sum / valid, time.perf_counter() - began
