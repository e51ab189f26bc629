"""Output projection and cross-entropy in one, without ever holding the logits of a whole microbatch.

Letters: N tokens, D model width, V vocabulary, v rows of it on this rank (all, without tensor parallelism), C tokens
in a chunk.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from trainer.config.schema_parallel import CompileConfig, ParallelismConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.tensor_collectives import TensorAxis, all_gather, gather_columns

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


def _split_loss_and_gradient(logits: Tensor, labels: Tensor, begin: int, axis: TensorAxis) -> tuple[Tensor, Tensor]:
    """As `_loss_and_gradient`, from this rank's columns of the logits, of which `begin` is the first.

    One all-gather of three numbers a token makes maximum, normalizer and target logit of the whole vocabulary known, so
    that the loss is the same on all ranks, bit for bit.

    logits: (C, v), v may be 0 -> 0-dim float32, (C, v) in the dtype of the logits.
    """
    z = logits.float()
    width = z.shape[-1]
    index = labels - begin
    is_here = (index >= 0) & (index < width)  # nowhere for IGNORE_INDEX
    if width > 0:
        max_here = z.amax(dim=-1)
        target_here = torch.where(is_here, z.gather(-1, index.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1), 0.0)
    else:
        max_here = z.new_full(labels.shape, torch.finfo(torch.float32).min)
        target_here = z.new_zeros(labels.shape)
    exp_z = (z - max_here.unsqueeze(-1)).exp()
    statistics = torch.stack((max_here, exp_z.sum(dim=-1), target_here))
    gathered = all_gather(statistics, 0, axis).view(axis.degree, 3, -1)
    maxima, sums, targets = gathered.unbind(1)  # (degree, C) each
    maximum = maxima.amax(dim=0)
    sum_exp = (sums * (maxima - maximum).exp()).sum(dim=0)
    valid = labels != IGNORE_INDEX
    losses = torch.where(valid, sum_exp.log() + (maximum - targets.sum(dim=0)), 0.0)
    scale = (max_here - maximum).exp() / sum_exp
    is_target = torch.arange(width, device=z.device) == index.unsqueeze(-1)
    gradient = torch.where(valid.unsqueeze(-1), exp_z * scale.unsqueeze(-1) - is_target.float(), 0.0)
    return losses.sum(), gradient.to(logits.dtype)


@torch.library.custom_op("bloomery::accumulate_weight_gradient", mutates_args=("total",))
def _accumulate_weight_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """total (V, D) float32 += dlogits (C, V)^T @ hidden (C, D), without rounding between chunks.

    One operation to the compiler, which does not know products with a dtype of their own for the result (torch 2.11).
    """
    if dlogits.dtype == torch.float32:
        total.addmm_(dlogits.t(), hidden)
    elif total.is_cuda:
        torch.addmm(total, dlogits.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.add_(dlogits.t() @ hidden)


ACCUMULATE_WEIGHT_GRADIENT = torch.ops.bloomery.accumulate_weight_gradient.default
"""The operation, for tables that list some."""


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
            loss = loss + chunk_loss  # not in place: compiled as a part of the model, torch 2.11 would give no gradient
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
    own share. Under tensor parallelism all ranks of `tp_group` compute the same loss, each from its rows of the weight;
    hidden states and labels are the same on all, and the gradient of the hidden states is one part of a sum over them.
    """

    def __init__(
        self,
        *,
        chunk_size: int = 4096,
        compile_backend: str | None = None,
        tp_group: dist.ProcessGroup | None = None,
        loss_parallel: bool = True,
    ):
        """chunk_size: tokens whose logits exist at a time, 0 for all. compile_backend: None runs eagerly.

        tp_group: ranks over which the vocabulary is cut. loss_parallel: each of them keeps to its part of the logits,
        rather than gather those of a chunk.
        """
        self.chunk_size = chunk_size
        self.loss_parallel = loss_parallel
        self._axis = TensorAxis.from_group(tp_group) if tp_group is not None else None
        self._loss_and_gradient = _loss_and_gradient
        self._split_loss_and_gradient = _split_loss_and_gradient
        if compile_backend is not None:
            # The last chunk may be shorter; two static shapes are cheaper than one dynamic kernel.
            compiled = functools.partial(torch.compile, backend=compile_backend, dynamic=False, fullgraph=True)
            self._loss_and_gradient = compiled(_loss_and_gradient)
            self._split_loss_and_gradient = compiled(_split_loss_and_gradient)

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden: (batch, seq, dim), weight: (vocab, dim), labels: (batch, seq) int64 -> 0-dim float32 sum.

        With a `tp_group` the weight is a DTensor on it, cut by rows.
        """
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        chunk_size = self.chunk_size or hidden.shape[0]
        token_loss, weight = self._take_rows(weight)
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _ChunkedLinearCrossEntropy.apply(hidden, weight, labels, chunk_size, token_loss)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk, chunk_labels in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            logits = chunk @ weight.t()
            loss += _summed_loss(logits, chunk_labels) if self._axis is None else token_loss(logits, chunk_labels)[0]
        return loss

    def _take_rows(self, weight: Tensor) -> tuple[TokenLoss, Tensor]:
        """Return this rank's rows of the weight, (v, D), and the token loss that takes logits of them, (C, v)."""
        axis = self._axis
        if axis is None:
            assert not isinstance(weight, DTensor), "a weight under tensor parallelism needs tp_group"
            return self._loss_and_gradient, weight
        assert isinstance(weight, DTensor), "with tp_group the weight is a DTensor"
        assert weight.placements == (Shard(0),), f"the weight is placed as {weight.placements}, not cut by rows"
        vocab_size = weight.shape[0]
        begin, end = axis.part(vocab_size)
        if self.loss_parallel:
            return functools.partial(self._split_loss_and_gradient, begin=begin, axis=axis), weight.to_local()

        def gathered_loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = self._loss_and_gradient(gather_columns(logits, vocab_size, axis), labels)
            return loss, gradient[:, begin:end]

        return gathered_loss_and_gradient, weight.to_local()


def build_loss(
    *, chunk_size: int, compilation: CompileConfig, parallelism: ParallelismConfig, dims: ParallelDims
) -> LinearCrossEntropy:
    """Return the loss of a run. chunk_size: `training.loss_chunk_size`"""
    return LinearCrossEntropy(
        chunk_size=chunk_size,
        compile_backend=compilation.get_loss_backend()
        if compilation.enable and "loss" in compilation.components
        else None,
        tp_group=dims.mesh("tp").get_group() if dims.tp > 1 else None,
        loss_parallel=not parallelism.disable_loss_parallel,
    )
