"""Learning rates against values worked out by hand."""

import logging
import math

import pytest
import torch
from torch import nn

from trainer.components.lr_scheduler import Schedule, build_lr_scheduler, build_schedule
from trainer.components.optimizer import build_optimizer
from trainer.config.schema_training import LRSchedulerConfig, OptimizerConfig, ParamGroupConfig


def _factors(section: LRSchedulerConfig, steps: int, count: int | None = None) -> list[float]:
    schedule = build_schedule(section, steps=steps)
    return [schedule.lr_factor(step) for step in range(count or steps)]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # 2 of warm-up, one at the peak, then 8ths: the last step is not yet at zero.
        (LRSchedulerConfig(warmup_steps=2), [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (LRSchedulerConfig(warmup_steps=0, decay_ratio=0.4), [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (LRSchedulerConfig(warmup_steps=5, decay_ratio=0.0), [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]),
        (
            LRSchedulerConfig(warmup_steps=0, decay_ratio=0.4, min_lr_factor=0.1),
            [1, 1, 1, 1, 1, 1, 1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.25],
        ),
        (
            LRSchedulerConfig(warmup_steps=0, decay_ratio=0.4, decay_type="sqrt"),
            [1, 1, 1, 1, 1, 1, 1, 1 - math.sqrt(0.25), 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)],
        ),
        (
            LRSchedulerConfig(warmup_steps=0, decay_ratio=0.4, decay_type="cosine"),
            [1, 1, 1, 1, 1, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
    ],
)
def test_lr_factor_over_ten_steps_is_as_worked_out(section, expected):
    assert _factors(section, 10) == pytest.approx(expected, abs=1e-12)


def test_lr_factor_beyond_the_schedule_stays_at_the_minimum():
    section = LRSchedulerConfig(warmup_steps=0, total_steps=4, min_lr_factor=0.25)
    assert _factors(section, steps=100, count=7) == pytest.approx([1, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25])


def test_total_steps_takes_the_place_of_training_steps():
    assert build_schedule(LRSchedulerConfig(warmup_steps=2, total_steps=20), steps=5) == Schedule(2, 1, 18)


def test_warmup_longer_than_the_run_is_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        factors = _factors(LRSchedulerConfig(warmup_steps=200), 4)
    assert factors == [0.25, 0.5, 0.75, 1.0]
    assert "warmup_steps = 200" in caplog.text


def test_decay_that_overlaps_the_warmup_is_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        schedule = build_schedule(LRSchedulerConfig(warmup_steps=6, decay_ratio=0.8), steps=10)
    assert schedule == Schedule(6, 1, 4)
    assert "decay_ratio = 0.8" in caplog.text


def _make(schedule: LRSchedulerConfig, optimizer: OptimizerConfig, steps: int):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizers = build_optimizer(model, section=optimizer)
    return optimizers, build_lr_scheduler(optimizers, section=schedule, steps=steps)


def test_every_group_follows_the_schedule_from_its_own_peak():
    section = OptimizerConfig(lr=0.1, param_groups=[ParamGroupConfig(match="1.*", lr_scale=3.0)])
    optimizers, scheduler = _make(LRSchedulerConfig(warmup_steps=4, decay_ratio=0.0), section, steps=8)
    seen = []
    for _ in range(6):
        seen.append(scheduler.get_last_lr())
        scheduler.step()
    assert [lrs[0] for lrs in seen] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert [lrs[1] for lrs in seen] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3])
    assert [group["lr"] for group in optimizers.param_groups] == scheduler.get_last_lr()


def test_resuming_gives_the_uninterrupted_rates_and_a_changed_schedule_gives_its_own():
    schedule, section = LRSchedulerConfig(warmup_steps=3), OptimizerConfig(lr=0.1)
    _, whole = _make(schedule, section, steps=12)
    for _ in range(5):
        whole.step()
    saved = whole.state_dict()
    _, resumed = _make(schedule, section, steps=12)
    resumed.load_state_dict(saved)
    _, longer = _make(schedule, section, steps=24)
    longer.load_state_dict(saved)
    for step in range(5, 12):
        assert resumed.get_last_lr() == whole.get_last_lr()
        assert longer.get_last_lr() == [0.1 * build_schedule(schedule, steps=24).lr_factor(step)]
        for scheduler in (whole, resumed, longer):
            scheduler.step()


def test_a_changed_peak_takes_effect_on_resume():
    _, first = _make(LRSchedulerConfig(warmup_steps=0, decay_ratio=0.0), OptimizerConfig(lr=0.1), steps=4)
    first.step()
    optimizers, second = _make(LRSchedulerConfig(warmup_steps=0, decay_ratio=0.0), OptimizerConfig(lr=0.3), steps=4)
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == [0.3]
    assert torch.tensor(optimizers.param_groups[0]["lr"]).item() == pytest.approx(0.3)
