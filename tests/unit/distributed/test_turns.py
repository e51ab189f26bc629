"""Two passes take turns, and neither can lose the other."""

import threading

import pytest
import torch

from trainer.distributed.turns import Turns

CPU = torch.device("cpu")


def test_passes_take_turns_where_they_wait() -> None:
    turns, said = Turns(), []

    def work(name: str, parts: int) -> None:
        for part in range(parts):
            said.append(f"{name}{part}")
            turns.pass_on()

    turns.run(lambda: work("F", 2), lambda: work("B", 4), CPU)
    assert said == ["F0", "B0", "F1", "B1", "B2", "B3"]
    turns.run(lambda: work("F", 1), lambda: work("B", 1), CPU)
    assert said[6:] == ["F0", "B0"]


def test_turn_is_kept_in_threads_of_the_backward_pass() -> None:
    """Autograd runs a backward pass on a GPU in a thread of its own."""
    turns, said = Turns(), []

    def say(name: str) -> None:
        said.append(name)
        turns.pass_on()
        said.append(name)

    def backward() -> None:
        thread = threading.Thread(target=say, args=["B"])
        thread.start()
        thread.join()

    turns.run(lambda: say("F"), backward, CPU)
    assert said == ["F", "B", "F", "B"]


def test_alone_a_pass_keeps_its_turn() -> None:
    Turns().pass_on()


@pytest.mark.parametrize("fails", ["F", "B"])
def test_failure_of_one_is_raised_when_the_other_is_done(fails: str) -> None:
    turns, done = Turns(), []

    def work(name: str) -> None:
        turns.pass_on()
        if name == fails:
            raise ValueError(f"{name} failed")
        turns.pass_on()
        done.append(name)

    with pytest.raises(ValueError, match=f"{fails} failed"):
        turns.run(lambda: work("F"), lambda: work("B"), CPU)
    assert done == ["B" if fails == "F" else "F"]
    turns.run(lambda: done.append("next"), lambda: None, CPU)
    assert done[-1] == "next"
