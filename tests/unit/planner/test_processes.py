"""Dry runs in processes of their own: their results, and what becomes of those that take too long."""

import multiprocessing
import time

import pytest

from trainer.planner.processes import run_all


def _sleep(seconds: float, answer: int) -> int:
    time.sleep(seconds)
    return answer


def test_results_come_in_the_order_of_the_arguments():
    assert run_all([{"seconds": 0.1 * (2 - n), "answer": n} for n in range(3)], run=_sleep) == [0, 1, 2]


def test_processes_that_take_too_long_are_ended():
    others = set(multiprocessing.active_children())
    arguments = [{"seconds": seconds, "answer": 1} for seconds in (0.0, 600.0)]
    with pytest.raises(TimeoutError):
        run_all(arguments, run=_sleep, ends_at=time.monotonic() + 0.2)
    assert set(multiprocessing.active_children()) <= others
