"""loss_window.py."""

import math

import pytest

from trainer.components.loss_window import LossWindow


def make_window(losses, size=128, threshold=10.0):
    window = LossWindow(size=size, threshold=threshold)
    for loss in losses:
        window.add(loss)
    return window


def test_nothing_is_a_spike_before_there_are_enough_losses():
    assert make_window([2.0] * 15).get_bound() == math.inf
    assert make_window([2.0] * 16).get_bound() < math.inf


def test_bound_follows_median_and_deviation():
    losses = [2.0, 2.1] * 8 + [2.2] * 8  # median 2.1, deviations of 0.1, 0 and 0.1: their median is 0.1
    assert make_window(losses).get_bound() == pytest.approx(2.1 + 10 * 1.4826 * 0.1)


def test_even_losses_leave_some_room():
    assert make_window([2.0] * 20).get_bound() == pytest.approx(2.0 + 10 * 0.02)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_window_is_not_poisoned_by_one_value(bad):
    good = [2.0 + 0.01 * (step % 7) for step in range(40)]
    assert make_window([*good, bad]).get_bound() == pytest.approx(make_window(good).get_bound(), abs=0.2)


def test_old_losses_leave_and_the_state_carries_the_rest():
    window = make_window([9.0] * 20 + [2.0] * 16, size=16)
    assert window.state_dict() == [2.0] * 16
    other = LossWindow(size=16, threshold=10.0)
    other.load_state_dict(window.state_dict())
    assert other.get_bound() == window.get_bound()
