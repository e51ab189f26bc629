"""Dry runs, each in a process of its own: torch remembers the meshes of a process group that is gone."""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from trainer.planner.dry_run import DryRun, run_dry


def run_all(
    arguments: Sequence[dict[str, Any]],
    *,
    ends_at: float | None = None,
    run: Callable[..., Any] = run_dry,
) -> list[DryRun]:
    """Return what `run` does with each of these arguments. Processes begin with what is imported here, and as many
    run at a time as there are cores. ends_at: seconds of the monotonic clock, after which those under way are ended.

    Raises:
        ValueError: settings that a run would refuse.
        TimeoutError: it took too long.
        RuntimeError: something else went wrong in one of them.
    """
    context = multiprocessing.get_context("fork")
    at_once = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    # From the end: the last rank of a pipeline has the loss to compute, and would else be waited for alone.
    upcoming = list(enumerate(arguments))
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    results: dict[int, DryRun] = {}
    try:
        while upcoming or running:
            while upcoming and len(running) < at_once:
                place, of_rank = upcoming.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_run_one, args=(there, run, of_rank), daemon=True)
                process.start()
                there.close()
                running[here] = place, process
            done = wait(list(running), None if ends_at is None else max(0.0, ends_at - time.monotonic()))
            if not done:
                raise TimeoutError("there is no time left")
            for ready in done:
                assert isinstance(ready, Connection)
                place, process = running.pop(ready)
                results[place] = _take_result(process, ready)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [results[place] for place in range(len(arguments))]


def _take_result(process: ForkProcess, here: Connection) -> DryRun:
    try:
        result = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process of the planner ended with {process.exitcode}, without a word") from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _run_one(answer: Connection, run: Callable[..., Any], arguments: dict[str, Any]) -> None:
    gc.freeze()  # what was imported before the fork is not looked through for garbage over and over
    result: DryRun | Exception
    try:
        result = run(**arguments)
    except ValueError as error:
        result = ValueError(str(error))
    except Exception:
        result = RuntimeError(f"the planner failed:\n{traceback.format_exc()}")
    answer.send(result)
    answer.close()
    os._exit(0)  # no tear-down of what the parent has, too
