"""Losses that are not finite or far too high: nothing is harmed, the batch is known, and the run goes on as it should."""

import json

import pytest

from tests.distributed.training import Fault, Run, assert_equal_states, assert_succeeded

OPTIONS = ["--checkpoint.enable", "--debug.seed=3"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("loss"))


@pytest.fixture
def run(cache: Run, request) -> Run:
    return cache.clone("".join(c if c.isalnum() else "_" for c in request.node.name))


def read_poisoned(run: Run) -> dict[int, int]:
    batches = json.loads((run.dump_folder / "poisoned.json").read_text())["batches"]
    return {batch["first_sequence"]: batch["failures"] for batch in batches}


def test_rollback_leaves_the_batch_out_and_equals_skipping_it(run: Run) -> None:
    fault = Fault(steps=(4,), kind="gradient", rank=1)
    skipped = run.clone("skipped")
    expected = assert_succeeded(skipped(2, *OPTIONS, "--training.nonfinite_policy=skip", keep=(7,), fault=fault))
    accounts = assert_succeeded(run(2, *OPTIONS, "--training.nonfinite_policy=rollback", keep=(7,), fault=fault))
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)
    assert [(line["step"], line["failed_step"]) for line in run.lines("rollback")] == [(2, 4)]
    assert [line["step"] for line in run.lines("skip")] == [4]
    assert read_poisoned(run) == read_poisoned(skipped) == {24: 1}


def test_batch_that_fails_again_is_recognised(run: Run) -> None:
    fault = Fault(steps=(4,), rank=1)
    for failures in (1, 2):
        for account in run(2, *OPTIONS, fault=fault):
            assert account.error.startswith("NonFiniteError: step 4: ")
            assert ("It failed here 2 times" in account.error) == (failures == 2)
        assert read_poisoned(run) == {24: failures}
    for account in run(2, *OPTIONS, fault=fault, variables={"TORCHELASTIC_RESTART_COUNT": "2"}):
        assert "failed twice at the batch from sequence 24 on" in account.error
    assert read_poisoned(run) == {24: 2}, "it was not tried for a third time"
    (account, _) = assert_succeeded(run(2, *OPTIONS, "--training.nonfinite_policy=skip", fault=fault))
    assert "Passed over step 4, at whose batch training failed before" in account.stdout
    assert run.lines("end")[-1]["steps"] == 5


def test_spike_is_skipped_on_the_device_and_its_window_is_resumed(run: Run) -> None:
    """The window is short and full only after the resume, if it came along."""
    options = [*OPTIONS, "--training.spike_policy=skip", "--training.spike_window=16", "--training.global_batch_size=4"]
    steps = ["--training.steps=18", "--lr_scheduler.total_steps=18"]
    assert_succeeded(run(2, *options, "--training.steps=10", "--lr_scheduler.total_steps=18"))
    fault = Fault(steps=(18,), kind="spike", rank=0)
    for account in assert_succeeded(run(2, *options, *steps, keep=(17, 18), fault=fault)):
        changed = [n for n, value in account.states[18].items() if not value.equal(account.states[17][n])]
        assert not changed
    assert [(line["step"], line["skipped"]) for line in run.lines("skip")] == [(18, 1)]
