"""Layouts of a run that fit the GPUs, the fastest first: `--job.plan_search`."""

import dataclasses
import functools
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.config.errors import Problem
from trainer.config.schema import JobConfig
from trainer.config.validate import find_problems
from trainer.planner.hardware import GIB
from trainer.planner.plan import Plan, make_plan
from trainer.planner.report import format_table
from trainer.preflight import find_layout_problems

logger = logging.getLogger(__name__)

Layout = dict[str, Any]
"""Settings by dotted key."""


class Degrees(NamedTuple):
    """A way to divide the GPUs; the rest of them shards."""

    replicate: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1

    def list_neighbours(self) -> Iterator["Degrees"]:
        """Yield those with one degree doubled or halved, sensible or not."""
        for name, degree in self._asdict().items():
            yield self._replace(**{name: 2 * degree})
            if degree % 2 == 0:
                yield self._replace(**{name: degree // 2})


class Batch(NamedTuple):
    """Sequences on each data-parallel rank."""

    size: int
    micro: int
    """At a time."""


_Rank = tuple[int, int, float]
"""What comes first, the smaller the better: how many refused ones it was come to by, and the rank of the result that it is next to."""


@dataclass(frozen=True)
class Result:
    """One layout that was planned."""

    layout: Layout
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.plan.fits

    @property
    def rank(self) -> tuple[int, float]:
        """What fits comes first, by speed; then what is nearest to it."""
        return (0, -self.plan.tokens_per_second) if self.fits else (1, self.plan.needed_bytes)


class Search:
    """The layouts that were tried so far."""

    def __init__(
        self,
        config: JobConfig,
        world_size: int,
        plan: Callable[[JobConfig, int], Plan] | None = None,
        *,
        show: Callable[[Result], None] = lambda _: None,
    ) -> None:
        """plan: `make_plan`, unless another is given. show: is told of each layout that was planned."""
        self._config, self._world_size, self._show = config, world_size, show
        self._ends_at = time.monotonic() + config.plan.search_seconds
        self._plan = plan or functools.partial(make_plan, ends_at=self._ends_at)
        self._tried: dict[tuple[Any, ...], Result | None] = {}
        self.results: list[Result] = []

    @property
    def is_over(self) -> bool:
        """Whether the time for it is over."""
        return time.monotonic() > self._ends_at

    def run(self) -> list[Result]:
        """Return layouts in which the run fits, the fastest first, as many as `plan.results` says; where none fits, the smallest.

        The layout of the settings comes first, and that of data parallelism alone; then what is one step (a degree doubled or halved) from the
        best so far, until all were tried or time is up.
        """
        start = get_degrees(self._config)
        cells = list_degrees(self._world_size, self._config.plan.gpus_per_host, self._config.training.seq_len)
        unseen = dict.fromkeys([start, *cells])
        upcoming: list[tuple[_Rank, int, Degrees]] = []
        for degrees in (start, Degrees()):
            self._add(degrees, (-1, 0, 0.0), unseen, upcoming)
        while upcoming and not self.is_over:
            rank, _, degrees = heapq.heappop(upcoming)
            found = self._try_degrees(degrees)
            # Through what is refused the way goes on when there is no other.
            rank = min(((0, *result.rank) for result in found), default=(rank[0] + 1, *rank[1:]))
            for neighbour in degrees.list_neighbours():
                self._add(neighbour, rank, unseen, upcoming)
        if self.is_over:
            logger.warning(
                "the search ends after plan.search_seconds = %d: not all layouts were tried",
                self._config.plan.search_seconds,
            )
        fitting = sorted((r for r in self.results if r.fits), key=lambda r: -r.plan.tokens_per_second)
        if fitting:
            return fitting[: self._config.plan.results]
        return sorted(self.results, key=lambda r: r.plan.needed_bytes)[:1]

    def _add(
        self,
        degrees: Degrees,
        rank: _Rank,
        unseen: dict[Degrees, None],
        upcoming: list[tuple[_Rank, int, Degrees]],
    ) -> None:
        if degrees in unseen:
            del unseen[degrees]
            heapq.heappush(upcoming, (rank, -len(unseen), degrees))  # of equals, those that were found first

    def _try_degrees(self, degrees: Degrees) -> list[Result]:
        """Return what one way to divide the GPUs gives: in a pipeline into which it does not fit also with weights that are gathered for
        each pass.
        """
        n_before = len(self.results)
        for reshard in ("default", "always") if degrees.pp > 1 else ("default",):
            self._try_batches(degrees, reshard)
            found = self.results[n_before:]
            if not found or any(result.fits for result in found):
                break
        return found

    def _try_batches(self, degrees: Degrees, reshard: str) -> None:
        """Try with each kind of recomputation the largest batch that fits, as long as more recomputation can make room for a larger
        one. Where not even the one that needs the least memory fits, none of the others is tried.
        """
        batches = self._list_batches(degrees)
        least = _get_layout(degrees, _MODES[-1], batches[-1], reshard)
        if self.results and not any(result.fits for result in self.results) and not self._may_fit(least):
            return
        for mode in _MODES:
            for batch in batches:
                if self.is_over:
                    return
                layout = _get_layout(degrees, mode, batch, reshard)
                result = self._try(layout)
                if result is not None and result.fits:
                    if degrees.pp == 1 and self._world_size > 1:
                        self._try({**layout, _RESHARD: "never"})
                    if batch == batches[0]:
                        return
                    break
                if not self._may_fit(least):
                    return

    def _may_fit(self, layout: Layout) -> bool:
        result = self._try(layout)
        return result is None or result.fits

    def _try(self, layout: Layout) -> Result | None:
        """Plan one layout, once, if it passes all checks of settings and model."""
        key = tuple(sorted(layout.items()))
        if key not in self._tried:
            self._tried[key] = self._plan_layout(layout)
        return self._tried[key]

    def _plan_layout(self, layout: Layout) -> Result | None:
        config = apply_layout(self._config, layout)
        if next(_find_problems(config, self._world_size), None) is not None:
            return None
        try:
            result = Result(layout, self._plan(config, self._world_size))
        except ValueError as error:
            logger.debug("%s: %s", layout, error)
            return None
        except TimeoutError:
            return None
        except RuntimeError as error:  # of one layout: the others may be what is looked for
            logger.warning(
                "%s cannot be planned: %s", " ".join(format_toml(layout)), str(error).strip().splitlines()[-1]
            )
            return None
        for rank in result.plan.ranks:
            rank.memory.curve.clear()  # up to 100 MB a plan, which nobody reads
        self.results.append(result)
        self._show(result)
        return result

    def _list_batches(self, degrees: Degrees) -> list[Batch]:
        """Return batches to try on each data-parallel rank, the largest first. A pipeline needs many microbatches, and has as many in memory
        whatever their number.
        """
        training, section, pp = self._config.training, self._config.parallelism, degrees.pp
        in_pipeline = section.pipeline_parallel_degree > 1
        given = section.pipeline_parallel_microbatch_size if in_pipeline else training.local_batch_size
        sizes = [2 * given, given, *([given // 2] if given > 1 else [])]
        if pp > 1 and not in_pipeline and given > 1:
            sizes = sizes[1:]  # it has several in memory
        most = 8 * pp if pp > 1 else 1
        if training.global_batch_size < 0:
            return [Batch(most * size, size) for size in sizes]
        in_step = training.global_batch_size * degrees.tp * degrees.cp * pp // self._world_size
        fitting = [size for size in sizes if size <= in_step and in_step % size == 0]
        return [Batch(size * _find_divisor(in_step // size, most), size) for size in fitting or [given]]


def _find_divisor(number: int, most: int) -> int:
    """Return the largest divisor that is not above `most`."""
    return next((divisor for divisor in range(min(number, most), 1, -1) if number % divisor == 0), 1)


_MODES = ("none", "selective", "full")
_LEAST_TOKENS = 1024
_MICRO = "parallelism.pipeline_parallel_microbatch_size"
_RESHARD = "parallelism.fsdp_reshard_after_forward"


def _get_layout(degrees: Degrees, mode: str, batch: Batch, reshard: str) -> Layout:
    layout = {
        "parallelism.data_parallel_replicate_degree": degrees.replicate,
        "parallelism.data_parallel_shard_degree": -1,
        "parallelism.tensor_parallel_degree": degrees.tp,
        "parallelism.context_parallel_degree": degrees.cp,
        "parallelism.pipeline_parallel_degree": degrees.pp,
        "parallelism.expert_parallel_degree": degrees.ep,
        "activation_checkpoint.mode": mode,
        "activation_checkpoint.selective_ac_option": "op",
        "training.local_batch_size": batch.size,
        _RESHARD: reshard,
    }
    return layout | ({_MICRO: batch.micro} if degrees.pp > 1 else {})


def list_degrees(world_size: int, gpus_per_host: int, seq_len: int) -> Iterator[Degrees]:
    """Yield ways to divide the GPUs: powers of two. Tensor parallelism stays inside a host, weights are replicated between hosts only, and
    context parallelism leaves 1,024 tokens of a sequence to each rank.
    """
    powers = [1 << power for power in range(world_size.bit_length()) if world_size % (1 << power) == 0]
    for degrees in itertools.starmap(Degrees, itertools.product(powers, repeat=len(Degrees._fields))):
        replicate, tp, cp, pp, ep = degrees
        if (
            tp <= gpus_per_host
            and replicate <= max(1, world_size // gpus_per_host)
            and (cp == 1 or seq_len // cp >= _LEAST_TOKENS)
            and replicate * tp * cp * pp <= world_size
            and ep * pp * replicate <= world_size
        ):
            yield degrees


def get_degrees(config: JobConfig) -> Degrees:
    """Return those of the settings."""
    section = config.parallelism
    return Degrees(
        section.data_parallel_replicate_degree,
        section.tensor_parallel_degree,
        section.context_parallel_degree,
        section.pipeline_parallel_degree,
        section.expert_parallel_degree,
    )


def _find_problems(config: JobConfig, world_size: int) -> Iterator[Problem]:
    problems, _ = find_problems(config, world_size=world_size)
    yield from problems
    if not problems:
        yield from find_layout_problems(config)


def apply_layout(config: JobConfig, layout: Layout) -> JobConfig:
    """Return the settings with those of a layout in their place."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in layout.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    changed: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()
    }
    return dataclasses.replace(config, **changed)


def format_results(results: list[Result]) -> str:
    """Return the layouts as a table, and each as lines of TOML to paste."""
    if not results:
        return (
            "no layout was planned: the checks of settings and model refuse all that were tried (see what --job.plan says of the present "
            "one), or none was done within plan.search_seconds"
        )
    rows = [["", *_COLUMNS]]
    for number, result in enumerate(results, start=1):
        rows.append([f"{number}{'' if result.fits else ' does not fit'}", *_list_cells(result)])
    lines = list(format_table(rows))
    if not results[0].fits:
        lines.append(f"nothing fits the {results[0].plan.gpu}: take more GPUs. The layout above needs the least memory")
    for number, result in enumerate(results, start=1):
        lines += ["", f"# {number}: {result.plan.tokens_per_second:,.0f} tokens/s per GPU", *format_toml(result.layout)]
    return "\n".join(lines)


def format_result(result: Result) -> str:
    """Return one layout as a line."""
    cells = (f"{name} {cell}" for name, cell in zip(_COLUMNS, _list_cells(result), strict=True))
    return f"{'fits: ' if result.fits else 'too large: '}{', '.join(cells)}"


_COLUMNS = ("tokens/s per GPU", "MFU", "GiB", "dp", "tp", "cp", "pp", "ep", "recompute", "batch", "reshard")
_NAMES = ("tensor", "context", "pipeline", "expert")


def _list_cells(result: Result) -> list[str]:
    layout, plan = result.layout, result.plan
    tp, cp, pp, ep = (layout[f"parallelism.{name}_parallel_degree"] for name in _NAMES)
    replicate = layout["parallelism.data_parallel_replicate_degree"]
    shard = plan.world_size // (tp * cp * pp * replicate)
    batch = layout["training.local_batch_size"]
    return [
        f"{plan.tokens_per_second:,.0f}",
        f"{100 * plan.mfu:.1f}%",
        f"{plan.needed_bytes / GIB:.1f}",
        f"{replicate}x{shard}" if replicate > 1 else f"{shard}",
        *map(str, (tp, cp, pp, ep)),
        str(layout["activation_checkpoint.mode"]),
        f"{batch // layout[_MICRO]}x{layout[_MICRO]}" if _MICRO in layout else f"{batch}",
        str(layout[_RESHARD]),
    ]


def format_toml(layout: Layout) -> Iterator[str]:
    """Yield the lines of TOML that make a layout."""
    section = ""
    for key, value in sorted(layout.items(), key=lambda entry: entry[0].split(".")[0]):
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            yield f"[{section}]"
        yield f"{key.split('.')[1]} = {value if isinstance(value, int) else repr(value).replace(chr(39), chr(34))}"
