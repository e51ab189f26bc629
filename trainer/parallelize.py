"""The one order in which techniques are applied to a model. Each is one call, and lives in a file of its own."""

import torch.nn as nn

from models.plan import ParallelPlan
from trainer.config.schema import JobConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.compile import apply_compile, compiles_model
from trainer.distributed.fsdp import apply_data_parallel
from trainer.distributed.parallel_dims import ParallelDims


def parallelize(model: nn.Module, *, plan: ParallelPlan, dims: ParallelDims, config: JobConfig) -> None:
    """Spread `model`, still on the meta device, over the meshes of `dims`, in place.

    Afterwards `trainer.distributed.weight_init.init_weights` gives it memory and values.

    Raises:
        ValueError: settings that do not fit the model or each other.
    """
    # Recomputation becomes part of the compiled graph, and both run inside FSDP's hooks, on gathered weights.
    apply_activation_checkpoint(
        model,
        plan=plan,
        section=config.activation_checkpoint,
        compiles_blocks=compiles_model(config.compile),
        dump_folder=config.job.dump_folder,
    )
    apply_compile(model, plan=plan, section=config.compile)
    apply_data_parallel(model, plan=plan, dims=dims, parallelism=config.parallelism, training=config.training)
