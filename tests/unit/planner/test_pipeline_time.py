"""A pipeline on a clock."""

import pytest

from trainer.config.schedule_actions import Action, build_1f1b_order
from trainer.planner.operations import Work
from trainer.planner.pipeline_time import Interval, count_all, run_pipeline, split_pairs
from trainer.planner.recorder import Span
from trainer.planner.streams import COMPUTE


def test_bubble_of_1f1b_is_that_of_the_paper():
    seconds = {"F": 1.0, "B": 2.0}
    total, bubble = run_pipeline(build_1f1b_order(4, 8), lambda action: seconds[action.kind], transfer_seconds=0.0)
    assert total == pytest.approx((8 + 3) * 3.0)
    assert bubble == pytest.approx(3 / 11)


def test_slowest_rank_sets_the_pace_and_transfers_take_time():
    def seconds_of(action):
        return (2.0 if action.stage == 1 else 1.0) * {"F": 1.0, "B": 2.0}[action.kind]

    total, _ = run_pipeline(build_1f1b_order(2, 10), seconds_of, transfer_seconds=0.0)
    assert total == pytest.approx(10 * 6.0 + 1.0 + 2.0)
    later, _ = run_pipeline(build_1f1b_order(2, 10), seconds_of, transfer_seconds=0.5)
    assert total < later < total + 10


def kernel(action, begin, seconds):
    return Span(COMPUTE, Work("memory"), "forward", begin, seconds, action)


def test_two_passes_at_once_share_their_time_as_their_kernels_share_it():
    forward, backward, alone = Action(0, "F", 3), Action(3, "B", 1), Action(0, "F", 4)
    intervals = [Interval(backward, 1.0, 7.0), Interval(forward, 0.0, 8.0), Interval(alone, 8.0, 10.0)]
    spans = [kernel(forward, 0.0, 1.0), kernel(backward, 1.0, 3.0), kernel(forward, 6.0, 1.0), kernel(alone, 9.0, 1.0)]
    passes = dict(split_pairs(intervals, spans))
    assert passes == {forward: pytest.approx(3.2), backward: pytest.approx(4.8), alone: 2.0}


def test_middle_microbatch_stands_for_those_that_were_not_looked_at():
    order = build_1f1b_order(2, 10)[0]
    looked_at = [action for action in order if action.microbatch < 3]
    spans = [kernel(action, 0.0, 1.0) for action in looked_at] + [kernel(None, 0.0, 1.0)]
    count_all(spans, looked_at, order)
    assert {span.action: span.times for span in spans} == dict.fromkeys([*looked_at, None], 1) | {
        Action(0, "F", 1): 8,
        Action(0, "B", 1): 8,
    }
