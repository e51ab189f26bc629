import pytest

from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed.parallel_dims import ParallelDims


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({}, 1, {"dp_shard": 1}),
        ({}, 8, {"dp_shard": 8}),
        ({"data_parallel_replicate_degree": 2}, 8, {"dp_replicate": 2, "dp_shard": 4}),
        ({"data_parallel_replicate_degree": 8, "data_parallel_shard_degree": 1}, 8, {"dp_replicate": 8, "dp_shard": 1}),
        (
            {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "context_parallel_degree": 2},
            16,
            {"dp_shard": 2, "tp": 2, "pp": 2, "cp": 2},
        ),
    ],
)
def test_shard_degree_takes_what_others_leave(settings: dict, world_size: int, expected: dict) -> None:
    dims = ParallelDims.from_config(ParallelismConfig(**settings), world_size)
    assert dims == ParallelDims(world_size=world_size, **expected)


@pytest.mark.parametrize(
    ("settings", "world_size", "named"),
    [
        ({"data_parallel_shard_degree": 3}, 4, ["data_parallel_shard_degree (3)", "= 3", "4 processes"]),
        ({"tensor_parallel_degree": 3}, 8, ["tensor_parallel_degree (3)", "does not divide the 8 processes"]),
        ({"data_parallel_replicate_degree": 0}, 2, ["data_parallel_replicate_degree (0)"]),
        ({"data_parallel_shard_degree": 0}, 2, ["parallelism.data_parallel_shard_degree = 0"]),
        ({"data_parallel_shard_degree": -2}, 2, ["parallelism.data_parallel_shard_degree = -2"]),
        ({"expert_parallel_degree": 0}, 2, ["parallelism.expert_parallel_degree = 0"]),
        ({"expert_parallel_degree": 3}, 4, ["expert_parallel_degree = 3 must divide", "tensor_parallel_degree = 4"]),
        (
            {"tensor_parallel_degree": 4, "expert_tensor_parallel_degree": 2},
            4,
            ["expert_tensor_parallel_degree = 2 must be 1 or parallelism.tensor_parallel_degree = 4"],
        ),
    ],
)
def test_degrees_that_do_not_fit_are_named(settings: dict, world_size: int, named: list[str]) -> None:
    with pytest.raises(ValueError, match="parallelism") as error:
        ParallelDims.from_config(ParallelismConfig(**settings), world_size)
    assert all(part in str(error.value) for part in named)


def test_ranks_of_one_sequence_or_matrix_read_the_same_data() -> None:
    dims = ParallelDims(world_size=32, pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2)
    assert dims.dp_degree == 4
    assert dims.fsdp == 4
    # tp and cp innermost: 4 ranks in a row share their data; the second stage of the pipeline reads as the first.
    assert [dims.dp_rank_of(rank) for rank in range(32)] == [rank // 4 for rank in range(16)] * 2


def test_one_process_without_group_has_no_mesh() -> None:
    dims = ParallelDims.from_config(ParallelismConfig(), 1)
    dims.build_mesh("cpu")
    assert not dims.has_mesh
    assert dims.dp_rank == 0
    assert dims.loss_group() is None
    assert list(dims.groups()) == []
    with pytest.raises(KeyError, match="fsdp"):
        dims.mesh("fsdp")
