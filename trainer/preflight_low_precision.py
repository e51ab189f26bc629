"""What keeps a model from being converted, as far as its layers, the device and torch tell, before anything is prepared for a run."""

from typing import Any

import torch

from models.registry import ModelSpec
from trainer.components.hardware import use_device
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_quantize import QuantizeConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.low_precision.convert import check_low_precision, count_tokens


def find_conversion_problem(
    spec: ModelSpec,
    args: Any,
    *,
    converters: list[str],
    quantize: QuantizeConfig,
    parallelism: ParallelismConfig,
    training: TrainingConfig,
    local_rank: int,
    world_size: int,
) -> str | None:
    """Return why `world_size` processes like this one cannot run the model as the settings say, or None if they can.

    The model is built on the meta device, which takes a moment and no memory.
    """
    use_device(local_rank)  # before CUDA is asked anything, which would take memory of the first GPU for each process
    with torch.device("meta"):
        model = spec.load_model_class()(args)
    dims = ParallelDims.from_config(parallelism, world_size)
    tokens, plan = count_tokens(training, parallelism), spec.build_plan(args)
    try:
        check_low_precision(model, converters=converters, quantize=quantize, plan=plan, dims=dims, tokens=tokens)
    except ValueError as error:
        return str(error)
    return None
