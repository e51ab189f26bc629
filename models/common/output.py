"""The output matrix, with the loss computed where the matrix is at hand."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden (batch, seq, dim), weight (vocab, dim), labels (batch, seq)) -> loss, 0-dim."""


class Output(nn.Module):
    """Map hidden states to logits over the vocabulary, or straight to the loss.

    A loss function that takes the weight can avoid holding all logits. It is called inside `forward`, for only there have
    FSDP's hooks gathered the weight. No `nn.Linear`, so that a conversion of linear layers (float8) passes it by.
    """

    weight: torch.Tensor

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(
        self, h: torch.Tensor, *, labels: torch.Tensor | None = None, loss_fn: LossFunction | None = None
    ) -> torch.Tensor:
        """Return logits (batch, seq, vocab), or with `labels` and `loss_fn` the loss.

        h: (batch, seq, dim); labels: (batch, seq) int64

        Raises:
            ValueError: one of `labels` and `loss_fn` without the other.
        """
        if (labels is None) != (loss_fn is None):
            raise ValueError("labels and loss_fn go together: give both for the loss, neither for logits")
        if labels is None or loss_fn is None:
            return F.linear(h, self.weight)
        return loss_fn(h, self.weight, labels)

    def extra_repr(self) -> str:
        vocab_size, dim = self.weight.shape
        return f"dim={dim}, vocab_size={vocab_size}"
