"""The order of passes of each pipeline schedule, from torch's tables where torch has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining.schedules import get_schedule_class

from trainer.config.pipeline_layout import PipelineLayout
from trainer.config.schedule_actions import (
    Action,
    Order,
    build_1f1b_order,
    build_gpipe_order,
    find_pairs,
    parse_actions,
)


@dataclass
class _StagePlaceholder:
    """What a schedule of torch asks of a stage, to make its table."""

    num_stages: int
    group_size: int
    group_rank: int = 0
    submod: None = None
    stage_index_to_group_rank: Mapping[int, int] | None = None


def build_order(layout: PipelineLayout, n_microbatches: int) -> Order:
    """Return the passes of each rank in the order of the layout's schedule.

    Raises:
        ValueError: the schedule cannot run with so many microbatches.
    """
    layout.check_microbatches(n_microbatches)
    n_ranks = layout.n_ranks
    if layout.order is not None:
        return layout.order
    # torch has no table for these two: its classes run them by code (that for 1F1B in 2.11 and 2.13 begins with the
    # wrong microbatch on the last rank).
    if layout.schedule.style == "single":
        build = build_gpipe_order if layout.schedule.name == "GPipe" else build_1f1b_order
        return build(n_ranks, n_microbatches)
    cells = _list_cells(layout, n_microbatches)
    return [[action for cell in of_rank for action in parse_actions(cell)] for of_rank in cells]


def find_overlapping(layout: PipelineLayout, n_microbatches: int) -> frozenset[Action]:
    """Return the forward passes that the layout's schedule wants to run at once with the backward pass that follows."""
    if layout.order is not None:
        return layout.pairs
    return find_pairs(cell for cells in _list_cells(layout, n_microbatches) for cell in cells)


def _list_cells(layout: PipelineLayout, n_microbatches: int) -> list[list[str]]:
    """Return what each rank does in the notation of torch, whose schedules of several stages a rank come as tables."""
    if layout.schedule.style == "single":
        return []
    placeholders: Any = [_StagePlaceholder(len(layout.stages), layout.n_ranks) for _ in layout.stages_of(0)]
    table = get_schedule_class(layout.schedule.name)(placeholders, n_microbatches).pipeline_order
    assert table is not None, "schedules of several stages a rank have a table"
    return [[str(cell) for cell in table[rank] if cell is not None] for rank in range(layout.n_ranks)]
