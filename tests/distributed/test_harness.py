import functools
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.distributed.harness import RankFailedError, run_distributed


def _sum_of_ranks(offset: int) -> torch.Tensor:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return value


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("a key nobody has")
    dist.barrier()


def _exit_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def _leave_early() -> int:
    return dist.get_rank()


def _return_large() -> torch.Tensor:
    return torch.full((1_000_000,), float(dist.get_rank()))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    total = sum(range(world_size)) + 5 * world_size
    assert run_distributed(_sum_of_ranks, world_size, 5) == [torch.tensor([total])] * world_size
    assert run_distributed(_leave_early, world_size) == list(range(world_size))


def test_large_tensors_come_back() -> None:
    results = run_distributed(_return_large, 2)
    assert [r.mean().item() for r in results] == [0.0, 1.0]


def test_failure_names_rank_and_traceback_without_waiting_for_others() -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed.*_fail_on.*a key nobody has"):
        run_distributed(_fail_on, 2, 1)
    assert time.monotonic() - begin < 30


def test_death_names_rank_and_exit_code() -> None:
    with pytest.raises(RankFailedError, match="rank 1 failed: died without a report, exit code 3"):
        run_distributed(_exit_on, 2, 1)


def test_timeout_names_ranks_and_their_stacks() -> None:
    # Rank 0 waits in the final barrier for rank 1.
    with pytest.raises(RankFailedError, match=r"(?s)ranks \[0, 1\] of 2 did not finish within 4.0 s.*_hang_on"):
        run_distributed(_hang_on, 2, 1, timeout=4.0)


def _find_gpus() -> tuple[str | None, bool]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available()


def test_gpus_are_hidden_where_nothing_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert run_distributed(_find_gpus, 2) == [("", False)] * 2


# --- processes that run several functions ---


def _leave_traces() -> tuple[int, dict]:
    """Return this process, and what a function finds in it."""
    import torch._functorch.config as functorch_config
    from torch.distributed.distributed_c10d import _world
    from torch.distributed.tensor.debug import _get_python_sharding_prop_cache_info

    found = {
        "environment": os.environ.get("TRACE"),
        "random": torch.rand(3).tolist(),
        "budget": functorch_config.activation_memory_budget,
        "groups": len(_world.pg_map),
        "shardings": _get_python_sharding_prop_cache_info().currsize,
        "graphs": _double._torchdynamo_orig_callable.__code__ in torch._dynamo.convert_frame.input_codes.seen,
    }
    os.environ["TRACE"] = "here"
    functorch_config.activation_memory_budget = 0.5
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
    distribute_tensor(torch.ones(4), mesh, [Shard(0), Replicate()]).add(1)
    _double(torch.ones(2))
    return os.getpid(), found


@functools.partial(torch.compile, backend="eager")
def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def test_processes_that_are_used_again_have_no_traces_of_the_function_before() -> None:
    first, second = (run_distributed(_leave_traces, 2, reuse=True) for _ in range(2))
    assert first == second, "in the same processes"
    assert first[0][1] | {"random": None} == {
        "environment": None,
        "random": None,
        "budget": 1.0,
        "groups": 1,
        "shardings": 0,
        "graphs": False,
    }
    (other, _), *_ = run_distributed(_leave_traces, 1, reuse=True)
    assert other not in [process for process, _ in first]


def test_processes_of_a_function_that_failed_are_not_used_again() -> None:
    before = run_distributed(_leave_early, 2, reuse=True)
    processes = [process for process, _ in run_distributed(_leave_traces, 2, reuse=True)]
    with pytest.raises(RankFailedError, match="a key nobody has"):
        run_distributed(_fail_on, 2, 1, reuse=True)
    with pytest.raises(RankFailedError, match="died without a report, exit code 3"):
        run_distributed(_exit_on, 2, 1, reuse=True)
    assert run_distributed(_leave_early, 2, reuse=True) == before
    assert not {process for process, _ in run_distributed(_leave_traces, 2, reuse=True)} & {*processes}
