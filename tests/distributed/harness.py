"""Run a function on several processes of one process group, inside a test.

Processes come from a fork server that has torch imported, so that a test costs tenths of a second rather than the
seconds per rank that fresh interpreters take.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_PRELOAD = ["tests.distributed.preload"]

# Read before any test hides the GPUs from the programs that it starts, of which the fork server may be one.
_VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")

# After one rank has failed the others mostly wait for it in a collective; this long they may still report on their own.
_GRACE_SECONDS = 0.5


class RankFailedError(RuntimeError):
    """A rank raised, died or did not finish. The message names it and holds its traceback."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
) -> list[Any]:
    """Run `fn(*args)` on `world_size` processes of one process group and return what each returned, by rank.

    `fn` must be importable (a module-level function); it, `args` and the results travel by pickle, tensors by value.
    Inside, `torch.distributed` is initialized and RANK, LOCAL_RANK and WORLD_SIZE are set.

    Raises:
        RankFailedError: a rank raised (with its traceback), died (with its exit code), or was still running after
            `timeout` seconds (with the Python stacks of those that were).
    """
    payload = pickle.dumps((fn, args))
    # Defaults that look for an accelerator find none without NCCL, so that a test does the same on every machine.
    visible_gpus = _VISIBLE_GPUS if "nccl" in backend else ""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks_") as scratch:
        processes, pipes = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(writer, payload, rank, world_size, backend, visible_gpus, scratch), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            pipes.append(reader)
        try:
            return _collect(processes, pipes, time.monotonic() + timeout, timeout, Path(scratch))
        finally:
            for process in processes:
                process.kill()
            for process, pipe in zip(processes, pipes, strict=True):
                process.join()
                pipe.close()


def _collect(processes: list, pipes: list[Connection], deadline: float, timeout: float, scratch: Path) -> list[Any]:
    """Wait for a report of every rank, or raise at the first failure."""
    pending = {pipe: rank for rank, pipe in enumerate(pipes)}
    results: list[Any] = [None] * len(pipes)
    failures: dict[int, str] = {}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection), "only pipes are waited for"
            rank = pending.pop(pipe)
            try:
                succeeded, report = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                succeeded, report = False, f"died without a report, exit code {processes[rank].exitcode}"
            if succeeded:
                results[rank] = report
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                failures[rank] = report
    if failures:
        raise RankFailedError("\n".join(f"rank {rank} failed: {report}" for rank, report in failures.items()))
    if pending:
        unfinished = sorted(pending.values())
        raise RankFailedError(
            f"ranks {unfinished} of {len(pipes)} did not finish within {timeout} s\n"
            + _dump_stacks(processes, unfinished, scratch)
        )
    return results


def _dump_stacks(processes: list, ranks: list[int], scratch: Path) -> str:
    """Ask ranks that hang for their Python stacks."""
    for rank in ranks:
        # A rank that has not got as far as opening its file would be killed by the signal.
        if processes[rank].is_alive() and _stack_file(scratch, rank).exists():
            os.kill(processes[rank].pid, signal.SIGUSR2)
    time.sleep(_GRACE_SECONDS)
    stacks = []
    for rank in ranks:
        path = _stack_file(scratch, rank)
        stacks.append(f"rank {rank} was in:\n{path.read_text() if path.exists() else 'its start-up'}")
    return "\n".join(stacks)


def _stack_file(scratch: Path, rank: int) -> Path:
    return scratch / f"stacks_{rank}.txt"


def _run_rank(
    pipe: Connection,
    payload: bytes,
    rank: int,
    world_size: int,
    backend: str,
    visible_gpus: str | None,
    scratch: str,
) -> None:
    """What each process runs. It ends with `os._exit`: an interpreter with threads in gloo takes a second to shut down."""
    exit_code = 0
    try:
        with open(_stack_file(Path(scratch), rank), "w") as stacks:
            faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
            _set_visible_gpus(visible_gpus)
            report = (True, _call(payload, rank, world_size, backend, scratch))
            message = pickle.dumps(report)
    except BaseException:
        exit_code = 1
        message = pickle.dumps((False, "".join(traceback.format_exc())))
    try:
        pipe.send_bytes(message)
        pipe.close()
    finally:
        os._exit(exit_code)


def _set_visible_gpus(visible_gpus: str | None) -> None:
    """Say which GPUs this process sees, before it asks. None: all."""
    if visible_gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus


def _call(payload: bytes, rank: int, world_size: int, backend: str, scratch: str) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{scratch}/store", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    fn, args = pickle.loads(payload)
    result = fn(*args)
    # No rank leaves while another still talks to it; a test of the process group itself may have ended it.
    if dist.is_initialized():
        dist.barrier()
    return result
