"""Run a function on several processes of one process group, inside a test.

Processes come from a fork server that has torch imported, so that a test costs tenths of a second rather than the
seconds per rank that fresh interpreters take. Functions that allow it run on the same processes one after another, each with a
process group of its own: starting a process and training in it for the first time takes a good part of a short test.
"""

import atexit
import contextlib
import faulthandler
import gc
import itertools
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
    reuse: bool = False,
) -> list[Any]:
    """Run `fn(*args)` on `world_size` processes of one process group and return what each returned, by rank.

    `fn` must be importable (a module-level function); it, `args` and the results travel by pickle, tensors by value.
    Inside, `torch.distributed` is initialized and RANK, LOCAL_RANK and WORLD_SIZE are set.

    reuse: on the processes that the last such call left, if there are as many. For functions that leave nothing behind but what
    `_Beginning` knows of: no handlers of signals or logging, no threads, no patched modules. Never with NCCL.

    Raises:
        RankFailedError: a rank raised (with its traceback), died (with its exit code), or was still running after
            `timeout` seconds (with the Python stacks of those that were).
    """
    payload = pickle.dumps((fn, args))
    if reuse and "nccl" not in backend:
        ranks = _keep_ranks(world_size, backend)
        try:
            return ranks.run(payload, timeout)
        except BaseException:
            _close_kept()
            raise
    with contextlib.closing(_Ranks(world_size, backend)) as ranks:
        return ranks.run(payload, timeout)


class _Ranks:
    """Processes that run one function after another."""

    def __init__(self, world_size: int, backend: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        # Defaults that look for an accelerator find none without NCCL, so that a test does the same on every machine.
        visible_gpus = _VISIBLE_GPUS if "nccl" in backend else ""
        self.kind = (world_size, backend)
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks_")
        self._processes, self._pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_rank,
                args=(theirs, rank, world_size, backend, visible_gpus, self._scratch.name),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, payload: bytes, timeout: float) -> list[Any]:
        """Run a function and its arguments, pickled."""
        deadline = time.monotonic() + timeout
        for pipe in self._pipes:
            # One that died says so when its report is read.
            with contextlib.suppress(OSError):
                pipe.send_bytes(payload)
        return _collect(self._processes, self._pipes, deadline, timeout, Path(self._scratch.name))

    def close(self) -> None:
        """Kill them, whatever they do."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._scratch.cleanup()


_kept: _Ranks | None = None


def _keep_ranks(world_size: int, backend: str) -> _Ranks:
    """Return processes that stay for the next function, where it asks for as many."""
    global _kept
    if _kept is None or _kept.kind != (world_size, backend):
        _close_kept()
        _kept = _Ranks(world_size, backend)
    return _kept


@atexit.register
def _close_kept() -> None:
    global _kept
    ranks, _kept = _kept, None
    if ranks is not None:
        ranks.close()


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
            except (EOFError, ConnectionResetError):
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
    pipe: Connection, rank: int, world_size: int, backend: str, visible_gpus: str | None, scratch: str
) -> None:
    """What each process runs. It ends with `os._exit`: an interpreter with threads in gloo takes a second to shut down."""
    try:
        with open(_stack_file(Path(scratch), rank), "w") as stacks:
            faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
            _set_visible_gpus(visible_gpus)
            beginning = None
            for number in itertools.count():
                payload = pipe.recv_bytes()
                try:
                    beginning = beginning or _Beginning()
                    result = _call(payload, rank, world_size, backend, f"{scratch}/store_{number}")
                    message = pickle.dumps((True, result))
                    del result
                except BaseException:
                    pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
                    break
                pipe.send_bytes(message)
                beginning.restore()
    finally:
        os._exit(1)


def _set_visible_gpus(visible_gpus: str | None) -> None:
    """Say which GPUs this process sees, before it asks. None: all."""
    if visible_gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus


def _call(payload: bytes, rank: int, world_size: int, backend: str, store: str) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    fn, args = pickle.loads(payload)
    result = fn(*args)
    # No rank leaves while another still talks to it; a test of the process group itself may have ended it.
    if dist.is_initialized():
        dist.barrier()
    return result


class _Beginning:
    """What a process was like before its first function, for the next to find it so."""

    def __init__(self) -> None:
        import torch._dynamo.config
        import torch._functorch.config
        import torch._inductor.config

        self._environment = dict(os.environ)
        self._random_state = torch.get_rng_state()
        configs = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
        self._configs = [(config, config.get_config_copy()) for config in configs]

    def restore(self) -> None:
        """Forget compiled code, process groups, and what DTensor remembers of meshes that had them."""
        import torch
        import torch.distributed as dist
        from torch.distributed.tensor._collective_utils import MeshTopoInfo
        from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
        from torch.distributed.tensor._sharding_prop import ShardingPropagator
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        torch._dynamo.reset()
        gc.collect()  # models, while their process groups are there
        if dist.is_initialized():
            dist.destroy_process_group()
        # A mesh that one of these still had would keep its groups, and each of gloo's has threads that wake 100 times a second.
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()
        _gen_transform_infos.cache_clear()
        MeshTopoInfo.build_from_mesh.cache_clear()
        ShardingPropagator._propagate_tensor_meta_cached.cache_clear()
        gc.collect()
        torch.set_rng_state(self._random_state)
        os.environ.clear()
        os.environ.update(self._environment)
        for config, settings in self._configs:
            for key, value in config.get_config_copy().items():
                if value != settings[key]:
                    setattr(config, key, settings[key])
