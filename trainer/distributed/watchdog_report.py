"""What one process of a run is in: its step, its place in the source, the collective it waits in. Travels as JSON."""

import contextlib
import json
import pickle
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

_TORCH = Path(torch.__file__).parent
_STDLIB = sysconfig.get_path("stdlib")
_HERE = str(Path(__file__).with_name("watchdog"))
# A frame of one of these files, with nothing of the caller's inside it, is in a collective.
_DECORATOR_FILE = str(_TORCH / "distributed/c10d_logger.py")
_COLLECTIVE_FILES = (
    *(
        str(_TORCH / "distributed" / f"{name}.py")
        for name in ("distributed_c10d", "_functional_collectives", "rendezvous")
    ),
    _DECORATOR_FILE,
    str(Path(__file__).with_name("transfers.py")),
)
# What the flight recorder calls by a name that no caller has written.
_WRITTEN_NAMES = {
    "_all_gather_base": "all_gather_into_tensor",
    "_reduce_scatter_base": "reduce_scatter_tensor",
    "all_reduce_barrier": "barrier",
}
# The recorder asks the device what is done; a broken one may never answer.
_DEADLINE = 2.0  # seconds
_P2P_NAMES = ("send", "recv", "isend", "irecv", "batch_isend_irecv")
_PEER = re.compile(r"(?:send|recv) \d+(?:->|<-)(\d+)")

Run = tuple[int, int, int]
"""Ranks as first, step and count: a group of thousands of ranks is a few of these."""
Line = tuple[CodeType, int]
"""One line of a stack: the code, and the number of the line in its file."""


@dataclass(frozen=True)
class Wait:
    """A collective that a rank has begun and that is not done there."""

    operation: str
    group: str = ""
    """What the group is for, as PyTorch describes it: `mesh_tp` and the like. Empty: not known."""
    group_name: str = ""
    """Backend and PyTorch's own name of the group; with `ranks` it is unique over all processes."""
    sequence: int = 0
    """How many collectives the group had begun with this one. 0: not known."""
    ranks: tuple[Run, ...] = ()
    """Who takes part: the group, or the peers of a send or receive. Empty: all ranks."""
    is_p2p: bool = False
    seconds: float | None = None
    """How long since it was begun. None: not known."""


@dataclass(frozen=True)
class Report:
    """What a rank says of itself. A heartbeat has the first fields only; an answer to a call has all."""

    rank: int
    host: str
    namespace: int
    """Of process ids: where it is the same, `pid` can be looked up."""
    pid: int
    step: int
    phase: str
    progressed: float
    """When the main thread last told of progress, in seconds of the host's clock."""
    posted: float
    """When this was written, by the same clock."""
    answers: int = -1
    """Number of the incident whose call this answers. -1: a heartbeat."""
    place: str = ""
    """Where in the source the main thread is."""
    wait: Wait | None = None
    begun: dict[str, int] = field(default_factory=dict)
    """By backend and name of a group: how many collectives this rank has begun in it."""
    gone: tuple[int, ...] = ()
    """Ranks of this host whose process no longer exists."""
    stopped: tuple[int, ...] = ()
    """Ranks of this host whose process is stopped by a signal or a debugger."""
    end: str = ""
    """How it ended: `finished`, `SIGTERM`, `Ctrl-C`, `lost: ...` (an error about a peer), `failed: ...` (one of its
    own). Empty: it has not."""

    def encode(self) -> str:
        """Return this as JSON, without what has its default value."""
        values = {name: value for name, value in asdict(self).items() if value not in (-1, "", None, {}, ())}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def decode(cls, text: bytes) -> "Report":
        """Return what `encode` wrote."""
        values = {"step": 0, **json.loads(text)}
        for name in ("gone", "stopped"):
            values[name] = tuple(values.get(name, ()))
        if "wait" in values:
            runs = tuple(tuple(run) for run in values["wait"]["ranks"])
            values["wait"] = Wait(**{**values["wait"], "ranks": runs})
        return cls(**values)


def pack_ranks(ranks: Iterable[int]) -> tuple[Run, ...]:
    """Write ascending ranks as runs."""
    packed: list[Run] = []
    for rank in ranks:
        if packed:
            first, step, count = packed[-1]
            if count == 1 or rank == first + step * count:
                packed[-1] = (first, rank - first if count == 1 else step, count + 1)
                continue
        packed.append((rank, 1, 1))
    return tuple(packed)


def unpack_ranks(packed: Iterable[Run]) -> Iterator[int]:
    """Yield the ranks that `pack_ranks` wrote."""
    for first, step, count in packed:
        yield from range(first, first + step * count, step)


# --- stacks ---


def get_main_stack() -> list[Line]:
    """Return the stack of this process's main thread, innermost line first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame is not None:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return lines


def get_traceback_stack(traceback: TracebackType | None) -> list[Line]:
    """Return the lines that an error came through, innermost first."""
    lines = []
    while traceback is not None:
        lines.append((traceback.tb_frame.f_code, traceback.tb_lineno))
        traceback = traceback.tb_next
    return lines[::-1]


def find_collective(stack: Sequence[Line]) -> str | None:
    """Return the collective that a stack is in, by the name under which it was called. None: in no collective."""
    name = None
    for code, _ in stack:
        if code.co_filename not in _COLLECTIVE_FILES:
            break
        if code.co_filename != _DECORATOR_FILE and not code.co_name.startswith("_"):
            name = code.co_name
    return name


def describe_place(stack: Sequence[Line], depth: int = 3) -> str:
    """Return a stack's innermost lines that are neither the standard library's nor PyTorch's nor the watchdog's."""
    foreign = (_STDLIB, str(_TORCH), _HERE, "<")
    own = [line for line in stack if not line[0].co_filename.startswith(foreign)] or list(stack)
    return ", called from ".join(
        f"{code.co_name} ({shorten_path(code.co_filename)}:{number})" for code, number in own[:depth]
    )


def shorten_path(path: str) -> str:
    """Return a path from the working directory on, or its last parts where it is elsewhere."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(Path(*Path(path).parts[-3:]))


