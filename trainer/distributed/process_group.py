"""The process group: backend, timeouts and flight recorder."""

import hashlib
import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from trainer.config.errors import UserError
from trainer.config.schema_parallel import CommConfig
from trainer.distributed.compile_cache import guard_compile_cache
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.watchdog import Watchdog

logger = logging.getLogger(__name__)


def open_store(*, comm: CommConfig, rank: int, world_size: int, watchdog: Watchdog | None = None) -> dist.Store:
    """Return the store by which processes find each other, long before there is a group of them.

    One process needs no launcher. Several are found by the variables that torchrun sets (MASTER_ADDR, MASTER_PORT).
    `watchdog` is started, so that it names ranks that do not come, and tells all when one is told to stop.
    """
    if world_size == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    # 1, not world_size: where rank 0 holds the store it would wait here for all others, with no watchdog yet.
    store, _, _ = next(rendezvous("env://", rank, 1, timeout=timeout))
    store.set_timeout(timeout)
    if watchdog is not None:
        watchdog.start(store, rank=rank, world_size=world_size)
    return store


def init_process_group(
    store: dist.Store,
    *,
    comm: CommConfig,
    device_type: str,
    dump_folder: str | Path,
    rank: int = 0,
    world_size: int = 1,
    needs_cpu_backend: bool = False,
) -> None:
    """Start the process group, with the long timeout that set-up and compilation need.

    store: from `open_store`. On CUDA the device must be set before. `needs_cpu_backend` adds gloo for tensors in host memory: CPU
    offload and asynchronous checkpoints.
    """
    if comm.trace_buf_size > 0:
        _enable_flight_recorder(comm, Path(dump_folder))
    else:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # torch records by default
    guard_compile_cache()  # with a process group come DTensors
    backend = get_backend(device_type, needs_cpu_backend)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def get_backend(device_type: str, needs_cpu_backend: bool = False) -> str:
    """Return torch.distributed's backend string for tensors on `device_type`, and on the CPU too where needed.

    Raises:
        ValueError: no backend for this device type.
    """
    if device_type == "cpu":
        return "gloo"
    if device_type == "cuda":
        return "cpu:gloo,cuda:nccl" if needs_cpu_backend else "nccl"
    raise ValueError(f"device type {device_type!r} has no communication backend here: cuda and cpu have")


def check_same_on_all_ranks(values: Mapping[str, str]) -> None:
    """Check that every rank has the same values. Hosts may have settings, data or versions of their own. Collective.

    values: what it is, as a message names it, and its content.

    Raises:
        UserError: on all ranks, where some differ.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in values.items()}
    by_rank: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(by_rank, mine)
    for name in mine:
        others = [rank for rank, theirs in enumerate(by_rank) if theirs[name] != by_rank[0][name]]
        if others:
            raise UserError(
                f"{name} of rank {', '.join(map(str, others))} is not that of rank 0: the run would go wrong without a word. "
                "Give all hosts the same settings, files and versions"
            )


def set_timeouts(dims: ParallelDims, timeout_seconds: float) -> None:
    """Give all groups of this process a new timeout: the short one, once the first steps of this process are done.

    Collective. It waits for all ranks first, so that none still has a first step's slow collective under way.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    timeout = timedelta(seconds=timeout_seconds)
    for group in dims.groups():
        _set_pg_timeout(timeout, group)
    logger.debug("collectives may now take %s s", timeout_seconds)


def _enable_flight_recorder(comm: CommConfig, dump_folder: Path) -> None:
    """Have NCCL keep its last collectives, and write them to the dump folder when one times out.

    Variables that the user has set stay as they are. The file's name goes by both of its spellings, since either is read
    first in one of the supported versions of torch.
    """
    folder = dump_folder / comm.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    prefix = str(folder / comm.save_traces_file_prefix)
    settings = {
        "TORCH_FR_BUFFER_SIZE": str(comm.trace_buf_size),
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        # Time for all ranks to write. torch waits four times as long before it ends the process: 60 s if it were not told.
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "5000",
        # Abort the process on a timeout without tearing communicators down first: tear-down may hang, and lose the dump.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
