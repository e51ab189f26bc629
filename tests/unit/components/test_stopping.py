"""stopping.py and stop_signals.py, in one process."""

import os
import signal
import threading

import pytest
import torch

from trainer.components import stopping
from trainer.components.stopping import Deadline, Stopper
from trainer.distributed.stop_signals import StopRequestedError, StopSignals


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(stopping.time, "monotonic", lambda: Clock.now)
    return Clock


def make_stopper(signals=None, deadline=None, others=0.0):
    """A stopper beside other ranks, whose wishes are added."""

    def add(wishes):
        wishes += torch.tensor([others, 0.0, 0.0])

    return Stopper(signals=signals, deadline=deadline, reduce_=add, device=torch.device("cpu"))


def test_deadline_leaves_time_for_two_steps_and_a_save(clock):
    deadline = Deadline(3600)
    deadline.note_save(20.0)
    for _ in range(3):
        deadline.note_step()
        clock.now += 10.0
    deadline.note_step()
    assert deadline.margin == 2 * 10.0 + 1.5 * 20.0 + 5.0
    clock.now = 1000.0 + 3600 - deadline.margin - 0.1
    assert not deadline.is_near()
    clock.now += 0.2
    assert deadline.is_near()


def test_deadline_without_a_save_takes_a_tenth_for_one(clock):
    assert Deadline(100).margin == 1.5 * 10 + 5
    assert Deadline(86400).margin == 1.5 * 60 + 5


def test_pause_for_a_save_is_no_step(clock):
    deadline = Deadline(1000)
    deadline.note_step()
    clock.now += 300
    deadline.note_save(1.0)
    deadline.note_pause()
    deadline.note_step()
    clock.now += 2
    deadline.note_step()
    assert deadline.margin == 2 * 2 + 1.5 + 5


def test_wish_of_another_rank_counts_one_step_later():
    stopper = make_stopper(others=1.0)
    wishes = stopper.get_wishes()
    assert wishes.tolist() == [0.0, 0.0, 0.0]
    stopper._reduce(wishes)
    stopper.end_step(wishes)
    assert stopper.reason == ""
    stopper.end_step(stopper.get_wishes())
    assert stopper.reason == "SIGTERM"


def test_near_deadline_is_a_wish(clock):
    stopper = make_stopper(deadline=Deadline(100))
    assert not stopper.agree()
    clock.now += 99
    assert stopper.agree()
    assert stopper.reason == "time limit"


def be_told_twice() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # while the first is on its way


def test_signal_counts_once_and_interrupts_only_what_says_so():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.is_polled = True
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.requested == "SIGUSR1"
        assert make_stopper(signals).get_wishes().tolist() == [0.0, 1.0, 0.0]
    assert signal.getsignal(signal.SIGTERM) == before
    with StopSignals() as signals:
        with pytest.raises(StopRequestedError), signals.interrupting():
            be_told_twice()
        os.kill(os.getpid(), signal.SIGTERM)  # it is not waited for here
        with pytest.raises(StopRequestedError, match="SIGTERM"), signals.interrupting():
            pytest.fail("one that has come interrupts, too")


def test_signals_of_another_thread_stay_the_programs():
    installed = []

    def run() -> None:
        with StopSignals() as signals:
            installed.append(signals.is_installed)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert installed == [False]
