"""What the trainer does between and after steps, on parts that only note what is asked of them."""

from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest

from trainer import trainer as trainer_module
from trainer.components.data.mixture import SourceProgress, measure_sources
from trainer.components.nonfinite import NonFiniteError, RollBackError
from trainer.components.train_state import TrainState
from trainer.config.schema import JobConfig
from trainer.trainer import Trainer


@pytest.fixture
def trainer() -> Trainer:
    """A trainer whose parts are mocks: after step 7, with nothing due."""
    bare = Trainer.__new__(Trainer)
    bare.config = JobConfig()
    bare.state = SimpleNamespace(step=7)
    for part in ("checkpointer", "dataloader", "garbage_collection", "metrics", "nonfinite", "profiler", "watchdog"):
        setattr(bare, part, MagicMock(name=part))
    bare.stopper = SimpleNamespace(reason="")
    bare.validator = bare.validation_loader = None
    bare.checkpointer.should_save.return_value = False
    bare.profiler.is_due.return_value = False
    return bare


@pytest.mark.parametrize("is_due", [False, True])
def test_device_is_waited_for_between_steps_only_when_something_is_due(trainer: Trainer, is_due: bool) -> None:
    trainer.profiler.is_due.return_value = is_due
    trainer._after_step()
    trainer.profiler.step.assert_called_once_with(7)
    assert trainer.metrics.pause.called == is_due, "a pause synchronizes with the device"


@pytest.mark.parametrize(("kind", "waits"), [(NonFiniteError, True), (KeyError, False)])
def test_save_in_the_background_is_finished_when_all_ranks_stop_alike(
    trainer: Trainer, kind: type, waits: bool
) -> None:
    trainer.__exit__(kind)
    assert trainer.checkpointer.close.called == waits
    trainer.metrics.close.assert_called_once()


def test_rollback_that_falls_due_when_the_run_stops_is_done_and_the_run_ends_in_good_order(trainer: Trainer) -> None:
    trainer.launch = SimpleNamespace(is_restart=False)
    trainer.state = TrainState(step=7)
    trainer.stopper = SimpleNamespace(reason="SIGTERM", agree=lambda: False)
    trainer.nonfinite.settle.side_effect = [RollBackError("a bad step"), False, False]
    for part in ("_take_step", "_roll_back"):
        setattr(trainer, part, MagicMock(name=part))
    trainer._take_steps()
    trainer._roll_back.assert_called_once()
    trainer.checkpointer.save_now.assert_called_once_with(7)


@pytest.fixture
def set_timeouts(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """What the trainer sets timeouts by."""
    trainer.dims, trainer.passes = MagicMock(), MagicMock()
    trainer.stopper.agree = lambda: False
    mock = MagicMock()
    monkeypatch.setattr(trainer_module, "set_timeouts", mock)
    return mock


def test_first_validation_has_time_to_compile(trainer: Trainer, set_timeouts: MagicMock) -> None:
    validator = MagicMock(has_run=False)
    validator.run.return_value = 1.0, 2.0
    trainer._validate(validator)
    comm = trainer.config.comm
    seconds = [comm.init_timeout_seconds, comm.train_timeout_seconds]
    assert set_timeouts.mock_calls == [call(trainer.dims, each) for each in seconds]
    assert trainer.watchdog.set_timeout.mock_calls == [call(each) for each in seconds]
    validator.has_run = True
    trainer._validate(validator)
    assert len(set_timeouts.mock_calls) == 2


def test_step_that_is_passed_over_is_not_the_first_one_that_compiles(trainer: Trainer, set_timeouts: MagicMock) -> None:
    trainer._first_step = 7
    trainer.nonfinite.passes_over.side_effect = [True, False, False]

    def take() -> None:
        trainer.state.step += 1

    for part in ("_pass_over_step", "train_step"):
        setattr(trainer, part, take)
    trainer._take_step()
    set_timeouts.assert_not_called()
    trainer._take_step()
    trainer._take_step()
    set_timeouts.assert_called_once_with(trainer.dims, trainer.config.comm.train_timeout_seconds)


def test_tokens_and_epochs_of_each_source_are_named() -> None:
    progress = {"a": SourceProgress(2, 16, 0.5), "b": SourceProgress(1, 8, 3.0)}
    assert measure_sources(progress) == {
        "source_tokens/a": 16, "source_tokens/b": 8, "source_epochs/a": 0.5, "source_epochs/b": 3.0,
    }  # fmt: skip
