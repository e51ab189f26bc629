"""Runs of the program whose processes may die: real ones, with signals, a store of the launcher's, and a launcher like torchrun.

Faults are put in by a `Fault`, at a place inside the run and not at a time, so that a test does the same on any machine.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from tests.distributed.harness import _PRELOAD, _VISIBLE_GPUS
from tests.distributed.training import Run
from trainer.components.run_status import STATUS_FILE

Place = Literal["forward", "data", "save", "saved", "validation", "compile", "start", "prepare"]
Action = Callable[[], None]

# How long torchrun waits after SIGTERM before it kills.
KILL_SECONDS = 30.0


@dataclass(frozen=True)
class Fault:
    """What happens on some ranks at a place of a run.

    place: `forward` of a step; `data`, before its batch is there; `save`, when a rank has written its tensors; `saved`, before rank 0 makes the
    checkpoint whole; `validation`, after its first batch; `compile`; `start`, before the first step;
    `prepare`, before data are prepared, and ranks talk to each other.
    action: an importable function without arguments. step: that is under way; 0 counts for any.
    """

    place: Place
    action: Action
    step: int = 0
    ranks: tuple[int, ...] = (0,)


@dataclass
class Ended:
    """What became of a run."""

    exit_codes: list[int]
    outputs: list[str]
    """stdout and stderr of each rank, in order."""
    seconds: float
    """From the fault (or the start) to the end of the last process."""
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> str:
        return "".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))


class Job(AbstractContextManager):
    """Processes of one run, which a `with` statement does not outlive."""

    def __init__(
        self,
        run: Run,
        world_size: int,
        *overrides: str,
        fault: Fault | None = None,
        kill_seconds: float = KILL_SECONDS,
        on_gpus: bool = False,
    ) -> None:
        """kill_seconds: from SIGTERM to SIGKILL. on_gpus: one for each process, and none otherwise."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.run, self._kill_seconds = run, kill_seconds
        self._began = time.monotonic()
        self._marks = run.folder / f"marks_{time.monotonic_ns()}"
        self._marks.mkdir()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        argv = ["--job.config_file", str(run.config_file), *overrides]
        self.processes = []
        for rank in range(world_size):
            environment = {
                **{
                    "CUDA_VISIBLE_DEVICES": "",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                },
                **{
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                },
            }
            if on_gpus:
                environment["CUDA_VISIBLE_DEVICES"] = _VISIBLE_GPUS or ",".join(map(str, range(world_size)))
            arguments = (argv, environment, fault, self._marks, self._marks / f"{rank}.log")
            process = context.Process(target=_run_rank, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid or 0, number)

    def wait(self, timeout: float = 60.0) -> Ended:
        """Wait for the end as torchrun does: the first process that fails ends the others by SIGTERM, and then SIGKILL."""
        end, killing = time.monotonic() + timeout, None
        while any(process.exitcode is None for process in self.processes):
            assert time.monotonic() < end, f"still running after {timeout} s\n{self._read_output()}"
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            alive = [process for process in self.processes if process.exitcode is None]
            if failed and killing is None:
                killing = time.monotonic() + self._kill_seconds
                for process in alive:
                    process.terminate()
            elif killing is not None and time.monotonic() > killing:
                for process in alive:
                    process.kill()
            time.sleep(0.02)
        marks = [mark.stat().st_mtime for mark in self._marks.glob("fault.*")]
        seconds = time.time() - min(marks) if marks else time.monotonic() - self._began
        codes = [process.exitcode for process in self.processes]
        return Ended(codes, self._read_output(), seconds, read_status(self.run))

    def _read_output(self) -> list[str]:
        return [path.read_text(errors="replace") for path in sorted(self._marks.glob("*.log"))]

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_job(run: Run, world_size: int, *overrides: str, timeout: float = 60.0, **options: Any) -> Ended:
    """Run a job to its end. options: of `Job`."""
    with Job(run, world_size, *overrides, **options) as job:
        return job.wait(timeout)


def read_status(run: Run) -> dict[str, Any]:
    """Return what status.json says; nothing where there is none."""
    import json

    path = run.dump_folder / STATUS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


# --- in the processes ---


def _run_rank(argv: list[str], environment: dict[str, str], fault: Fault | None, marks: Path, log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.environ.update(environment)
    code = 1
    try:
        from trainer.train import main

        rank = int(environment["RANK"])
        with contextlib.ExitStack() as stack:
            if fault is not None:
                stack.enter_context(_inject(fault, marks / f"fault.{rank}", is_hit=rank in fault.ranks))
            code = main(argv, environment)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def _inject(fault: Fault, mark: Path, *, is_hit: bool) -> Iterator[None]:
    """Have the fault happen, once, and leave a mark when it does; if this rank is one that it hits."""
    from unittest import mock

    import torch
    import torch.distributed.checkpoint as dcp

    from trainer.components import checkpoint_files
    from trainer.components.passes import Passes
    from trainer.components.validation import Validator
    from trainer.trainer import Trainer

    at = {"step": 0}

    def strike() -> None:
        if is_hit and not mark.exists() and fault.step in (0, at["step"]):
            mark.touch()
            fault.action()

    def before(owner: Any, name: str, *, act: bool = True, after: bool = False) -> Any:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if isinstance(args[0] if args else None, Trainer):
                at["step"] = args[0].state.step + 1
            if act and not after:
                strike()
            result = original(*args, **kwargs)
            if act and after:
                strike()
            return result

        return mock.patch.object(owner, name, wrapper)

    def watched_batches(validator: Validator) -> Any:
        batches = validator.batches

        def walk() -> Iterator[Any]:
            for batch in batches():
                yield batch
                strike()

        return walk

    class WatchedValidator(Validator):
        def run(self) -> Any:
            with mock.patch.object(self, "batches", watched_batches(self)):
                return super().run()

    original_commit = checkpoint_files.commit

    def commit(folder: Path, step: int, *args: Any) -> Any:
        at["step"] = step  # a save in the background may be of an earlier step than training is at
        strike()
        return original_commit(folder, step, *args)

    patches = {
        "forward": lambda: before(Passes, "forward_backward"),
        "data": lambda: before(Trainer, "_next_batch"),
        "save": lambda: before(dcp.FileSystemWriter, "write_data", after=True),
        "saved": lambda: mock.patch.object(checkpoint_files, "commit", commit),
        "validation": lambda: mock.patch("trainer.trainer.Validator", WatchedValidator),
        "start": lambda: before(Trainer, "_take_steps"),
        "prepare": lambda: before(Trainer, "_build_dataloader"),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(before(Trainer, "train_step", act=False))
        if fault.place == "compile":
            from torch._dynamo import register_backend

            def fault_in_compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
                strike()
                return graph.forward

            register_backend(fault_in_compiler, name="fault_in_compiler")
        else:
            stack.enter_context(patches[fault.place]())
        yield
