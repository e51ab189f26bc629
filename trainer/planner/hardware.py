"""How fast GPUs are at what a step is made of: measured where it could be, and said where not.

H200: our own measurements on one machine (SXM, 700 W, NVLink; docs/benchmarks.md). A long run is at the power limit, so that matrix
products are slower in it than alone: the rates here are those within steps. H100 (SXM): the same chip, limit and NVLink, so the same
rates for products and attention; memory bandwidth as the data sheets' 3.35 to 4.8 TB/s. Its rows are derived, not measured.
Between hosts: 400 Gb/s for each GPU, of which 45 GB/s are taken to arrive; not measured either. CPU offload: PCIe 5.0 x16 by its data
sheet less a fifth; the rate of an update on the CPU is that of the one run measured (1B on two GPUs), whose other times are known.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from trainer.planner.network import Transfer
from trainer.planner.operations import Work

GIB = 2**30
_LAUNCH_SECONDS = 2e-6
"""From one kernel to the next."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates in FLOP/s and bytes/s."""

    name: str
    memory: int
    """Bytes, as torch sees them."""
    bandwidth: float
    """Of elementwise kernels within a step, read and written."""
    peak: float
    """Dense bf16, of the data sheet: what MFU is a share of."""
    cuda_name: str = ""
    """As torch.cuda calls it."""
    multiprocessors: int = 132
    rates: dict[str, float] = field(default_factory=dict)
    """Of large matrix products and of attention, by kind of work."""
    link_bandwidth: float = 347e9
    """Between GPUs of one host, as NCCL's bus bandwidth."""
    link_seconds: float = 41e-6
    """Of a collective without bytes."""
    host_bandwidth: float = 45e9
    """Between hosts, for each GPU."""
    host_seconds: float = 20e-6
    """For each further host in a collective."""

    pcie_bandwidth: float = 50e9
    """Between the host's pinned memory and the device, either way."""
    cpu_bandwidth: float = 25e9
    """Of an update on the CPU, for each rank."""

    def seconds_of(self, work: "Work | Transfer", *, gpus_per_host: int = 8) -> float:
        """Return how long a kernel or a collective takes, if nothing else goes on."""
        if isinstance(work, Transfer):
            return self._transfer_seconds(work, gpus_per_host)
        if work.kind == "host copy":
            return work.bytes / self.pcie_bandwidth
        if work.kind == "host":
            return work.bytes / self.cpu_bandwidth
        moved = work.bytes / self.bandwidth
        if not work.flops:
            return moved + _LAUNCH_SECONDS
        rate = self.rates[work.kind]
        if work.kind.endswith("matmul"):
            rate *= self._fill(*work.shape)
        return max(work.flops / rate, moved) + _LAUNCH_SECONDS

    def _fill(self, m: int, n: int, k: int) -> float:
        """Return the share of the rate that a product (M, N, K) reaches: tiles of 128 x 256 come in waves of one for each
        multiprocessor, and each tile has a beginning and an end that sum nothing.
        """
        if m * n == 0 or k == 0:
            return 1.0
        tiles = math.ceil(m / 128) * math.ceil(n / 256)
        waves = tiles / self.multiprocessors
        return waves / math.ceil(waves) ** 0.5 / max(waves, 1.0) ** 0.5 * (k / (k + 128))

    def _transfer_seconds(self, transfer: Transfer, gpus_per_host: int) -> float:
        n = transfer.degree
        if transfer.kind in ("send", "receive"):
            hosts = {rank // gpus_per_host for rank in transfer.ranks}
            return transfer.bytes / (self.link_bandwidth / 2 if len(hosts) == 1 else self.host_bandwidth)
        hosts = {rank // gpus_per_host for rank in transfer.ranks}
        rounds = {"all-reduce": 2.0}.get(transfer.kind, 1.0)
        share = (n - 1) / n
        bandwidth = self.link_bandwidth
        if len(hosts) > 1:
            bandwidth = min(bandwidth, self.host_bandwidth * max(1, n // len(hosts)))
        return (
            rounds * transfer.bytes * share / bandwidth
            + self.link_seconds
            + (len(hosts) - 1) * self.host_seconds * (0 if len(hosts) == 1 else 1)
        )


_HOPPER_RATES = {
    "matmul": 700e12,
    "float8 matmul": 1180e12,
    "grouped matmul": 593e12,
    "fp32 matmul": 50e12,
    "attention": 510e12,
    "attention backward": 440e12,
}

_SXM: dict[str, Any] = {"peak": 989.4e12, "rates": _HOPPER_RATES}
GPUS = {
    "H200": Gpu("H200", memory=150_109_880_320, bandwidth=3.4e12, cuda_name="NVIDIA H200", **_SXM),
    "H100": Gpu(
        "H100", memory=84_983_021_568, bandwidth=3.4e12 * 3.35 / 4.8, cuda_name="NVIDIA H100 80GB HBM3", **_SXM
    ),
}
"""Known kinds, by name."""
