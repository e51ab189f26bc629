import gzip
import json
import logging

import pytest
import torch

from trainer.components.profiling import build_profiler
from trainer.config.schema import ProfilingConfig

CPU = torch.device("cpu")


@pytest.fixture
def cuda_recorder(monkeypatch):
    """What the allocator's history is told, where there is no CUDA: a list of the calls."""
    calls = []

    def record(enabled="all", max_entries=0):
        calls.append(("record", enabled))

    def dump(path):
        with open(path, "w") as file:
            file.write("snapshot")
        calls.append(("dump", path))

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def find_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_trace_is_written_for_the_last_steps_of_each_period(tmp_path):
    section = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)
    with build_profiler(section=section, dump_folder=tmp_path, rank=1, device=CPU) as profiler:
        due = []
        for step in range(1, 12):
            due += [step] if profiler.is_due(step) else []
            with torch.profiler.record_function(f"train_step_{step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step(step)
    folder = tmp_path / "profile_traces"
    assert due == [4, 8]
    assert find_files(folder) == ["step_4/rank_1.trace.json.gz", "step_8/rank_1.trace.json.gz"]
    with gzip.open(folder / "step_8" / "rank_1.trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"train_step_{step}" for step in (7, 8)} <= names
    assert "train_step_6" not in names
    assert "aten::matmul" in names


def test_disabled_profiler_writes_nothing(tmp_path):
    with build_profiler(section=ProfilingConfig(), dump_folder=tmp_path, rank=0, device=CPU) as profiler:
        for step in range(1, 30):
            assert not profiler.is_due(step)
            profiler.step(step)
    assert not find_files(tmp_path)


@pytest.mark.parametrize(("warmup", "active"), [(10, 1), (3, 0), (-1, 1)])
def test_steps_that_do_not_fit_are_refused(tmp_path, warmup, active):
    section = ProfilingConfig(enable_profiling=True, profile_freq=10, profiler_warmup=warmup, profiler_active=active)
    with pytest.raises(ValueError, match=r"profiling\.profile_freq = 10"):
        build_profiler(section=section, dump_folder=tmp_path, rank=0, device=CPU)


def test_memory_snapshots_come_by_frequency(tmp_path, cuda_recorder):
    section = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)
    with build_profiler(section=section, dump_folder=tmp_path, rank=0, device=torch.device("cuda")) as profiler:
        for step in range(1, 6):
            assert profiler.is_due(step) == (step % 2 == 0)
            profiler.step(step)
    assert find_files(tmp_path / "memory_snapshot") == ["step_2/rank_0.pickle", "step_4/rank_0.pickle"]
    assert cuda_recorder[0] == ("record", "all")
    assert cuda_recorder[-1] == ("record", None)


def run_until(error, tmp_path):
    section = ProfilingConfig(enable_memory_snapshot=True, profile_freq=100)
    with build_profiler(section=section, dump_folder=tmp_path, rank=2, device=torch.device("cuda")) as profiler:
        profiler.step(1)
        profiler.step(2)
        raise error


def test_memory_snapshot_is_written_when_memory_runs_out(tmp_path, cuda_recorder):
    with pytest.raises(torch.OutOfMemoryError):
        run_until(torch.OutOfMemoryError("CUDA out of memory"), tmp_path)
    assert find_files(tmp_path) == ["memory_snapshot/step_3_out_of_memory/rank_2.pickle"]


def test_memory_snapshot_is_not_written_for_other_errors(tmp_path, cuda_recorder):
    with pytest.raises(RuntimeError, match="something else"):
        run_until(RuntimeError("something else"), tmp_path)
    assert not find_files(tmp_path)


def test_memory_snapshot_without_cuda_warns_once(tmp_path, caplog):
    section = ProfilingConfig(enable_memory_snapshot=True)
    with caplog.at_level(logging.WARNING):
        for rank in (0, 1):
            build_profiler(section=section, dump_folder=tmp_path, rank=rank, device=CPU)
    assert len(caplog.records) == 1
    assert "enable_memory_snapshot" in caplog.text
