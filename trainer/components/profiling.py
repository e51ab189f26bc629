"""Traces of time and snapshots of memory, from every rank, every few steps."""

import logging
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from trainer.config.schema import ProfilingConfig

logger = logging.getLogger(__name__)

# Allocations and frees kept for a snapshot, newest last: about 200 bytes each, stacks included.
MEMORY_HISTORY = 200_000


class Profiler(AbstractContextManager):
    """Wraps the training loop; call `step` after each training step.

        with build_profiler(...) as profiler:
            for step in ...:
                train_step()
                profiler.step(step)

    Files are `<folder>/step_N/rank_R.trace.json.gz` (for chrome://tracing or ui.perfetto.dev) and
    `<folder>/step_N/rank_R.pickle` (for pytorch.org/memory_viz). A snapshot is also written when memory runs out.
    """

    def __init__(self, *, trace: "_Trace | None", memory: "_MemorySnapshots | None") -> None:
        self._trace = trace
        self._memory = memory

    def __enter__(self) -> "Profiler":
        if self._memory is not None:
            self._memory.start()
        if self._trace is not None:
            self._trace.start()
        return self

    def is_due(self, step: int) -> bool:
        """Whether the coming call `step(step)` writes a file, which takes time that is no training."""
        return any(part is not None and part.is_due(step) for part in (self._trace, self._memory))

    def step(self, step: int) -> None:
        """Note that `step` is done: a trace or a snapshot is written when it is the turn of this step."""
        if self._trace is not None:
            self._trace.step(step)
        if self._memory is not None:
            self._memory.step(step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._memory is not None:
            if isinstance(error, torch.OutOfMemoryError):
                self._memory.write("out_of_memory")
            self._memory.stop()
        # After a failure the profiler is left as it is: stopping it waits for a device that may hang.
        if self._trace is not None and error is None:
            self._trace.stop()


def build_profiler(*, section: ProfilingConfig, dump_folder: str | Path, rank: int, device: torch.device) -> Profiler:
    """Return the profiler that `section` asks for; with nothing enabled it does nothing.

    Raises:
        ValueError: warm-up and recorded steps do not fit between two traces.
    """
    dump_folder = Path(dump_folder)
    trace, memory = None, None
    if section.enable_profiling:
        trace = _Trace(section=section, folder=dump_folder / section.save_traces_folder, rank=rank, device=device)
    if section.enable_memory_snapshot:
        if device.type == "cuda":
            folder = dump_folder / section.save_memory_snapshot_folder
            memory = _MemorySnapshots(folder=folder, freq=section.profile_freq, rank=rank)
        elif rank == 0:
            logger.warning("profiling.enable_memory_snapshot: only CUDA memory is recorded, so this run writes none")
    return Profiler(trace=trace, memory=memory)


class _Trace:
    """torch.profiler, off but for the last steps before each `profile_freq`-th one of this process."""

    def __init__(self, *, section: ProfilingConfig, folder: Path, rank: int, device: torch.device) -> None:
        freq, warmup, active = section.profile_freq, section.profiler_warmup, section.profiler_active
        if active < 1 or warmup < 0 or freq < warmup + active:
            raise ValueError(
                f"profiling.profile_freq = {freq}: must be at least profiler_warmup + profiler_active ({warmup} + {active}), "
                "and profiler_active at least 1. Raise the first, or lower the others"
            )
        self._folder, self._rank, self._freq = folder, rank, freq
        self._step = self._steps_seen = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=freq - warmup - active, warmup=warmup, active=active),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def start(self) -> None:
        self._profiler.start()

    def is_due(self, step: int) -> bool:
        return (self._steps_seen + 1) % self._freq == 0

    def step(self, step: int) -> None:
        self._step = step
        self._steps_seen += 1
        self._profiler.step()

    def stop(self) -> None:
        # Stopped within its recorded steps, the profiler would hand over a part of them; that is no trace of a step.
        self._profiler.on_trace_ready = None
        self._profiler.stop()

    def _write(self, profiler: Any) -> None:
        folder = self._folder / f"step_{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self._rank}.trace.json.gz"
        begin = time.perf_counter()
        profiler.export_chrome_trace(str(path))
        if self._rank == 0:
            logger.info("wrote the trace %s in %.1f s", path, time.perf_counter() - begin)


class _MemorySnapshots:
    """The allocator's history since the start, with stacks."""

    def __init__(self, *, folder: Path, freq: int, rank: int) -> None:
        if freq < 1:
            raise ValueError(f"profiling.profile_freq = {freq}: must be at least 1 step")
        self._folder, self._freq, self._rank = folder, freq, rank
        self._step = 0

    def start(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_HISTORY)

    def is_due(self, step: int) -> bool:
        return step % self._freq == 0

    def step(self, step: int) -> None:
        self._step = step
        if self.is_due(step):
            self.write(f"step_{step}")

    def write(self, name: str) -> None:
        folder = self._folder / (name if name.startswith("step_") else f"step_{self._step + 1}_{name}")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self._rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        if self._rank == 0 or not name.startswith("step_"):
            logger.info("wrote the memory snapshot %s", path)

    def stop(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)
