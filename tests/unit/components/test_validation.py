"""validation.py."""

import pytest
import torch
from torch import nn

from trainer.components.validation import Validator
from trainer.config.errors import UserError


class Model(nn.Module):
    """Notes in which mode, and whether with gradients, it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = []

    def forward(self, values):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return (self.weight * values).sum()


def make_validator(batches, *, freq=10, sum_over_ranks=lambda total: total):
    model = Model()

    def loss_of_batch(batch):
        return model(batch["values"]), torch.tensor(batch["valid"])

    return Validator(
        model=model,
        batches=lambda: iter(batches),
        loss_of_batch=loss_of_batch,
        sum_over_ranks=sum_over_ranks,
        freq=freq,
    )


def make_batch(*values, valid=None):
    return {"values": torch.tensor(values), "valid": len(values) if valid is None else valid}


@pytest.mark.parametrize(
    ("step", "last", "due"),
    [(1, False, False), (9, False, False), (10, False, True), (20, False, True), (7, True, True)],
)
def test_should_run_every_freq_steps_and_at_the_end(step, last, due):
    assert make_validator([], freq=10).should_run(step, last=last) is due


def test_every_token_counts_the_same():
    loss, seconds = make_validator([make_batch(1.0), make_batch(3.0, 5.0, 7.0)]).run()
    assert loss == 2 * (1 + 3 + 5 + 7) / 4, "a mean of means would be 6"
    assert seconds >= 0


def test_batch_without_a_label_does_not_count():
    loss, _ = make_validator([make_batch(3.0), make_batch(0.0, valid=0)]).run()
    assert loss == 6.0


def test_sums_and_counts_of_other_ranks_count():
    loss, _ = make_validator([make_batch(1.0)], sum_over_ranks=lambda total: total + torch.tensor([10.0, 3.0])).run()
    assert loss == (2 + 10) / 4


def test_many_batches_are_summed_without_rounding():
    """In float32 a sum of 2e8 would not notice a further 0.5."""
    loss, _ = make_validator([make_batch(1e8), *[make_batch(0.25)] * 100]).run()
    assert loss == (2e8 + 100 * 0.5) / 101


def test_model_is_in_eval_mode_without_gradients_and_then_back():
    validator = make_validator([make_batch(1.0), make_batch(2.0)])
    validator.run()
    assert validator.model.calls == [(False, False)] * 2
    assert validator.model.training
    assert torch.is_grad_enabled()


def test_model_is_back_in_training_mode_after_an_error():
    validator = make_validator([{"values": torch.ones(1)}])  # no `valid`
    with pytest.raises(KeyError):
        validator.run()
    assert validator.model.training


@pytest.mark.parametrize(("batches", "message"), [([], "has no batch"), ([make_batch(0.0, valid=0)], "no valid label")])
def test_data_without_a_label_is_an_error(batches, message):
    with pytest.raises(UserError, match=rf"{message}.*validation\.dataset"):
        make_validator(batches).run()
