"""What the device can do and how full it is."""

import logging
import os
import re
import resource
import sys
from dataclasses import dataclass

import torch

from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

GIB = 2**30

# Dense bf16 FLOP/s by words of the device's name; the first match counts, so longer names stand first. NVIDIA's data
# sheets state tensor-core rates with 2:4 sparsity, twice the dense rate: halved here. AMD states dense rates.
_PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2.5e15),  # NVIDIA GB200 NVL72 data sheet: 5 PF sparse a GPU
    ("B200", 2.25e15),  # NVIDIA DGX B200 data sheet: 36 PF sparse for 8
    ("GH200", 989.4e12),  # NVIDIA GH200 data sheet
    ("H200 NVL", 835.5e12),  # NVIDIA H200 data sheet: 1,671 TF sparse
    ("H200", 989.4e12),  # NVIDIA H200 data sheet: 1,979 TF sparse
    ("H100 NVL", 835.5e12),  # NVIDIA H100 NVL data sheet: 1,671 TF sparse
    ("H100 PCIe", 756.5e12),  # NVIDIA H100 data sheet: 1,513 TF sparse
    ("H100", 989.4e12),  # NVIDIA H100 data sheet, SXM: 1,979 TF sparse
    ("H800", 989.4e12),  # NVIDIA H800: the compute of an H100 SXM
    ("H20", 148e12),  # NVIDIA H20 data sheet
    ("A100", 312e12),  # NVIDIA A100 data sheet
    ("A800", 312e12),  # NVIDIA A800: the compute of an A100
    ("A40", 149.7e12),  # NVIDIA A40 data sheet
    ("A10G", 70e12),  # AWS G5: 140 TF sparse
    ("A10", 125e12),  # NVIDIA A10 data sheet
    ("L40S", 362e12),  # NVIDIA L40S data sheet: 733 TF sparse
    ("L40", 181e12),  # NVIDIA L40 data sheet: 362 TF sparse
    ("L4", 121e12),  # NVIDIA L4 data sheet: 242 TF sparse
    ("RTX 4090", 165.2e12),  # NVIDIA Ada whitepaper, table 2: bf16 with fp32 accumulation
    ("RTX 3090", 71e12),  # NVIDIA Ampere GA102 whitepaper, table 3
    ("MI355X", 2.5e15),  # AMD Instinct MI355X data sheet
    ("MI350X", 2.3e15),  # AMD Instinct MI350X data sheet
    ("MI325X", 1307.4e12),  # AMD Instinct MI325X data sheet
    ("MI300X", 1307.4e12),  # AMD Instinct MI300X data sheet
    ("MI250X", 191.5e12),  # AMD Instinct MI250X data sheet: 383 TF for the two dies that show as two devices
)


def get_peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of the device with this name, or None if it is not known.

    A slice of a GPU (MIG) and a laptop's GPU have only a part of the peak, so they count as unknown.
    """
    if re.search(r"\b(MIG|Laptop)\b", device_name, re.IGNORECASE):
        return None
    for name, flops in _PEAK_BF16_FLOPS:
        if re.search(rf"\b{name}(?!\w)", device_name, re.IGNORECASE):
            return flops
    return None


def get_device_name(device: torch.device) -> str:
    """Return the marketing name of an accelerator, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class MemoryUse:
    """Memory since the last reading: GiB, percent of what there is, and how often the allocator came to its limit."""

    gib: float
    percent: float
    active_gib: float
    retries: int = 0
    out_of_memory: int = 0


class MemoryMonitor:
    """Reads the memory of one device; on a CPU, the resident memory of this process.

    On CUDA the figure is the peak of what the caching allocator had reserved since the last reading. What other
    libraries take (NCCL, cuBLAS work space of other processes) is not in it. `retries` counts how often the allocator
    had to give cached blocks back and try again since the run began, which is slow; `out_of_memory` how often it failed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warned_retries = 0
        if device.type == "cuda":
            self._total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._total = get_host_memory()

    def read(self) -> MemoryUse:
        """Return the use since the last reading, and begin a new one."""
        if self._device.type != "cuda":
            used = read_resident_bytes()
            return MemoryUse(gib=used / GIB, percent=100 * used / self._total, active_gib=used / GIB)
        stats = torch.cuda.memory_stats(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        reserved = stats.get("reserved_bytes.all.peak", 0)
        use = MemoryUse(
            gib=reserved / GIB,
            percent=100 * reserved / self._total,
            active_gib=stats.get("active_bytes.all.peak", 0) / GIB,
            retries=stats.get("num_alloc_retries", 0),
            out_of_memory=stats.get("num_ooms", 0),
        )
        if use.retries > self._warned_retries:
            self._warned_retries = use.retries
            logger.warning("memory is nearly full: the allocator had to free its cache (%d times so far)", use.retries)
        return use


def get_host_memory() -> int:
    """Return the memory of this host in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_resident_bytes() -> int:
    """Resident memory of this process in bytes, now; its peak where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def use_device(local_rank: int) -> torch.device:
    """Return this process's device, made the current one: a GPU where there is one, else the CPU.

    Raises:
        ValueError: more processes on this host than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this host has no GPU: there are {count}. Start at most {count} (NGPU)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
