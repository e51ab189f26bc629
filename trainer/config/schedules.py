"""Pipeline schedules: what is known of each by its name, and those that a user wrote down in a file. No torch."""

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.fields import suggest
from trainer.config.schedule_actions import Action, Order, build_timetable, find_pairs, parse_actions

SCHEDULE = "parallelism.pipeline_parallel_schedule"
SCHEDULE_CSV = "parallelism.pipeline_parallel_schedule_csv"
DEGREE = "parallelism.pipeline_parallel_degree"
_MICROBATCHES_KEYS = "training.local_batch_size / parallelism.pipeline_parallel_microbatch_size"

Style = Literal["single", "loop", "v"]
"""Which rank has which stages. single: rank r has stage r. loop: stage s lies on rank s % ranks, two or more on each.
v: two on each, from the first rank down to the last and back up again, so that the first rank has both the first stage
and the last."""


@dataclass(frozen=True)
class ScheduleSpec:
    """What is known of a schedule without running it."""

    name: str
    """As `torch.distributed.pipelining.schedules.get_schedule_class` has it, or the path of a file."""
    style: Style
    splits_backward: bool = False
    """Whether gradients of inputs are computed ahead of those of weights, which fill waiting times (zero bubble)."""
    microbatches: Literal["any", "one a stage", "whole rounds"] | int = "any"
    """How many microbatches it takes: at least one for each stage; as many in each of its rounds, of which there is one
    for each whole number of microbatches as large as that of ranks; or exactly so many."""
    aliases: tuple[str, ...] = ()
    key: str = SCHEDULE
    """The setting that chose it."""

    @property
    def stages_per_rank(self) -> int:
        """How many stages each rank has unless more are asked for."""
        return 1 if self.style == "single" else 2

    def check_stages(self, n_stages: int, n_ranks: int) -> None:
        """Check that the schedule can run so many stages on so many ranks.

        Raises:
            ValueError: it cannot.
        """
        per_rank, rest = divmod(n_stages, n_ranks)
        if self.style == "loop":
            fits, wanted = rest == 0 and per_rank >= 2, f"a multiple of {n_ranks} stages, at least {2 * n_ranks}"
        else:
            wanted = f"{self.stages_per_rank * n_ranks} stages"
            fits = n_stages == self.stages_per_rank * n_ranks
        if not fits:
            raise ValueError(f"{self.key} = {self.name} with {DEGREE} = {n_ranks} takes {wanted}, not {n_stages}")

    def check_microbatches(self, n_microbatches: int, *, n_ranks: int, n_stages: int) -> None:
        """Check the number of microbatches in one pass.

        Raises:
            ValueError: the schedule cannot run with it.
        """
        rounds = max(1, n_microbatches // n_ranks)
        if self.microbatches == "one a stage" and n_microbatches < n_stages:
            wanted = f"at least {n_stages}, one for each stage"
        elif self.microbatches == "whole rounds" and n_microbatches % rounds:
            wanted = f"as many in each of its {rounds} rounds; a multiple of {DEGREE} = {n_ranks} always is"
        elif isinstance(self.microbatches, int) and n_microbatches != self.microbatches:
            wanted = f"exactly {self.microbatches}"
        else:
            return
        raise ValueError(
            f"{_MICROBATCHES_KEYS} gives {n_microbatches} microbatches, but {self.key} = {self.name} needs {wanted}. "
            "Change either, or the schedule."
        )


_SPECS = (
    ScheduleSpec("GPipe", "single"),
    ScheduleSpec("1F1B", "single"),
    ScheduleSpec("Interleaved1F1B", "loop", microbatches="whole rounds"),
    ScheduleSpec("LoopedBFS", "loop"),
    ScheduleSpec("InterleavedZeroBubble", "loop", splits_backward=True, microbatches="whole rounds"),
    ScheduleSpec("ZBVZeroBubble", "v", splits_backward=True, aliases=("ZBV",)),
    ScheduleSpec("DualPipeV", "v", splits_backward=True, microbatches="one a stage"),
)

_BY_NAME = {name.lower(): spec for spec in _SPECS for name in (spec.name, *spec.aliases)}


def list_schedules() -> list[str]:
    """Return the names of all schedules."""
    return [spec.name for spec in _SPECS]


def get_schedule_spec(name: str) -> ScheduleSpec:
    """Return the schedule of that name, in upper or lower case.

    Raises:
        ValueError: there is none.
    """
    if name.lower() not in _BY_NAME:
        known = ", ".join(list_schedules())
        raise ValueError(f"{SCHEDULE} = {name}: unknown schedule.{suggest(name, list_schedules())} Known: {known}.")
    return _BY_NAME[name.lower()]


def place_stages(style: Style, n_stages: int, n_ranks: int) -> tuple[int, ...]:
    """Return the rank of each stage."""
    if style != "v":
        return tuple(stage % n_ranks for stage in range(n_stages))
    there_and_back = (*range(n_ranks), *reversed(range(n_ranks)))
    return tuple(there_and_back[stage % len(there_and_back)] for stage in range(n_stages))


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule that a user wrote down."""

    spec: ScheduleSpec
    order: Order
    pairs: frozenset[Action]
    """Forward passes that may run at once with the backward pass that follows them."""
    n_stages: int


def read_schedule(path: str | Path, n_ranks: int) -> ScheduleFile:
    """Read a schedule of `n_ranks` ranks from a CSV file: a line for each rank, an action in each cell (see
    `schedule_actions`), nothing in a cell where the rank waits. torch's `_dump_csv` with `format="compute_only"` writes
    such files.

    Raises:
        ValueError: there is no such file, or it is no schedule that these ranks can run; with file and line.
    """
    path = Path(path)
    try:
        with path.open(newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{SCHEDULE_CSV} = {path}: cannot be read: {error}") from error
    if len(rows) != n_ranks:
        raise ValueError(
            f"{SCHEDULE_CSV} = {path}: there is one line for each rank, so that {DEGREE} = {n_ranks} needs {n_ranks} "
            f"lines, but it has {len(rows)}"
        )
    places = [f"{path}, line {line}" for line, _ in rows]
    order = [_read_rank(row, place) for (_, row), place in zip(rows, places, strict=True)]
    stage_ranks = _find_ranks(order, places, path)
    n_microbatches = 1 + max(action.microbatch for actions in order for action in actions)
    for stage, rank in enumerate(stage_ranks):
        _check_complete(stage, n_microbatches, set(order[rank]), places[rank])
    style = _find_style(path, stage_ranks, n_ranks)
    pairs = find_pairs(cell for _, row in rows for cell in row)
    try:
        build_timetable(order)
        build_timetable(order, pairs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    splits_backward = any(action.kind == "W" for actions in order for action in actions)
    spec = ScheduleSpec(str(path), style, splits_backward, microbatches=n_microbatches, key=SCHEDULE_CSV)
    return ScheduleFile(spec, order, pairs, n_stages=len(stage_ranks))


def _read_rank(row: list[str], place: str) -> list[Action]:
    """Return the actions in one line.

    Raises:
        ValueError: a cell has no action, or one that comes too early or again.
    """
    seen: dict[Action, None] = {}
    for number, cell in enumerate(row, start=1):
        try:
            for action in parse_actions(cell):
                _check_next(action, seen)
                seen[action] = None
        except ValueError as error:
            raise ValueError(f"{place}, cell {number}: {error}") from error
    return list(seen)


def _check_next(action: Action, seen: Collection[Action]) -> None:
    """Check that an action may come after those that were seen.

    Raises:
        ValueError: it, or one that it is a part of or consists of, is there already, or what it needs is not.
    """
    same = action.kind + {"B": "IW", "I": "B", "W": "B"}.get(action.kind, "")
    again = next((other for kind in same if (other := action._replace(kind=kind)) in seen), None)
    if again is not None:
        raise ValueError(f"{action} comes after {again}: each pass is made once")
    before = {"B": "F", "I": "F", "W": "I"}.get(action.kind)
    if before is not None and action._replace(kind=before) not in seen:
        raise ValueError(f"{action} comes without {action._replace(kind=before)} before it")


def _find_ranks(order: Order, places: Sequence[str], path: Path) -> tuple[int, ...]:
    """Return the rank of each stage.

    Raises:
        ValueError: a stage is on two ranks, or on none.
    """
    rank_of: dict[int, int] = {}
    for rank, actions in enumerate(order):
        for action in actions:
            other = rank_of.setdefault(action.stage, rank)
            if other != rank:
                raise ValueError(f"{places[rank]}: stage {action.stage} is in another line already ({places[other]})")
    n_stages = 1 + max(rank_of, default=0)
    for stage in range(n_stages):
        if stage not in rank_of:
            raise ValueError(f"{path}: stage {stage} has no action. Stages are numbered from 0 on, without a gap")
    return tuple(rank_of[stage] for stage in range(n_stages))


def _check_complete(stage: int, n_microbatches: int, actions: Collection[Action], place: str) -> None:
    """Check that a stage goes forward and backward with each microbatch.

    Raises:
        ValueError: it does not.
    """
    for microbatch in range(n_microbatches):
        for kinds in ("F", "BI", "BW"):
            alternatives = [Action(stage, kind, microbatch) for kind in kinds]
            if not any(action in actions for action in alternatives):
                raise ValueError(
                    f"{place}: {' or '.join(map(str, alternatives))} is missing. Each stage goes forward and backward "
                    f"with each of the {n_microbatches} microbatches"
                )


def _find_style(path: Path, stage_ranks: tuple[int, ...], n_ranks: int) -> Style:
    """Return how the stages lie on the ranks.

    Raises:
        ValueError: in no known way.
    """
    n_stages = len(stage_ranks)
    styles: tuple[Style, ...] = ("single",) if n_stages == n_ranks else ("loop", "v")
    for style in styles:
        if n_stages % n_ranks == 0 and stage_ranks == place_stages(style, n_stages, n_ranks):
            return style
    raise ValueError(
        f"{path}: stages 0 to {n_stages - 1} are of ranks {', '.join(map(str, stage_ranks))}. They must go through the "
        "ranks in a loop (from the first to the last, and again from the first), or in a V (to the last, and back)"
    )
