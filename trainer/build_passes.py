"""From a configuration and its network to forward and backward passes: the same for a run and for its plan."""

import torch

from trainer.build_model import BuiltModel
from trainer.components.loss import build_loss
from trainer.components.passes import Passes, build_passes
from trainer.config.schema import JobConfig
from trainer.distributed.compile import compiles_model
from trainer.distributed.parallel_dims import ParallelDims


def build_run_passes(config: JobConfig, built: BuiltModel, *, dims: ParallelDims, device: torch.device) -> Passes:
    """Build what runs batches through a network that has its memory, and what its loss is. device: of the batches"""
    loss_fn = build_loss(
        chunk_size=config.training.loss_chunk_size,
        compilation=config.compile,
        parallelism=config.parallelism,
        dims=dims,
    )
    return build_passes(
        built.model,
        built.stages,
        args=built.args,
        loss_fn=loss_fn,
        dims=dims,
        parallelism=config.parallelism,
        training=config.training,
        splits_backward=config.activation_checkpoint.mode == "none" and not compiles_model(config.compile),
        device=device,
    )
