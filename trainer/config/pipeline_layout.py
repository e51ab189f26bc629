"""Which modules of a model make each stage of a pipeline, and which rank has it. No torch: modules go by name."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config.fields import format_choices
from trainer.config.schedule_actions import Action, Order
from trainer.config.schedules import (
    DEGREE,
    SCHEDULE,
    SCHEDULE_CSV,
    ScheduleFile,
    ScheduleSpec,
    get_schedule_spec,
    place_stages,
    read_schedule,
)
from trainer.config.schema_parallel import ParallelismConfig

PARTS = "parallelism.module_fqns_per_model_part"
LAYERS_PER_STAGE = "parallelism.pipeline_parallel_layers_per_stage"

# Costs are compared as whole numbers of this share of a block, so that stages of equal cost are exactly equal.
_RESOLUTION = 1_000_000


@dataclass(frozen=True)
class StageModule:
    """A module that stays whole: a stage has it or has it not."""

    name: str
    cost: float
    """In any unit, the same for all modules."""
    is_block: bool
    is_joined: bool = False
    """Whether it must be in the stage of the module before it."""


def list_stage_modules(
    stages: Sequence[tuple[str, float]], *, blocks: str, n_blocks: int, last_stage: Sequence[str] = ()
) -> list[StageModule]:
    """Return the modules that a model may be cut between, in the order of its forward pass.

    stages, blocks, last_stage: those of the model's plan (`models.plan.ParallelPlan`). A `*` in `stages` stands for the
    numbers of all blocks; plans whose blocks differ in cost name each.
    """
    block = re.compile(re.escape(blocks).replace(r"\*", r"[^.]+"))
    modules = []
    for glob, cost in stages:
        names = [glob.replace("*", str(number)) for number in range(n_blocks)] if "*" in glob else [glob]
        modules += [
            StageModule(name, cost, is_block=block.fullmatch(name) is not None, is_joined=name in last_stage[1:])
            for name in names
        ]
    return modules


@dataclass(frozen=True)
class PipelineLayout:
    """A pipeline: its schedule, its stages and their ranks."""

    schedule: ScheduleSpec
    stages: tuple[tuple[str, ...], ...]
    """Names of each stage's modules, in the order of the forward pass."""
    ranks: tuple[int, ...]
    """Rank of each stage."""
    order: Order | None = None
    """Actions of each rank, where a file has them."""
    pairs: frozenset[Action] = frozenset()
    """Forward passes that such a file wants to run at once with the backward pass that follows them."""

    @property
    def n_ranks(self) -> int:
        """Ranks of the pipeline."""
        return max(self.ranks) + 1

    def stages_of(self, rank: int) -> list[int]:
        """Return the numbers of the stages that a rank has."""
        return [stage for stage, its_rank in enumerate(self.ranks) if its_rank == rank]

    def check_microbatches(self, n_microbatches: int) -> None:
        """Check the number of microbatches in one pass.

        Raises:
            ValueError: the schedule cannot run with it.
        """
        self.schedule.check_microbatches(n_microbatches, n_ranks=self.n_ranks, n_stages=len(self.stages))


