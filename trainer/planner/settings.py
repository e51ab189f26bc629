"""What a dry run sets in place of settings that depend on a GPU, on the compiler, or on how long a run goes on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn as nn

from trainer.config.errors import UserError
from trainer.config.schema_parallel import CompileConfig, ParallelismConfig
from trainer.config.schema_quantize import SPEED_FILTER, QuantizeConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.compile_backends import BUILDERS
from trainer.distributed.fsdp import choose_accumulation
from trainer.distributed.parallel_dims import ParallelDims
from trainer.low_precision.speed_table import find_speed_table
from trainer.planner.compiled import build_backend
from trainer.planner.hardware import Gpu
from trainer.planner.recorder import Recorder

_BACKEND = "bloomery_planner"


def find_copy_engine_groups(section: ParallelismConfig, dims: ParallelDims, gpus_per_host: int) -> set[str]:
    """Return the names of the groups that would communicate by copy engines.

    Raises:
        UserError: they have to, and cannot.
    """
    if section.fsdp_collectives == "nccl" or dims.fsdp == 1 or dims.pp > 1:
        return set()
    group = dims.mesh("fsdp").get_group()
    hosts = {rank // gpus_per_host for rank in dist.get_process_group_ranks(group)}
    if len(hosts) == 1:
        return {group.group_name}
    if section.fsdp_collectives == "copy_engine":
        raise UserError(
            f"parallelism.fsdp_collectives = 'copy_engine' cannot be used: the sharding group spans {len(hosts)} hosts of "
            f"{gpus_per_host} GPUs (plan.gpus_per_host). Use 'auto' or 'nccl', or shard within hosts by "
            "parallelism.data_parallel_shard_degree and data_parallel_replicate_degree"
        )
    return set()


def compile_by(recorder: Recorder, section: CompileConfig) -> CompileConfig:
    """Return the settings with the planner's backend, made known by a name of this recorder's, and the same passes over graphs."""
    torch._dynamo.reset()
    name = f"{_BACKEND}_{id(recorder)}"
    registry: Callable[..., Any] = torch._dynamo.register_backend
    registry(build_backend(recorder), name=name)
    BUILDERS[name] = lambda passes, _: build_backend(recorder, passes)
    _, graph_passes = section.get_backend()
    return dataclasses.replace(section, backend=name, model_backend_override=None, graph_passes=graph_passes)


def settle_float8(section: QuantizeConfig, gpu: Gpu) -> QuantizeConfig:
    """Return the settings without the first steps of delayed scaling, which are slower than all others, and with the speeds of `gpu`,
    where layers are chosen by them.

    Raises:
        ValueError: there is no table of them.
    """
    float8 = dataclasses.replace(section.linear.float8, delayed_warmup_steps=0)
    if SPEED_FILTER in float8.filter_fqns:
        float8 = dataclasses.replace(float8, speed_table=str(find_speed_table(float8.speed_table, gpu.cuda_name)))
    return dataclasses.replace(section, linear=dataclasses.replace(section.linear, float8=float8))


def settle_accumulation(
    section: ParallelismConfig, training: TrainingConfig, model: nn.Module, gpu: Gpu
) -> ParallelismConfig:
    """Decide how gradients accumulate as it would be decided on the GPU."""
    device = torch.device("cpu")
    accumulation = choose_accumulation(
        model, parallelism=section, training=training, device=device, device_bytes=gpu.memory
    )
    return dataclasses.replace(section, fsdp_accumulation=accumulation)
