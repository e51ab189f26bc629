"""Before training begins: is a device or a link much slower than those of the other ranks?

Each rank times a matrix product, then exchanges data with its two neighbours by rank, all pairs at once, then all reduce together.
One figure of the whole says nothing about who is to blame, hence the pairs: a slow host is slow towards both sides.
"""

import logging
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# Below this share of the median a figure is told.
_SLOW_MATMUL, _SLOW_LINK = 0.85, 0.6
_SHARE_OF_MATMUL = 0.5


@dataclass(frozen=True)
class Figures:
    """What a rank measured. flops: of a matrix product, per second. link: bytes/s each way with the next rank; None for the last."""

    host: str
    flops: float
    link: float | None


@dataclass(frozen=True)
class _Sizes:
    matrix: int
    bytes_of_link: int
    dtype: torch.dtype


def run_startup_probe(seconds: float, device: torch.device) -> list[str]:
    """Measure all ranks for about `seconds`, log the medians on the first, and warn of ranks and links that are slow. Collective.

    Returns: the warnings, on every rank.
    """
    sizes = _Sizes(8192, 1 << 28, torch.bfloat16) if device.type == "cuda" else _Sizes(256, 1 << 20, torch.float32)
    flops = _time_matmul(seconds * _SHARE_OF_MATMUL, sizes, device)
    links = _time_links(seconds * (1 - _SHARE_OF_MATMUL) / 3, sizes, device)
    reduced = _time_all_reduce(seconds * (1 - _SHARE_OF_MATMUL) / 3, sizes, device)
    figures: list[Figures] = [Figures("", 0.0, None)] * dist.get_world_size()
    dist.all_gather_object(figures, Figures(socket.gethostname(), flops, links))
    warnings = list(find_slow(figures))
    if dist.get_rank() == 0:
        median = statistics.median(each.flops for each in figures)
        logger.info(
            "start-up probe of %d ranks: median %.1f TFLOP/s in a matrix product; all-reduce of %d MiB at %.2f GB/s a rank",
            len(figures), median / 1e12, sizes.bytes_of_link >> 20, reduced / 1e9,
        )  # fmt: skip
        for warning in warnings:
            logger.warning(warning)
    return warnings


def find_slow(figures: Sequence[Figures]) -> Iterator[str]:
    """Yield a sentence for each rank whose matrix product, and each link that, is slow against the median of its kind."""
    median = statistics.median(each.flops for each in figures)
    for rank, each in enumerate(figures):
        if each.flops < _SLOW_MATMUL * median:
            yield (
                f"rank {rank} (host {each.host}) is slow: {each.flops / 1e12:.3g} TFLOP/s in a matrix product, where the median "
                f"is {median / 1e12:.3g}"
            )
    for is_within in (True, False):
        links = [
            (rank, each.link)
            for rank, each in enumerate(figures[:-1])
            if each.link is not None and (each.host == figures[rank + 1].host) is is_within
        ]
        if links:
            usual = statistics.median(link for _, link in links)
            for rank, link in links:
                if link < _SLOW_LINK * usual:
                    yield (
                        f"the link of rank {rank} (host {figures[rank].host}) and rank {rank + 1} (host {figures[rank + 1].host}) "
                        f"is slow: {link / 1e9:.3g} GB/s each way, where the median {'within' if is_within else 'between'} hosts "
                        f"is {usual / 1e9:.3g}"
                    )


def _time_matmul(seconds: float, sizes: _Sizes, device: torch.device) -> float:
    """Return the FLOP/s of matrix products over some seconds."""
    matrix = torch.ones(sizes.matrix, sizes.matrix, dtype=sizes.dtype, device=device)
    _run(lambda: matrix @ matrix, 1, device)
    count = max(1, round(seconds / _run(lambda: matrix @ matrix, 3, device) * 3))
    return 2 * sizes.matrix**3 * count / _run(lambda: matrix @ matrix, count, device)


def _time_links(seconds: float, sizes: _Sizes, device: torch.device) -> float | None:
    """Return the bytes/s of this rank's link to the next one, each way. Even ranks go first, so that no link shares an end."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    sent = torch.ones(sizes.bytes_of_link // sizes.dtype.itemsize, dtype=sizes.dtype, device=device)
    received = torch.empty_like(sent)
    result = None
    for turn in (0, 1):
        begins = rank % 2 == turn
        peer = rank + 1 if begins else rank - 1
        if not 0 <= peer <= last:
            continue

        def exchange(peer: int = peer) -> None:
            operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        spent = _run_together(exchange, seconds, device, other=peer)
        if begins:
            result = sizes.bytes_of_link / spent
    return result


def _time_all_reduce(seconds: float, sizes: _Sizes, device: torch.device) -> float:
    """Return the bytes/s that all ranks reduce together."""
    values = torch.ones(sizes.bytes_of_link // sizes.dtype.itemsize, dtype=sizes.dtype, device=device)
    return sizes.bytes_of_link / _run_together(lambda: dist.all_reduce(values), seconds, device, other=None)


def _run_together(work: Callable[[], object], seconds: float, device: torch.device, *, other: int | None) -> float:
    """Return the seconds of one piece of work that ranks do together: with one other, or all. They agree on how often."""
    _run(work, 1, device)
    once = torch.tensor(_run(work, 2, device) / 2, dtype=torch.float32, device=device)
    if other is None:
        dist.all_reduce(once, op=dist.ReduceOp.MAX)
    else:
        of_other = torch.empty_like(once)
        operations = [dist.P2POp(dist.isend, once, other), dist.P2POp(dist.irecv, of_other, other)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        once = torch.maximum(once, of_other)
    count = min(1000, max(2, round(seconds / max(once.item(), 1e-6))))
    return _run(work, count, device) / count


def _run(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the seconds that work takes so many times."""
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    _synchronize(device)
    return max(time.perf_counter() - began, 1e-9)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
