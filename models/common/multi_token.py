"""What multi-token prediction predicts from what, and what it adds up (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Letters: B batch, S seq, M depth.
"""

import torch
import torch.nn as nn

IGNORE_INDEX = -100
"""Label of a token that has no loss, as in `torch.nn.functional.cross_entropy`."""


def shift_ahead(
    tokens: torch.Tensor, labels: torch.Tensor, *, depth: int, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens 1 to `depth` places ahead of each token, and what is to be predicted from each of them.

    At depth k a token's hidden state meets the token k places ahead, and predicts that one's label. Where the sequence ends
    before, or with `positions` the document, the label is IGNORE_INDEX and the token any. No token that has a label attends
    to one of these, for they come after it. Call it on whole sequences, before context parallelism cuts them: the last tokens of a
    part would get no labels.

    tokens, labels: (B, S) int64; positions: (B, S) int64, 0 where a document begins -> (B, S, M), (B, S, M) int64
    """
    seq = tokens.shape[1]
    places = torch.arange(seq, device=tokens.device).expand_as(tokens) if positions is None else positions
    shifted_tokens, shifted_labels = [], []
    for k in range(1, depth + 1):
        # A document that begins in between, and the end of the sequence, break the count.
        is_there = places.roll(-k, dims=1) == places + k
        if k >= seq:
            is_there = torch.zeros_like(is_there)
        shifted_tokens.append(tokens.roll(-k, dims=1))
        shifted_labels.append(torch.where(is_there, labels.roll(-k, dims=1), IGNORE_INDEX))
    return torch.stack(shifted_tokens, dim=-1), torch.stack(shifted_labels, dim=-1)


class DepthLoss(nn.Module):
    """Adds up the loss of one depth over the forward passes of a step, for whoever reads it and sets it to zero. No parameters."""

    total: torch.Tensor
    """0-dim fp32: summed over this rank's labels."""
    n_labels: torch.Tensor
    """0-dim int64: these labels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()), persistent=False)
        self.register_buffer("n_labels", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a loss that is summed over its labels. loss: 0-dim; labels: any shape, int64"""
        self.total.add_(loss)
        self.n_labels.add_((labels != IGNORE_INDEX).sum())

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew."""
        self.total.zero_()
        self.n_labels.zero_()

    def init_buffers(self, device: torch.device | str) -> None:
        """Begin with nothing, on `device`."""
        self.total = torch.zeros((), device=device)
        self.n_labels = torch.zeros((), dtype=torch.int64, device=device)
