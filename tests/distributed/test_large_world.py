"""The code path of a very large run: 16,384 ranks of a fake process group, of which one is looked at at a time."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.registry import get_model_spec
from tests.distributed.harness import run_distributed
from trainer.config.schema import JobConfig
from trainer.config.schema_parallel import ActivationCheckpointConfig, ParallelismConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.parallelize import parallelize

TP, PP, CP, DP = 8, 16, 4, 32
WORLD_SIZE = TP * PP * CP * DP


def parallelize_405b(rank: int) -> tuple[list[str], int, dict[str, tuple[int, ...]]]:
    """Spread Llama 3 405B over all ranks as `rank` does; return names and number of its parameters, and its meshes' ranks."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
    parallelism = ParallelismConfig(
        tensor_parallel_degree=TP,
        pipeline_parallel_degree=PP,
        context_parallel_degree=CP,
        pipeline_parallel_schedule="Interleaved1F1B",
    )
    dims = ParallelDims.from_config(parallelism, WORLD_SIZE)
    dims.build_mesh("cpu")
    spec = get_model_spec("llama3")
    args = spec.get_args("405B")
    with torch.device("meta"):
        model = spec.load_model_class()(args)
    config = JobConfig(parallelism=parallelism, activation_checkpoint=ActivationCheckpointConfig(mode="full"))
    parallelize(model, plan=spec.build_plan(args), dims=dims, config=config)
    parameters = dict(model.named_parameters())
    local_elements = sum(p.to_local().numel() for p in parameters.values() if isinstance(p, DTensor))
    meshes = {name: tuple(dims.mesh(name).mesh.flatten().tolist()) for name in ("pp", "dp", "fsdp", "cp", "tp", "loss")}
    dist.destroy_process_group()
    return sorted(parameters), local_elements, meshes


@pytest.mark.parametrize("rank", [0, 12_345, WORLD_SIZE - 1])
def test_405b_is_spread_over_16384_ranks(rank: int) -> None:
    names, local_elements, meshes = run_distributed(parallelize_405b, 1, rank, timeout=60.0)[0]
    ranks_of_stage = WORLD_SIZE // PP
    stage, place = divmod(rank, ranks_of_stage)
    assert meshes["tp"] == tuple(range(rank // TP * TP, rank // TP * TP + TP))
    assert meshes["pp"] == tuple(place + ranks_of_stage * i for i in range(PP))
    assert meshes["fsdp"] == tuple(range(rank % TP + ranks_of_stage * stage, ranks_of_stage * (stage + 1), TP))
    assert meshes["cp"] == tuple(rank // (TP * CP) * TP * CP + rank % TP + TP * i for i in range(CP))
    assert meshes["dp"] == tuple(ranks_of_stage * stage + place % (TP * CP) + TP * CP * i for i in range(DP))
    assert len(meshes["loss"]) == WORLD_SIZE // TP
    assert rank in meshes["loss"]
    # 126 blocks in 32 stages, of which a rank has two; the first has the embedding, and the last the output.
    layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
    assert 6 <= len(layers) <= 9
    assert ("tok_embeddings.weight" in names) == (stage == 0)
    assert ("output.weight" in names) == (stage == PP - 1)
    elements = get_model_spec("llama3").get_args("405B").n_params()
    assert local_elements == pytest.approx(elements / WORLD_SIZE, rel=0.5)
