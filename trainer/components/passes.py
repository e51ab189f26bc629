"""Forward and backward passes over a batch: one face for the trainer, whatever the model is spread over."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from models.common.attention import build_document_mask
from models.common.multi_token import shift_ahead
from models.common.output import LossFunction
from trainer.components.loss import IGNORE_INDEX
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.fsdp import Accumulation, choose_accumulation, reshard, set_gradient_sync
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.pipeline_parallel import Activations, Pipeline, build_pipeline
from trainer.distributed.pipeline_stages import Stage
from trainer.distributed.sequence_split import SequenceSplit

Batch = dict[str, Tensor]
"""`tokens` and `labels`, (batch, seq) int64, and `positions` where attention stays inside documents."""


class Passes:
    """Runs batches through the model: in one piece, or as a pipeline; whole sequences, or this rank's part of them."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: LossFunction,
        accumulation: Accumulation = "sharded",
        reshard_after_forward: str = "default",
        split: SequenceSplit | None = None,
        pipeline: Pipeline | None = None,
        microbatch_size: int = 1,
        mtp_depth: int = 0,
    ) -> None:
        """loss_fn: summed over valid labels. split: of sequences over the ranks of context parallelism. microbatch_size:
        sequences in a microbatch of the pipeline. mtp_depth: further tokens that each predicts in training.
        """
        self.model = model
        self.loss_fn = loss_fn
        self.accumulation = accumulation
        self.reshard_after_forward = reshard_after_forward
        self.split = split
        self.pipeline = pipeline
        self.microbatch_size = microbatch_size
        self.mtp_depth = mtp_depth

    def count_labels(self, batch: Batch) -> Tensor:
        """Return how many labels of a batch count into this rank's losses, 0-dim. Summed over ranks each counts once."""
        labels = batch["labels"] if self.split is None else self.split.take(batch["labels"])
        count = (labels != IGNORE_INDEX).sum()
        return count if self.pipeline is None or self.pipeline.has_loss else torch.zeros_like(count)

    def forward_backward(self, batch: Batch, valid_tokens: Tensor, *, is_last: bool) -> Tensor:
        """Add the gradients of one batch to the model's. Return this rank's part of the step's mean loss, 0-dim.

        valid_tokens: 0-dim, the labels of the whole step over all ranks; gradients are summed over ranks and batches.
        is_last: whether this is the step's last batch.
        """
        if self.pipeline is not None:
            microbatches = list(self._cut_into_microbatches(batch, trains=True))
            return self.pipeline.forward_backward(
                microbatches, loss_fn=self.loss_fn, valid_tokens=valid_tokens, is_last=is_last
            )
        set_gradient_sync(
            self.model,
            is_last,
            accumulation=self.accumulation,
            reshard_after_forward=self.reshard_after_forward,
        )
        loss = self._get_loss(batch, trains=True) / valid_tokens
        loss.backward()
        return loss.detach()

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, summed over this rank's labels, and their number, 0-dim each."""
        if self.pipeline is not None:
            loss = self.pipeline.evaluate(list(self._cut_into_microbatches(batch, trains=False)), loss_fn=self.loss_fn)
        else:
            loss = self._get_loss(batch, trains=False)
        return loss, self.count_labels(batch)

    def reshard(self) -> None:
        """Free all gathered weights; see `trainer.distributed.fsdp.reshard`."""
        stages = [self.model] if self.pipeline is None else [stage.module for stage in self.pipeline.stages.values()]
        for stage in stages:
            reshard(stage)

    def _get_loss(self, batch: Batch, *, trains: bool) -> Tensor:
        inputs = self._get_inputs(batch, trains)
        return self.model(inputs.pop("tokens"), **inputs, loss_fn=self.loss_fn)

    def _cut_into_microbatches(self, batch: Batch, *, trains: bool) -> Iterator[dict[str, Any]]:
        """Yield the inputs of each microbatch of the pipeline. The last may be smaller."""
        rows = self.microbatch_size
        for begin in range(0, batch["tokens"].shape[0], rows):
            yield self._get_inputs({name: tensor[begin : begin + rows] for name, tensor in batch.items()}, trains)

    def _get_inputs(self, batch: Batch, trains: bool) -> dict[str, Any]:
        """Return tokens, labels, positions and mask of this rank's part of a batch, and in training what is further ahead."""
        positions = batch.get("positions")
        mask = None
        if positions is not None:
            mask = (
                self.split.build_mask(positions)
                if self.split is not None
                else build_document_mask(positions, device_type=positions.device.type)
            )
        local = batch if self.split is None else self.split.split(batch)
        ahead = self._look_ahead(batch) if trains and self.mtp_depth else {}
        return {**local, **ahead, "mask": mask}

    def _look_ahead(self, batch: Batch) -> dict[str, Tensor]:
        """Return what multi-token prediction predicts from what, of this rank's part: from whole sequences, since what is ahead of
        a part may be another rank's.
        """
        whole = shift_ahead(batch["tokens"], batch["labels"], depth=self.mtp_depth, positions=batch.get("positions"))
        tokens, labels = whole if self.split is None else map(self.split.take, whole)
        return {"mtp_tokens": tokens, "mtp_labels": labels}


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-dim tensors."""
    return torch.stack(list(values)).sum()


def build_passes(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    args: Any,
    loss_fn: LossFunction,
    dims: ParallelDims,
    parallelism: ParallelismConfig,
    training: TrainingConfig,
    splits_backward: bool,
    device: torch.device,
) -> Passes:
    """Return the passes of a parallelized model.

    stages: what `trainer.parallelize.parallelize` returned. args: of the model; a pipeline needs their `dim`, the width of the
    hidden states, and multi-token prediction is told by `mtp_depth`. splits_backward: whether a block's backward pass can be done
    in two parts, which one that is compiled or recomputes its activations cannot.

    Raises:
        ValueError: a pipeline without `dim`, or one that cannot be run.
    """
    dim = getattr(args, "dim", None)
    accumulation = choose_accumulation(model, parallelism=parallelism, training=training, device=device)
    pipeline = None
    if stages:
        if dim is None:
            raise ValueError(
                "parallelism.pipeline_parallel_degree > 1 needs the width of the hidden states: give the model's args a `dim`, "
                "or set the degree to 1"
            )
        dtype = getattr(torch, training.mixed_precision_param)
        # Gradients of the parameters come by way of shards, which a second part of a backward pass would not find.
        splits_backward = splits_backward and parallelism.data_parallel_implementation != "simple_fsdp"
        pipeline = build_pipeline(
            stages,
            group=dims.mesh("pp").get_group(),
            activations=Activations(dim, dtype, device, seq_parts=dims.tp),
            parallelism=parallelism,
            accumulation=accumulation,
            splits_backward=splits_backward,
        )
    return Passes(
        model,
        loss_fn=loss_fn,
        accumulation=accumulation,
        reshard_after_forward=parallelism.fsdp_reshard_after_forward,
        split=SequenceSplit.from_config(dims.mesh("cp"), parallelism) if dims.cp > 1 else None,
        pipeline=pipeline,
        microbatch_size=parallelism.pipeline_parallel_microbatch_size,
        mtp_depth=getattr(args, "mtp_depth", 0),
    )
