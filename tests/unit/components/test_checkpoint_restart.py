"""What is asked for once, a step to go back to or a part to begin afresh, is not done again after each restart."""

from dataclasses import replace

import pytest

from tests.unit.components.checkpoint_run import SECTION, Run


def begin(folder, is_restart: bool = False, **section) -> Run:
    """A run whose checkpoints know its settings."""
    settings = {f"checkpoint.{name}": value for name, value in section.items()}
    return Run(folder, replace(SECTION, **section), settings=settings, is_restart=is_restart)


def test_restart_goes_on_from_what_was_saved_since_the_load_step(tmp_path):
    begin(tmp_path, load_step=-1).step(6)
    again = begin(tmp_path, is_restart=True, load_step=2)
    assert again.manager.load() == 2, "nothing was saved since"
    again.step(2)
    assert begin(tmp_path, is_restart=True, load_step=2).manager.load() == 4, "its own, and not the abandoned step-6"
    assert begin(tmp_path, load_step=2).manager.load() == 2, "a start by hand does what is asked for"
    going_back = begin(tmp_path, is_restart=True, load_step=2)
    assert going_back.manager.load(2) == 2


@pytest.mark.parametrize("is_restart", [False, True])
def test_part_is_begun_afresh_once_and_not_at_each_restart(tmp_path, caplog, is_restart):
    begin(tmp_path, exclude_from_loading=[]).step(4)
    fresh = begin(tmp_path, is_restart=is_restart, exclude_from_loading=["lr_scheduler"])
    assert fresh.manager.load() == 4
    assert fresh.lr_scheduler.state_dict() == {"steps_taken": 0}
    assert "begun afresh before" not in caplog.text
    fresh.step(2)
    later = begin(tmp_path, is_restart=is_restart, exclude_from_loading=["lr_scheduler"])
    assert later.manager.load() == 6
    assert later.lr_scheduler.state_dict() == {"steps_taken": 2 if is_restart else 0}
    assert ("will be loaded" if is_restart else "begun afresh again") in caplog.text


def test_going_back_loads_all_parts(tmp_path):
    begin(tmp_path, exclude_from_loading=[]).step(4)
    run = begin(tmp_path, exclude_from_loading=["lr_scheduler"])
    run.manager.load()
    run.step(1)
    assert not run.manager.load_newest(), "step-4 has not the schedule that this run has begun"
    run.step(1)  # is saved
    run.step(1)
    assert run.manager.load_newest()
    assert run.counters.values["step"] == 6
    assert run.lr_scheduler.state_dict() == {"steps_taken": 2}
