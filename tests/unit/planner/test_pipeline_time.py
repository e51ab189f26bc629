"""A pipeline on a clock."""

import pytest

from trainer.config.schedule_actions import build_1f1b_order
from trainer.planner.pipeline_time import run_pipeline


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
