"""Dry runs, each in a process of its own: torch remembers the meshes of a process group that is gone."""

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from trainer.planner.dry_run import DryRun, run_dry


def run_all(arguments: Sequence[dict[str, Any]]) -> list[DryRun]:
    """Return what `run_dry` does with each of these arguments. Processes begin with what is imported here, and run two at a time
    or as many as there are cores.

    Raises:
        ValueError: settings that a run would refuse.
        RuntimeError: something else went wrong in one of them.
    """
    context = multiprocessing.get_context("fork")
    at_once = max(1, min(len(arguments), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    results: list[DryRun] = []
    for begin in range(0, len(arguments), at_once):
        started = []
        for of_rank in arguments[begin : begin + at_once]:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run_one, args=(there, of_rank), daemon=True)
            process.start()
            there.close()
            started.append((process, here))
        for process, here in started:
            try:
                result = here.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"a process of the planner ended with {process.exitcode}, without a word") from None
            process.join()
            if isinstance(result, Exception):
                raise result
            results.append(result)
    return results


def _run_one(answer: Connection, arguments: dict[str, Any]) -> None:
    result: DryRun | Exception
    try:
        result = run_dry(**arguments)
    except ValueError as error:
        result = ValueError(str(error))
    except Exception:
        result = RuntimeError(f"the planner failed:\n{traceback.format_exc()}")
    answer.send(result)
    answer.close()
    os._exit(0)  # no tear-down of what the parent has, too