def plan_pipeline(section: ParallelismConfig, modules: Sequence[StageModule]) -> PipelineLayout:
    """Cut the model into stages, and place them on the ranks, as the section says.

    There are three ways to cut. `module_fqns_per_model_part` names each stage's modules.
    `pipeline_parallel_layers_per_stage` gives the number of stages, and each layer counts as one. By default the
    schedule gives that number, and modules count by their cost. In the last two the dearest stage is as cheap as can
    be, then stages are as even as can be, and of equal cuts the one with more in the first stages is taken.

    Raises:
        ValueError: such stages cannot be made, or the schedule cannot run them.
    """
    if section.module_fqns_per_model_part is not None and section.pipeline_parallel_layers_per_stage is not None:
        raise ValueError(f"{PARTS} and {LAYERS_PER_STAGE} are two ways to cut the model into stages. Set one of them.")
    n_ranks = section.pipeline_parallel_degree
    file = None
    if section.pipeline_parallel_schedule_csv:
        file = read_schedule(section.pipeline_parallel_schedule_csv, n_ranks)
    schedule = file.spec if file else get_schedule_spec(section.pipeline_parallel_schedule)
    if section.module_fqns_per_model_part is not None:
        stages = _take_named(section.module_fqns_per_model_part, modules)
        problem = _find_count_problem(len(stages), schedule, file, n_ranks)
        if problem is not None:
            raise ValueError(f"{PARTS} names {len(stages)} stages, but {problem}. Change either.")
    elif section.pipeline_parallel_layers_per_stage is not None:
        stages = _cut_by_layers(section.pipeline_parallel_layers_per_stage, section, modules, schedule, file)
    else:
        n_stages = file.n_stages if file else n_ranks * schedule.stages_per_rank
        stages = cut_by_cost(_weigh_ends(section, modules), n_stages)
    return PipelineLayout(
        schedule,
        stages=tuple(map(tuple, stages)),
        ranks=place_stages(schedule.style, len(stages), n_ranks),
        order=file.order if file else None,
        pairs=file.pairs if file else frozenset(),
    )


def _find_count_problem(n_stages: int, schedule: ScheduleSpec, file: ScheduleFile | None, n_ranks: int) -> str | None:
    """Return why the schedule cannot run so many stages."""
    if file is not None:
        return None if n_stages == file.n_stages else f"{SCHEDULE_CSV} = {schedule.name} has {file.n_stages}"
    try:
        schedule.check_stages(n_stages, n_ranks)
    except ValueError as error:
        return str(error)
    return None


def _take_named(parts: list[list[str]], modules: Sequence[StageModule]) -> list[list[str]]:
    """Check stages that a user named: each module once, in order, and a block in each stage."""
    names = [module.name for module in modules]
    blocks = {module.name for module in modules if module.is_block}
    stage_of: dict[str, int] = {}
    for stage, part in enumerate(parts):
        for name in part:
            if name not in names:
                raise ValueError(
                    f"{PARTS}, stage {stage}: {name} is no module that the model can be cut between. Those are: "
                    f"{', '.join(names)}."
                )
            if name in stage_of:
                raise ValueError(f"{PARTS}, stage {stage}: {name} is in stage {stage_of[name]} already. Name it once.")
            stage_of[name] = stage
        if not blocks.intersection(part):
            raise ValueError(f"{PARTS}, stage {stage}: has no block. Give each stage one, or name fewer stages.")
    missing = [name for name in names if name not in stage_of]
    if missing:
        raise ValueError(f"{PARTS}: {', '.join(missing)} is in no stage. Name each module of the model once.")
    named = [name for part in parts for name in part]
    wrong = next((pair for pair in zip(named, names, strict=True) if pair[0] != pair[1]), None)
    if wrong is not None:
        raise ValueError(
            f"{PARTS}, stage {stage_of[wrong[0]]}: {wrong[0]} comes where {wrong[1]} should. Keep the order of the "
            f"forward pass: {', '.join(names)}."
        )
    for before, module in itertools.pairwise(modules):
        if module.is_joined and stage_of[module.name] != stage_of[before.name]:
            raise ValueError(
                f"{PARTS}, stage {stage_of[module.name]}: {module.name} needs {before.name} in its stage. Name both in the last."
            )
    return parts


def _cut_by_layers(
    layers_per_stage: int,
    section: ParallelismConfig,
    modules: Sequence[StageModule],
    schedule: ScheduleSpec,
    file: ScheduleFile | None,
) -> list[list[str]]:
    """Cut into stages of about so many layers, of which the ends of the model count as many as the section says, else
    none."""
    layers = [dataclasses.replace(module, cost=1.0 if module.is_block else 0.0) for module in modules]
    layers = _weigh_ends(section, layers)
    n_layers = round(sum(module.cost for module in layers))

    def find_problem(layers_per_stage: int) -> str | None:
        n_stages = math.ceil(n_layers / layers_per_stage)
        return _find_count_problem(n_stages, schedule, file, section.pipeline_parallel_degree)

    problem = find_problem(layers_per_stage)
    if problem is not None:
        fitting = [candidate for candidate in range(1, n_layers + 1) if find_problem(candidate) is None]
        near = sorted(fitting, key=lambda candidate: abs(candidate - layers_per_stage))[:2]
        remedy = f"Use {format_choices(map(str, sorted(near)))} layers a stage, or another" if near else "Use another"
        raise ValueError(
            f"{LAYERS_PER_STAGE} = {layers_per_stage} cuts {n_layers} layers into "
            f"{math.ceil(n_layers / layers_per_stage)} stages, but {problem}. {remedy} schedule."
        )
    return cut_by_cost(layers, math.ceil(n_layers / layers_per_stage))


