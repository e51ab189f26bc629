"""Output projection and cross-entropy in one, without ever holding the logits of a whole microbatch.

Letters: N tokens, D model width, V vocabulary, C tokens in a chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

TokenLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy over valid labels, in float32. logits: (C, V), labels: (C,)."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and its gradient with respect to the logits: softmax minus one-hot, zero where ignored.

    logits: (C, V), labels: (C,) -> 0-dim float32, (C, V) in the dtype of the logits.
    """
    z = logits.float()
    z = z - z.amax(dim=-1, keepdim=True)
    exp_z = z.exp()
    sum_exp = exp_z.sum(dim=-1, keepdim=True)
    valid = (labels != IGNORE_INDEX).unsqueeze(-1)
    target = torch.where(valid, labels.unsqueeze(-1), 0)
    losses = torch.where(valid, sum_exp.log() - z.gather(-1, target), 0.0)
    is_target = torch.arange(z.shape[-1], device=z.device) == target
    gradient = torch.where(valid, exp_z / sum_exp - is_target.float(), 0.0)
    return losses.sum(), gradient.to(logits.dtype)


def _accumulate_weight_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """total (V, D) float32 += dlogits (C, V)^T @ hidden (C, D), without rounding between chunks."""
    if dlogits.dtype == torch.float32:
        total.addmm_(dlogits.t(), hidden)
    elif total.is_cuda:
        torch.addmm(total, dlogits.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.add_(dlogits.t() @ hidden)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, so that no logits wait for the backward pass.

    Forward and backward together cost the same three matrix products as the plain composition. The weight's
    gradient is one tensor over all chunks: data parallelism reduces it once.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, token_loss: TokenLoss) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        dweight = None
        one_chunk = hidden.shape[0] <= chunk_size
        for begin in range(0, hidden.shape[0], chunk_size):
            end = begin + chunk_size
            chunk = hidden[begin:end]
            chunk_loss, dlogits = token_loss(chunk @ weight.t(), labels[begin:end])
            loss += chunk_loss
            torch.mm(dlogits, weight, out=dhidden[begin:end])
            if one_chunk:
                dweight = dlogits.t() @ chunk
            else:
                if dweight is None:
                    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                _accumulate_weight_gradient(dweight, dlogits, chunk)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        dhidden, dweight = ctx.saved_tensors
        dhidden = (dhidden * grad_loss).to(dhidden.dtype)
        return dhidden, (dweight * grad_loss).to(ctx.weight_dtype), None, None, None


class LinearCrossEntropy:
    """Cross-entropy of `hidden @ weight^T`, summed over the labels that are not `IGNORE_INDEX`.

    The caller divides by the number of valid labels in the whole global batch, which no single rank knows from its
    own share.
    """

    def __init__(self, *, chunk_size: int = 4096, compile_backend: str | None = None):
        """chunk_size: tokens whose logits exist at a time, 0 for all. compile_backend: None runs eagerly."""
        self.chunk_size = chunk_size
        self._token_loss: TokenLoss = _loss_and_gradient
        if compile_backend is not None:
            # The last chunk may be shorter; two static shapes are cheaper than one dynamic kernel.
            self._token_loss = torch.compile(_loss_and_gradient, backend=compile_backend, dynamic=False, fullgraph=True)

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden: (batch, seq, dim), weight: (vocab, dim), labels: (batch, seq) int64 -> 0-dim float32 sum."""
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        chunk_size = self.chunk_size or hidden.shape[0]
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _ChunkedLinearCrossEntropy.apply(hidden, weight, labels, chunk_size, self._token_loss)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk, chunk_labels in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            loss += _summed_loss(chunk @ weight.t(), chunk_labels)
        return loss
