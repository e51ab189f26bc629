"""Layouts of a run that fit the GPUs, the fastest first: `--job.plan_search`."""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

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


@dataclass(frozen=True)
class Result:
    """One layout that was planned."""

    layout: Layout
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.plan.fits


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
        """Return layouts in which the run fits, the fastest first, as many as `plan.results` says; where none fits, the smallest."""
        for degrees in list_degrees(self._world_size, self._config.plan.gpus_per_host):
            self._try_degrees(degrees)
            if self.is_over:
                logger.warning(
                    "the search ends after plan.search_seconds = %d: not all layouts were tried",
                    self._config.plan.search_seconds,
                )
                break
        fitting = sorted((r for r in self.results if r.fits), key=lambda r: -r.plan.tokens_per_second)
        if fitting:
            return fitting[: self._config.plan.results]
        return sorted(self.results, key=lambda r: r.plan.needed_bytes)[:1]

    def _try_degrees(self, degrees: Layout) -> None:
        """Try one way to divide the GPUs: with each kind of recomputation the largest batch that fits, as long as more recomputation
        can make room for a larger one. Where not even the one that needs the least memory fits, none of the others is tried.
        """
        batches = self._list_batches(degrees[_PP])
        for mode in _MODES:
            for batch in batches:
                if self.is_over:
                    return
                layout = _get_layout(degrees, mode, batch)
                result = self._try(layout)
                if result is not None and result.fits:
                    if degrees[_PP] == 1 and self._world_size > 1:
                        self._try({**layout, _RESHARD: "never"})
                    if batch == batches[0]:
                        return
                    break
                least = self._try(_get_layout(degrees, _MODES[-1], batches[-1]))
                if least is not None and not least.fits:
                    return

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

    def _list_batches(self, pp: int) -> list[int]:
        """Return batch sizes to try on each data-parallel rank, the largest first. A pipeline needs many microbatches."""
        given = self._config.training.local_batch_size
        sizes = {max(1, given // 2), given, 2 * given} if pp == 1 else {4 * pp, 8 * pp}
        return sorted(sizes, reverse=True)


_MODES = ("none", "selective", "full")
_PP = "parallelism.pipeline_parallel_degree"
_RESHARD = "parallelism.fsdp_reshard_after_forward"


def _get_layout(degrees: Layout, mode: str, batch: int) -> Layout:
    return {
        **degrees,
        "activation_checkpoint.mode": mode,
        "activation_checkpoint.selective_ac_option": "op",
        "training.local_batch_size": batch,
        _RESHARD: "default",
    }


def list_degrees(world_size: int, gpus_per_host: int) -> Iterator[Layout]:
    """Yield ways to divide the GPUs, those with few kinds of parallelism and small degrees first. Tensor parallelism stays inside a
    host; degrees are powers of two.
    """
    powers = [1 << power for power in range(world_size.bit_length()) if world_size % (1 << power) == 0]
    cells = [
        cell
        for cell in itertools.product(powers, powers, powers, powers)
        if cell[0] <= gpus_per_host and prod(cell[:3]) <= world_size and cell[3] <= world_size // cell[2]
    ]
    cells.sort(key=lambda cell: (sum(degree > 1 for degree in cell), prod(cell)))
    for cell in cells:
        degrees = {f"parallelism.{name}_parallel_degree": degree for name, degree in zip(_NAMES, cell, strict=True)}
        yield {"parallelism.data_parallel_shard_degree": -1, **degrees}


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


def _list_cells(result: Result) -> list[str]:
    layout, plan = result.layout, result.plan
    tp, cp, pp, ep = (layout[f"parallelism.{name}_parallel_degree"] for name in _NAMES)
    return [
        f"{plan.tokens_per_second:,.0f}",
        f"{100 * plan.mfu:.1f}%",
        f"{plan.needed_bytes / GIB:.1f}",
        *map(str, (plan.world_size // (tp * cp * pp), tp, cp, pp, ep)),
        str(layout["activation_checkpoint.mode"]),
        str(layout["training.local_batch_size"]),
        str(layout[_RESHARD]),
    ]


_NAMES = ("tensor", "context", "pipeline", "expert")


def format_toml(layout: Layout) -> Iterator[str]:
    """Yield the lines of TOML that make a layout."""
    section = ""
    for key, value in sorted(layout.items(), key=lambda entry: entry[0].split(".")[0]):
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            yield f"[{section}]"
        yield f"{key.split('.')[1]} = {value if isinstance(value, int) else repr(value).replace(chr(39), chr(34))}"