def _weigh_ends(section: ParallelismConfig, modules: Sequence[StageModule]) -> list[StageModule]:
    """Return the modules with the costs that the section gives to what lies before and behind the blocks."""
    blocks = [index for index, module in enumerate(modules) if module.is_block]
    if not blocks:
        return list(modules)
    block_cost = sum(modules[index].cost for index in blocks) / len(blocks)
    weighed = list(modules)
    for layers, its_modules in (
        (section.pipeline_parallel_first_stage_less_layers, range(blocks[0])),
        (section.pipeline_parallel_last_stage_less_layers, range(blocks[-1] + 1, len(modules))),
    ):
        if layers is not None:
            for index in its_modules:
                share = layers * block_cost / len(its_modules)
                weighed[index] = dataclasses.replace(modules[index], cost=share)
    return weighed


def cut_by_cost(modules: Sequence[StageModule], n_stages: int) -> list[list[str]]:
    """Cut the modules into stages of a block or more each, as `plan_pipeline` says.

    Raises:
        ValueError: fewer blocks than stages.
    """
    blocks = [index for index, module in enumerate(modules) if module.is_block and not module.is_joined]
    if len(blocks) < n_stages:
        raise ValueError(
            f"{n_stages} stages need a block each, but the model has {len(blocks)}. Make fewer stages: lower {DEGREE}, "
            f"or choose a {SCHEDULE} with one stage a rank (1F1B), or set {LAYERS_PER_STAGE} higher."
        )
    # What follows a block belongs to it; what comes before the first, to the first.
    begins = [0, *blocks[1:], len(modules)]
    block_cost = sum(modules[index].cost for index in blocks) / len(blocks) or 1.0
    costs = [
        round(sum(module.cost for module in modules[begin:end]) / block_cost * _RESOLUTION)
        for begin, end in itertools.pairwise(begins)
    ]
    dearest, _ = _partition(costs, n_stages, max)
    _, sizes = _partition(costs, n_stages, lambda first, rest: first * first + rest, limit=dearest)
    stages, position = [], 0
    for size in sizes:
        begin, end = begins[position], begins[position + size]
        stages.append([module.name for module in modules[begin:end]])
        position += size
    return stages


def _partition(
    costs: Sequence[int], n_parts: int, join: Callable[[int, int], int], *, limit: float = math.inf
) -> tuple[int, list[int]]:
    """Cut a row of costs into parts that are not empty, so that the value of all is least. Of equals, more comes first.

    join: cost of the first part, value of the other parts -> value. limit: what a part may cost.

    Returns: the value, and the size of each part.
    """
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    n = len(costs)
    # By where the rest begins: its least value with so many parts, and the size of the first of these.
    best: list[dict[int, tuple[int, int]]] = [{n: (0, 0)}]
    for _ in range(n_parts):
        values: dict[int, tuple[int, int]] = {}
        for begin in range(n):
            for end, (rest, _) in best[-1].items():
                first = total[end] - total[begin]
                if end <= begin or first > limit:
                    continue
                value, size = join(first, rest), end - begin
                if begin not in values or (value, -size) < (values[begin][0], -values[begin][1]):
                    values[begin] = (value, size)
        best.append(values)
    sizes, begin = [], 0
    for values in reversed(best[1:]):
        sizes.append(values[begin][1])
        begin += sizes[-1]
    return best[-1][0][0], sizes