# --- collectives ---


def count_begun() -> dict[str, int]:
    """Return how many collectives this rank has begun in each of its groups, by backend and name of the group."""
    begun = {}
    for group, name in list(_world.pg_names.items()):
        for device_type in group._device_types:
            backend: Any = group._get_backend(device_type)
            with contextlib.suppress(RuntimeError):  # a backend that does not count
                begun[f"{backend.name()}/{name}"] = backend._get_sequence_number_for_group()
    return begun


def read_flight_recorder() -> list[dict[str, Any]]:
    """Return the collectives that PyTorch remembers, NCCL's and gloo's, oldest first. Empty where it is off.

    20,000 of them take up to half a second, in which no other thread runs Python: this is for trouble.
    """
    module = torch._C._distributed_c10d
    entries: dict[tuple, dict[str, Any]] = {}
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):  # builds without NCCL have the second alone
        dump = getattr(module, name, None)
        if dump is not None:
            # Those that are done as well: only they show that the parts of their batches are.
            text = dump(includeCollectives=True, includeStackTraces=False, onlyActive=False)
            for entry in pickle.loads(text).get("entries", ()):
                key = (*entry["process_group"], entry["profiling_name"], entry["record_id"], entry["time_created_ns"])
                entries[key] = entry
    return sorted(entries.values(), key=lambda entry: entry["time_created_ns"])


def find_pending(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the oldest collective that is not done. None: all are.

    Sends and receives do not count: the recorder leaves some of them as not done for good (seen on NCCL 2.28). A rank that
    waits in one comes to no later collective either, such as the sum of the losses, and that one counts.
    """
    # The parts of a batch stand before it, and are never marked as done.
    batches = {_get_batch(entry) for entry in entries if "coalesced" in entry["profiling_name"]}
    for entry in entries:
        is_part = "coalesced" not in entry["profiling_name"] and _get_batch(entry) in batches
        if not (is_part or entry["is_p2p"] or entry["retired"]) and entry["state"] != "completed":
            return entry
    return None


def _get_batch(entry: dict[str, Any]) -> tuple:
    """Return what the operations of one batch have in common."""
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    return (entry["pg_id"], entry["process_group"][0], entry["is_p2p"], number)


def describe_entry(entry: dict[str, Any], entries: Iterable[dict[str, Any]]) -> Wait:
    """Return an entry of the recorder as a wait. entries: all of them."""
    name, description = entry["process_group"]
    batch = [entry, *(other for other in entries if other is not entry and _get_batch(other) == _get_batch(entry))]
    backend = entry["profiling_name"].partition(":")[0]
    operations = [each["profiling_name"].partition(":")[2].split(" ")[0] for each in batch]
    operation = next((each for each in operations if each != "coalesced"), "coalesced")
    ranks = get_group_ranks(name)
    if entry["is_p2p"]:
        operation = operation if len(batch) == 1 else "batch_isend_irecv"
        peers = {int(peer) for each in batch for peer in _PEER.findall(each["profiling_name"])}
        ranks = tuple(sorted(ranks[peer] for peer in peers if peer < len(ranks)))
    return Wait(
        operation=_WRITTEN_NAMES.get(operation, operation),
        group="" if description == "undefined" else description,
        group_name=f"{backend}/{name}",
        sequence=0 if entry["is_p2p"] else entry["collective_seq_id"],
        ranks=pack_ranks(ranks),
        is_p2p=entry["is_p2p"],
        seconds=max(0.0, (time.time_ns() - entry["time_created_ns"]) / 1e9),
    )


def get_group_ranks(name: str) -> tuple[int, ...]:
    """Return the global ranks of a process group of this process, by PyTorch's name of it. Empty: no such group."""
    for group, group_name in list(_world.pg_names.items()):
        if group_name == name:
            return tuple(dist.get_process_group_ranks(group))
    return ()


def find_wait(stack: Sequence[Line], *, is_over: bool = False) -> Wait | None:
    """Return what this rank waits in. None: in nothing.

    stack: where its main thread is, or where it was when a collective failed (`is_over`).
    """
    entries = _look_up(read_flight_recorder, seconds=_DEADLINE, default=[])
    name = find_collective(stack)
    entry = (entries[-1] if entries else None) if is_over else find_pending(entries)
    # The recorder misses gloo's sends and receives, and what blocks before it is begun: NCCL, until it is connected.
    if entry is None or (name in _P2P_NAMES and not entry["is_p2p"]):
        return None if name is None else Wait(name)
    wait = describe_entry(entry, entries)
    if name is not None and entry is entries[-1]:
        return replace(wait, operation=name)  # gloo makes some collectives of others
    return wait


def _look_up(function: Callable[[], Any], *, seconds: float, default: Any) -> Any:
    """Return what a function does, or `default` where it takes longer or fails."""
    result = [default]

    def run() -> None:
        with contextlib.suppress(Exception):  # whatever it is, the report goes without
            result[0] = function()

    thread = threading.Thread(target=run, name="watchdog-look-up", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0]
