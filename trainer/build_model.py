"""From a configuration to a network that is spread over the ranks: the same for a run and for its plan."""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from models.registry import get_model_spec
from trainer.config.schema import JobConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.pipeline_stages import Stage
from trainer.parallelize import parallelize


class BuiltModel(NamedTuple):
    """A network on the meta device, parallelized, without weights yet."""

    args: Any
    """Its sizes."""
    model: nn.Module
    """The network, or what this rank has of it."""
    stages: list[Stage]
    """Its pipeline stages here, if any."""
    names: list[str]
    """Of all parameters, elsewhere too."""


def build_model(config: JobConfig, dims: ParallelDims) -> BuiltModel:
    """Build the network of a run on the meta device, and spread it over the meshes of `dims`."""
    spec = get_model_spec(config.model.name)
    seq_len = max(config.training.seq_len, config.validation.seq_len if config.validation.enable else 0)
    args = dataclasses.replace(
        spec.get_args(config.model.flavor),
        max_seq_len=seq_len,
        attn_mask_type=config.model.attn_mask_type,
        **config.model.get_changes(),
    )
    with torch.device("meta"):
        model = spec.load_model_class()(args)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, config.training.dtype))
    names = [name for name, _ in model.named_parameters()]
    stages = parallelize(model, plan=spec.build_plan(args), dims=dims, config=config)
    return BuiltModel(args, model, stages, names)
