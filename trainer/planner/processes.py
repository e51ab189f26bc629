"""Dry runs, each in a process of its own: torch remembers the meshes of a process group that is gone."""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

from trainer.planner.dry_run import DryRun, run_dry


def run_all(
    arguments: Sequence[dict[str, Any]],
    *,
    ends_at: float | None = None,
    run: Callable[..., Any] = run_dry,
) -> list[DryRun]:
    """Return what `run` does with each of these arguments. Processes begin with what is imported here, and run two at a time
    or as many as there are cores. ends_at: seconds of the monotonic clock, after which those under way are ended.

    Raises:
        ValueError: settings that a run would refuse.
        TimeoutError: it took too long.
        RuntimeError: something else went wrong in one of them.
    """
    context = multiprocessing.get_context("fork")
    at_once = max(1, min(len(arguments), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    results: list[DryRun] = []
    for begin in range(0, len(arguments), at_once):
        started: list[tuple[ForkProcess, Connection]] = []
        try:
            for of_rank in arguments[begin : begin + at_once]:
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_run_one, args=(there, run, of_rank), daemon=True)
                process.start()
                there.close()
                started.append((process, here))
            results += [_take_result(process, here, ends_at) for process, here in started]
        finally:
            for process, _ in started:  # all have ended by themselves, unless one of them failed or took too long
                process.kill()
                process.join()
    return results


def _take_result(process: ForkProcess, here: Connection, ends_at: float | None) -> DryRun:
    if not here.poll(None if ends_at is None else max(0.0, ends_at - time.monotonic())):
        raise TimeoutError("there is no time left")
    try:
        result = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process of the planner ended with {process.exitcode}, without a word") from None
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
