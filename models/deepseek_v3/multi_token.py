"""What multi-token prediction predicts from what (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Letters: B batch, S seq, M depth.
"""

import torch

IGNORE_INDEX = -100
"""Label of a token that has no loss, as in `torch.nn.functional.cross_entropy`."""


def shift_ahead(
    tokens: torch.Tensor, labels: torch.Tensor, *, depth: int, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens 1 to `depth` places ahead of each token, and what is to be predicted from each of them.

    At depth k a token's hidden state meets the token k places ahead, and predicts that one's label. Where the sequence ends
    before, or with `positions` the document, the label is IGNORE_INDEX and the token any. No token that has a label attends
    to one of these, for they come after it. Call it on whole sequences: of a part, as a rank of context parallelism has it,
    the last tokens get no labels.

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
