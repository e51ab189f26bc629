import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from trainer.config.schema_parallel import CommConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.process_group import (
    check_same_on_all_ranks,
    get_backend,
    init_process_group,
    set_timeouts,
)


def _timeouts(dims: ParallelDims) -> set[timedelta]:
    return {group._get_backend(torch.device("cpu")).options._timeout for group in dims.groups()}


def _start_alone(dump_folder: str) -> dict[str, str]:
    dist.destroy_process_group()
    comm = CommConfig(init_timeout_seconds=77, trace_buf_size=123)
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "user"
    init_process_group(dist.HashStore(), comm=comm, device_type="cpu", dump_folder=dump_folder)
    dims = ParallelDims(world_size=1)
    dims.build_mesh("cpu")
    assert _timeouts(dims) == {timedelta(seconds=77)}
    value = torch.ones(1)
    dist.all_reduce(value, group=dims.loss_group())
    assert value.item() == 1.0
    return {name: value for name, value in os.environ.items() if name.startswith("TORCH_")}


def _shorten() -> tuple[set[timedelta], set[timedelta]]:
    dims = ParallelDims(world_size=4, dp_replicate=2, dp_shard=2)
    dims.build_mesh("cpu")
    before = _timeouts(dims)
    set_timeouts(dims, 50)
    return before, _timeouts(dims)


def test_one_process_needs_no_launcher_and_records_collectives(tmp_path: Path) -> None:
    (environment,) = run_distributed(_start_alone, 1, str(tmp_path))
    assert environment["TORCH_FR_BUFFER_SIZE"] == "123"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "comm_traces" / "rank_")
    assert (tmp_path / "comm_traces").is_dir()
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "user", "what the user has set stays"


def _compare(value_of_last: str) -> str:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    try:
        check_same_on_all_ranks({"the weather": "fair", "the data": value_of_last if is_last else "a"})
    except ValueError as error:
        return str(error)
    return ""


def test_what_differs_between_ranks_is_named_on_all_of_them() -> None:
    for message in run_distributed(_compare, 3, "b"):
        assert message.startswith("the data of rank 2 is not that of rank 0")
    assert run_distributed(_compare, 3, "a") == [""] * 3


def _start_without_recorder(dump_folder: str) -> str | None:
    dist.destroy_process_group()
    os.environ.pop("TORCH_FR_BUFFER_SIZE", None)
    init_process_group(dist.HashStore(), comm=CommConfig(trace_buf_size=0), device_type="cpu", dump_folder=dump_folder)
    return os.environ.get("TORCH_FR_BUFFER_SIZE")


def test_buffer_of_no_collectives_turns_the_recorder_off(tmp_path: Path) -> None:
    assert run_distributed(_start_without_recorder, 1, str(tmp_path)) == ["0"]
    assert not (tmp_path / "comm_traces").exists()


def test_set_timeouts_reaches_every_group() -> None:
    for before, after in run_distributed(_shorten, 4):
        assert before != {timedelta(seconds=50)}
        assert after == {timedelta(seconds=50)}


@pytest.mark.parametrize(
    ("device_type", "needs_cpu_backend", "expected"),
    [("cpu", False, "gloo"), ("cpu", True, "gloo"), ("cuda", False, "nccl"), ("cuda", True, "cpu:gloo,cuda:nccl")],
)
def test_backend_fits_device(device_type: str, needs_cpu_backend: bool, expected: str) -> None:
    assert get_backend(device_type, needs_cpu_backend) == expected


def test_unknown_device_type_raises() -> None:
    with pytest.raises(ValueError, match="'tpu'"):
        get_backend("tpu")
