"""What is wrong with the pipeline of a configuration, as far as it is known without the model.

`trainer.preflight_parallel` checks the cut into stages, which needs the model's layers.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from trainer.config.errors import Problem
from trainer.config.fields import format_choices, get_leaves, get_value, show
from trainer.config.pipeline_layout import PARTS
from trainer.config.schedules import (
    SCHEDULE,
    SCHEDULE_CSV,
    ScheduleSpec,
    get_schedule_spec,
    list_schedules,
    read_schedule,
)
from trainer.config.schema import JobConfig
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.validate_parallel import PP, compiles_model, list_multiples_near
from trainer.config.validate_simple_fsdp import IMPLEMENTATION, is_simple

_LESS_LAYERS = (
    "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers",
)
_MICROBATCH = "parallelism.pipeline_parallel_microbatch_size"
_LOCAL_BATCH = "training.local_batch_size"

# How far above the microbatches asked for to look for a number that fits. No schedule takes steps as large.
_LARGEST_STEP = 1000


class Conflict(NamedTuple):
    """A setting that a kind of schedule cannot be used with."""

    key: str
    applies: Callable[[JobConfig], bool]
    reason: str
    remedy: str


def _find_obstacle(config: JobConfig) -> str | None:
    """Return the setting, as a message has it, with which no backward pass is split, whatever the schedule; None without."""
    mode = config.activation_checkpoint.mode
    if mode != "none":
        return f"activation_checkpoint.mode = {mode}"
    if compiles_model(config):
        return "compile.enable = true"
    return f"{IMPLEMENTATION} = simple_fsdp" if is_simple(config) else None


REFUSED_WITH_SPLIT_BACKWARD: tuple[Conflict, ...] = (
    Conflict(
        "parallelism.fsdp_reshard_after_forward",
        lambda config: config.parallelism.fsdp_reshard_after_forward == "always" and _find_obstacle(config) is None,
        "weights are freed after the first part, and needed in the second",
        "Use default or never",
    ),
)
"""What does not go with schedules that compute gradients of inputs and of weights apart (zero bubble)."""


def _check_pipeline(config: JobConfig) -> Iterator[Problem]:
    """Schedules that are not there, or not for these batches, stages or settings."""
    if config.parallelism.pipeline_parallel_degree <= 1:
        return
    yield from _check_microbatch_size(config)
    try:
        spec, n_stages = find_schedule(config.parallelism)
    except ValueError as error:
        text, key = str(error), SCHEDULE_CSV if config.parallelism.pipeline_parallel_schedule_csv else SCHEDULE
        yield Problem(text if text.startswith(key) else f"{key}: {text}", (key, PP) if key == SCHEDULE_CSV else (key,))
        return
    yield from _check_microbatches(config, spec, n_stages)
    if spec.splits_backward:
        yield from _check_split_backward(config, spec)


def find_schedule(section: ParallelismConfig) -> tuple[ScheduleSpec, int]:
    """Return the pipeline's schedule, and the number of stages that it takes where nothing else is asked for.

    Raises:
        ValueError: there is no such schedule, or the file is none.
    """
    n_ranks = section.pipeline_parallel_degree
    if section.pipeline_parallel_schedule_csv:
        file = read_schedule(section.pipeline_parallel_schedule_csv, n_ranks)
        return file.spec, file.n_stages
    spec = get_schedule_spec(section.pipeline_parallel_schedule)
    return spec, spec.stages_per_rank * n_ranks


def _check_microbatch_size(config: JobConfig) -> Iterator[Problem]:
    size = max(1, config.parallelism.pipeline_parallel_microbatch_size)
    batches = {_LOCAL_BATCH: config.training.local_batch_size}
    if config.validation.enable:
        batches["validation.local_batch_size"] = config.validation.local_batch_size
    for key, batch in batches.items():
        if batch % size:
            near = format_choices(list_multiples_near(batch, size))
            message = (
                f"{key} = {batch}: must be a multiple of {_MICROBATCH} = {size}. Use {near}, or other microbatches."
            )
            yield Problem(message, (key, _MICROBATCH))


def _check_microbatches(config: JobConfig, spec: ScheduleSpec, n_stages: int) -> Iterator[Problem]:
    """Check the number of microbatches in a pass, and find the nearest local batches with another that the schedule takes."""
    section, batch = config.parallelism, config.training.local_batch_size
    size = max(1, section.pipeline_parallel_microbatch_size)
    if batch % size:
        return  # said already

    def check(n_microbatches: int) -> None:
        spec.check_microbatches(n_microbatches, n_ranks=section.pipeline_parallel_degree, n_stages=n_stages)

    def is_taken(n_microbatches: int) -> bool:
        with contextlib.suppress(ValueError):
            check(n_microbatches)
            return True
        return False

    try:
        check(batch // size)
    except ValueError as error:
        asked = batch // size
        below = next(filter(is_taken, range(asked - 1, 0, -1)), None)
        above = next(filter(is_taken, range(asked + 1, 2 * asked + _LARGEST_STEP)), None)
        near = format_choices(size * count for count in (below, above) if count)
        remedy = f" {_LOCAL_BATCH} = {near} would do." if below or above else ""
        message = f"{_LOCAL_BATCH} = {batch}: {error}{remedy}"
        yield Problem(message, (_LOCAL_BATCH, _MICROBATCH, SCHEDULE, SCHEDULE_CSV, PP))


def _check_split_backward(config: JobConfig, spec: ScheduleSpec) -> Iterator[Problem]:
    whole = format_choices(name for name in list_schedules() if not get_schedule_spec(name).splits_backward)
    for conflict in REFUSED_WITH_SPLIT_BACKWARD:
        if conflict.applies(config):
            message = (
                f"{conflict.key} = {show(get_value(config, conflict.key))}: does not go with the schedule {spec.name}, which splits "
                f"the backward pass: {conflict.reason}. {conflict.remedy}, or take another {SCHEDULE}: {whole}."
            )
            yield Problem(message, (conflict.key, SCHEDULE, SCHEDULE_CSV, PP))


def _warn_pipeline(config: JobConfig) -> Iterator[Problem]:
    """Settings of the pipeline that another of its settings leaves without effect."""
    section = config.parallelism
    if section.pipeline_parallel_degree <= 1:
        return
    if section.pipeline_parallel_schedule_csv and section.pipeline_parallel_schedule != get_leaves()[SCHEDULE].default:
        message = (
            f"{SCHEDULE} = {section.pipeline_parallel_schedule} has no effect: the schedule in {SCHEDULE_CSV} = "
            f"{section.pipeline_parallel_schedule_csv} takes its place."
        )
        yield Problem(message, (SCHEDULE, SCHEDULE_CSV))
    yield from _warn_whole_backward(config)
    if section.module_fqns_per_model_part is not None:
        for key in _LESS_LAYERS:
            if get_value(config, key) is not None:
                message = f"{key} = {get_value(config, key)} has no effect: the stages are named by {PARTS}."
                yield Problem(message, (key, PARTS))


def _warn_whole_backward(config: JobConfig) -> Iterator[Problem]:
    """Schedules that could fill their waiting times, were the backward pass of a block one that can be split."""
    obstacle = _find_obstacle(config)
    if obstacle is None or any(conflict.applies(config) for conflict in REFUSED_WITH_SPLIT_BACKWARD):
        return
    with contextlib.suppress(ValueError):  # it has been told
        spec, _ = find_schedule(config.parallelism)
        if spec.splits_backward:
            message = (
                f"{SCHEDULE} = {spec.name}: gradients of weights are computed together with those of inputs, and do not fill "
                f"waiting times: {obstacle} leaves a block with one whole backward pass. Without that they would."
            )
            keys = (SCHEDULE, SCHEDULE_CSV, "activation_checkpoint.mode", "compile.enable", IMPLEMENTATION)
            yield Problem(message, keys)


PIPELINE_RULES: tuple[Callable[[JobConfig], Iterator[Problem]], ...] = (_check_pipeline,)
PIPELINE_WARNING_RULES: tuple[Callable[[JobConfig], Iterator[Problem]], ...] = (_warn_pipeline,)
