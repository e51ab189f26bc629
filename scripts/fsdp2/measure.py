"""Trains one variant and records its memory and losses, for scripts/fsdp2_benchmark.py. All ranks run this."""

import functools
import sysconfig
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from scripts.fsdp2.variants import Settings, build
from trainer.components.determinism import set_determinism
from trainer.components.environment import describe_environment
from trainer.components.hardware import read_resident_bytes
from trainer.config.schema import DebugConfig

_INTERVAL_SECONDS = 0.02


class MemoryRecorder:
    """Reads memory every 20 ms, in a thread, from its start until it is stopped.

    `samples` has lists of one length: `seconds` since the start, and bytes: `allocated` and `reserved` by PyTorch's allocator
    (None on a CPU), `host`: resident memory of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._began = time.perf_counter()
        self.samples: dict[str, list[Any]] = {"seconds": [], "allocated": [], "reserved": [], "host": []}

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last reading, and end."""
        self._ended.set()
        self._thread.join()
        self._take()

    def seconds(self) -> float:
        """Return the time since the start."""
        return time.perf_counter() - self._began

    def _record(self) -> None:
        while not self._ended.wait(_INTERVAL_SECONDS):
            self._take()

    def _take(self) -> None:
        is_cuda = self._device.type == "cuda"
        self.samples["seconds"].append(round(self.seconds(), 4))
        self.samples["allocated"].append(torch.cuda.memory_allocated(self._device) if is_cuda else None)
        self.samples["reserved"].append(torch.cuda.memory_reserved(self._device) if is_cuda else None)
        self.samples["host"].append(read_resident_bytes())


def measure(variant: str, settings: Settings, device: torch.device, snapshot: Path | None = None) -> dict[str, Any]:
    """Build and train a variant, and return what was seen, as JSON holds it. Collective; figures are rank 0's unless named by rank.

    snapshot: file for the allocator's history, on a GPU.
    """
    set_determinism(debug=DebugConfig(deterministic=True, deterministic_warn_only=True), seed=0, rank=0)
    if snapshot is not None and device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    recorder = MemoryRecorder(device)
    recorder.start()
    built = build(variant, settings, device)
    built_at = recorder.seconds()
    model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in built.model.parameters())
    before = _fingerprint(built.model.parameters())
    peaks = {"setup": _take_peak(device)}
    after_setup = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    losses, step_ends = [], []
    for step in range(settings.steps):
        losses.append(_take_step(built, settings, step, device))
        step_ends.append(round(recorder.seconds(), 4))
    peaks["training"] = _take_peak(device)
    recorder.stop()
    if snapshot is not None and device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
    return {
        "variant": variant,
        "world_size": dist.get_world_size(),
        "environment": describe_environment(device, dist.get_world_size()),
        "losses": losses,
        "model_bytes": model_bytes,
        "optimizer_parameter_bytes": _gather(_count_bytes(_get_parameters(built.optimizer))),
        "allocated_after_setup_bytes": after_setup,
        "peak_bytes_by_rank": {phase: _gather(peak) for phase, peak in peaks.items()},
        "weights_before": before,
        "weights_after": _fingerprint(built.model.parameters()),
        "built_at_seconds": round(built_at, 4),
        "step_end_seconds": step_ends,
        "memory": recorder.samples,
    }


def _take_step(built: Any, settings: Settings, step: int, device: torch.device) -> float:
    """Take an optimizer step. Return the mean loss over all ranks."""
    tokens, labels = _get_batch(settings, step, device)
    built.optimizer.zero_grad()
    loss = F.cross_entropy(built.model(tokens).flatten(0, 1).float(), labels.flatten())
    built.backward(loss)
    built.optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _get_batch(settings: Settings, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and labels of this rank, (batch, seq) each: the bytes of Python's standard library, another piece for each."""
    text = _read_text()
    length = settings.seq_len + 1
    first = (step * dist.get_world_size() + dist.get_rank()) * settings.batch_size
    rows = [
        np.take(text, range(i * length, (i + 1) * length), mode="wrap")
        for i in range(first, first + settings.batch_size)
    ]
    batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
    return batch[:, :-1], batch[:, 1:]


@functools.cache
def _read_text() -> np.ndarray:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)


def _get_parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _count_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the bytes that parameters keep on this rank."""
    storages = {}
    for parameter in parameters:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def _fingerprint(parameters: Iterable[Tensor]) -> list[int]:
    """Return a sum over the bits of all parameters of each rank: another one where a weight is another by a bit."""
    total = 0
    for place, parameter in enumerate(parameters, start=1):
        local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        total += place * int(local.view(torch.int32).sum(dtype=torch.int64))
    return _gather(total)


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _take_peak(device: torch.device) -> dict[str, int | None]:
    """Return the peaks of the allocator since the last call."""
    if device.type != "cuda":
        return {"allocated": None, "reserved": None}
    peak: dict[str, int | None] = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return peak
