import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from trainer.distributed.parallel_dims import ParallelDims


def _meshes_of(degrees: dict[str, int], names: list[str]) -> dict[str, list[int]]:
    dims = ParallelDims(world_size=dist.get_world_size(), **degrees)
    dims.build_mesh("cpu")
    assert dims.dp_rank == dims.dp_rank_of(dist.get_rank())
    return {name: dims.mesh(name).mesh.flatten().tolist() for name in names}


def _absent(degrees: dict[str, int], name: str) -> bool:
    dims = ParallelDims(world_size=dist.get_world_size(), **degrees)
    dims.build_mesh("cpu")
    try:
        dims.mesh(name)
    except KeyError:
        return True
    return False


@pytest.mark.parametrize(
    ("degrees", "of_rank_0", "of_last_rank"),
    [
        ({"dp_shard": 4}, {"fsdp": [0, 1, 2, 3], "dp": [0, 1, 2, 3], "loss": [0, 1, 2, 3]}, {"fsdp": [0, 1, 2, 3]}),
        (
            {"dp_replicate": 2, "dp_shard": 2},
            {"dp_replicate": [0, 2], "fsdp": [0, 1], "hsdp": [0, 1, 2, 3], "loss": [0, 1, 2, 3], "dp": [0, 1, 2, 3]},
            {"dp_replicate": [1, 3], "fsdp": [2, 3]},
        ),
        ({"dp_replicate": 4}, {"dp_replicate": [0, 1, 2, 3], "fsdp": [0], "loss": [0, 1, 2, 3]}, {"fsdp": [3]}),
        ({"dp_shard": 2, "cp": 2}, {"fsdp": [0, 1, 2, 3], "dp": [0, 2], "cp": [0, 1]}, {"dp": [1, 3], "cp": [2, 3]}),
        ({"dp_shard": 2, "tp": 2}, {"fsdp": [0, 2], "tp": [0, 1], "loss": [0, 2]}, {"fsdp": [1, 3], "tp": [2, 3]}),
        (
            {"dp_shard": 2, "pp": 2},
            {"fsdp": [0, 1], "pp": [0, 2], "dp": [0, 1], "loss": [0, 1, 2, 3]},
            {"fsdp": [2, 3], "pp": [1, 3]},
        ),
    ],
    ids=str,
)
def test_meshes_hold_the_right_ranks(degrees: dict, of_rank_0: dict, of_last_rank: dict) -> None:
    results = run_distributed(_meshes_of, 4, degrees, list(of_rank_0))
    assert results[0] == of_rank_0
    assert {name: results[3][name] for name in of_last_rank} == of_last_rank


def _expert_meshes_of(degrees: dict[str, int]) -> dict[str, list[int]]:
    dims = ParallelDims(world_size=dist.get_world_size(), **degrees)
    dims.build_mesh("cpu")
    dims.build_expert_mesh()
    names = [name for name in ("efsdp", "ep", "etp", "ehsdp", "experts") if name in dims._meshes]
    return {name: dims.mesh(name).mesh.flatten().tolist() for name in names}


@pytest.mark.parametrize(
    ("degrees", "of_rank_0"),
    [
        ({"dp_shard": 4, "ep": 2}, {"efsdp": [0, 2], "ep": [0, 1], "experts": [0, 1]}),
        ({"dp_shard": 2, "cp": 2, "ep": 4}, {"efsdp": [0], "ep": [0, 1, 2, 3], "experts": [0, 1, 2, 3]}),
        ({"dp_shard": 2, "tp": 2, "ep": 2}, {"efsdp": [0, 2], "ep": [0, 1], "experts": [0, 1]}),
        (
            {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
            {"efsdp": [0], "ep": [0, 2], "etp": [0, 1], "experts": [0, 1, 2, 3]},
        ),
        ({"dp_shard": 2, "tp": 2}, {"efsdp": [0, 1, 2, 3]}),
        (
            {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
            {"efsdp": [0], "ep": [0, 1], "ehsdp": [0, 2], "experts": [0, 1]},
        ),
        ({"pp": 2, "dp_shard": 2, "ep": 2}, {"efsdp": [0], "ep": [0, 1], "experts": [0, 1]}),
    ],
    ids=str,
)
def test_experts_see_the_ranks_in_their_own_way(degrees: dict, of_rank_0: dict) -> None:
    assert run_distributed(_expert_meshes_of, 4, degrees)[0] == of_rank_0


def test_axis_of_degree_1_is_absent() -> None:
    assert run_distributed(_absent, 2, {"dp_shard": 2}, "tp") == [True, True]


def _sum_over_loss_group() -> tuple[float, int]:
    dims = ParallelDims(world_size=4, dp_replicate=2, dp_shard=2)
    dims.build_mesh("cpu")
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value, group=dims.loss_group())
    return value.item(), len(list(dims.groups()))


def test_loss_group_adds_up_over_replicas_and_shards() -> None:
    results = run_distributed(_sum_over_loss_group, 4)
    assert [value for value, _ in results] == [6.0] * 4
    assert all(n_groups >= 3 for _, n_groups in results), "the world, the replicas, the shards"
