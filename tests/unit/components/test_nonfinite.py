"""nonfinite.py."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from trainer.components.loss_window import LossWindow
from trainer.components.nonfinite import NonFiniteError, NonFiniteGuard, RollBackError
from trainer.components.poisoned import PoisonedBatches

GOOD, NAN, INF = 2.5, math.nan, math.inf
BATCH = {"first_sequence": 16, "sequences": 8}


@pytest.fixture
def make_guard(tmp_path):
    def make(policy="skip", max_skips=2, is_writer=True, spike_policy="off"):
        return NonFiniteGuard(
            policy=policy,
            max_skips=max_skips,
            record_path=tmp_path / "nonfinite.jsonl",
            is_writer=is_writer,
            spike_policy=spike_policy,
            window=LossWindow(size=32, threshold=10.0),
        )

    return make


def judge(guard, step, loss=GOOD, grad_norm=GOOD, dtype=torch.float32):
    loss, grad_norm = torch.tensor(loss, dtype=dtype), torch.tensor(grad_norm)
    return guard.judge(step, loss=loss, grad_norm=grad_norm, batch=BATCH)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "bad"),
    [
        (GOOD, GOOD, 0.0),
        (0.0, 0.0, 0.0),
        (3e38, GOOD, 0.0),
        (NAN, GOOD, 1.0),
        (GOOD, NAN, 1.0),
        (INF, GOOD, 1.0),
        (-INF, GOOD, 1.0),
        (GOOD, INF, 1.0),
    ],
)
def test_judge_tells_the_optimizer_at_once(make_guard, loss, grad_norm, bad):
    skip = judge(make_guard(), 1, loss, grad_norm)
    assert (skip.shape, skip.dtype) == (torch.Size([]), torch.float32)
    assert skip.item() == bad


def test_judge_reads_a_loss_of_any_dtype(make_guard):
    guard = make_guard()
    assert judge(guard, 1, dtype=torch.bfloat16).item() == 0.0
    assert judge(guard, 2, NAN, dtype=torch.bfloat16).item() == 1.0


def test_settle_without_a_step_does_nothing(make_guard):
    assert make_guard("stop").settle() is False


def test_good_step_leaves_no_trace(make_guard, tmp_path):
    guard = make_guard("stop")
    judge(guard, 1)
    assert guard.settle() is False
    assert guard.total_skipped == 0
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_stop_raises_when_settled_and_writes_where_it_was(make_guard, tmp_path):
    guard = make_guard("stop")
    judge(guard, 12, NAN, INF)
    with pytest.raises(NonFiniteError, match=r"step 12: loss nan, gradient norm inf.*'first_sequence': 16.*= 'skip'"):
        guard.settle()
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 12, "loss": "nan", "grad_norm": "inf", "batch": BATCH}


def test_skip_counts_warns_and_goes_on(make_guard, tmp_path, caplog):
    guard = make_guard()
    with caplog.at_level(logging.WARNING):
        judge(guard, 3, NAN)
        assert guard.settle() is True
        assert guard.settle() is False, "a step is settled once"
    assert guard.total_skipped == 1
    assert "Skipped step 3" in caplog.text
    judge(guard, 4)
    assert guard.settle() is False
    judge(guard, 5, GOOD, INF)
    assert guard.settle() is True
    steps = [json.loads(line)["step"] for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (guard.total_skipped, steps) == (2, [3, 5])


@pytest.mark.parametrize(("max_skips", "bad_steps"), [(0, 1), (2, 3)])
def test_skip_stops_after_more_than_max_skips_in_a_row(make_guard, max_skips, bad_steps):
    guard = make_guard(max_skips=max_skips)
    for step in range(1, bad_steps):
        judge(guard, step, NAN)
        assert guard.settle() is True
    judge(guard, bad_steps, NAN)
    with pytest.raises(NonFiniteError, match=rf"{bad_steps} steps in a row.*nonfinite_max_skips = {max_skips}"):
        guard.settle()


def test_good_step_ends_the_row(make_guard):
    guard = make_guard(max_skips=1)
    for step, loss in enumerate((NAN, GOOD, NAN, GOOD, NAN), start=1):
        judge(guard, step, loss)
        assert guard.settle() is (loss is NAN)
    assert guard.total_skipped == 3


def test_only_the_writer_writes_but_every_rank_stops(make_guard, tmp_path):
    guard = make_guard("stop", is_writer=False)
    judge(guard, 1, NAN)
    with pytest.raises(NonFiniteError):
        guard.settle()
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_counts_go_on_after_a_resume(make_guard):
    first, second = make_guard(max_skips=2), make_guard(max_skips=2)
    for step in (1, 2):
        judge(first, step, NAN)
        first.settle()
    second.load_state_dict(first.state_dict())
    assert second.total_skipped == 2
    judge(second, 3, NAN)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        second.settle()


def fill_window(guard):
    for step in range(1, 21):
        assert judge(guard, step).item() == 0.0
        assert guard.settle() is False


@pytest.mark.parametrize(
    ("spike_policy", "skips", "outcome"),
    [
        ("off", 0.0, False),
        ("warn", 0.0, False),
        ("skip", 1.0, True),
        ("stop", 1.0, NonFiniteError),
        ("rollback", 1.0, RollBackError),
    ],
)
def test_spike_is_treated_by_its_own_policy(make_guard, spike_policy, skips, outcome, caplog):
    guard = make_guard(spike_policy=spike_policy)
    fill_window(guard)
    assert judge(guard, 21, 30.0).item() == skips
    if isinstance(outcome, bool):
        assert guard.settle() is outcome
    else:
        with pytest.raises(outcome, match=r"step 21: loss 30\.0"):
            guard.settle()
    assert ("step 21: loss 30.0000 is a spike, above 2.75" in caplog.text) is (spike_policy != "off")


def test_rollbacks_that_do_not_help_end(make_guard):
    guard = make_guard("rollback", max_skips=2)
    for step in (3, 4):
        judge(guard, step, NAN)
        with pytest.raises(RollBackError):
            guard.settle()
        guard.load_state_dict(make_guard().state_dict())
    for step in (5, 6):
        judge(guard, step, NAN)
        assert guard.settle() is True
    judge(guard, 7, NAN)
    with pytest.raises(NonFiniteError, match="2 rollbacks did not help"):
        guard.settle()


def test_batch_is_passed_over_by_the_policy_for_what_was_wrong_with_it(make_guard, tmp_path):
    loader = SimpleNamespace(fingerprint="a", shape=SimpleNamespace(global_batch_size=8))
    poisoned = PoisonedBatches(tmp_path, loader)
    for _ in range(2):
        poisoned.add(16, "nonfinite")
        poisoned.add(24, "spike")
    for policy, spike_policy, expected in (("stop", "skip", [False, True]), ("rollback", "stop", [True, False])):
        guard = make_guard(policy, spike_policy=spike_policy)
        guard.poisoned = poisoned
        assert [guard.passes_over(sequence) for sequence in (16, 24)] == expected
        assert not guard.passes_over(32)
        with pytest.raises(NonFiniteError, match=f"from sequence {16 if policy == 'stop' else 24} on"):
            guard.refuse_hopeless(0)
        guard.refuse_hopeless(32)
        guard.policy = guard.spike_policy = "warn"
        guard.refuse_hopeless(0)
