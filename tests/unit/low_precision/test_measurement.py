"""What is counted is what was cut off and lost, in the steps that are measured, and growth is warned about once."""

import logging

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trainer.config.schema_quantize import Float8LinearConfig
from trainer.low_precision.float8_linear import Float8Linear
from trainer.low_precision.float8_training import convert_to_float8_training
from trainer.low_precision.measurement import Measurement
from trainer.low_precision.recipe import E4M3
from trainer.low_precision.scaling import Quantized, cast, measure


def build(n_layers: int = 1, **settings) -> tuple[nn.Module, Measurement]:
    torch.manual_seed(0)
    settings = {"emulate": True, "measure_freq": 2} | settings
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(n_layers))).bfloat16()
    convert_to_float8_training(model, config=Float8LinearConfig(**settings))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    return model, Measurement(layers, freq=2)


def take_step(model: nn.Module, measurement: Measurement, step: int, x: Tensor) -> dict[str, float]:
    measurement.begin_step(step)
    model(x.bfloat16().requires_grad_()).backward(torch.ones(len(x), 32, dtype=torch.bfloat16))
    metrics = {name: value.item() for name, value in measurement.collect().items()}
    if hasattr(model, "float8_history"):
        model.float8_history.sync()
    return metrics


def test_counts_are_of_what_is_cut_off_and_lost():
    x = torch.tensor([0.0, 1e-6, 1.0, 448.0, 460.0, 500.0, -1e9, 3.0])
    counts = torch.zeros(3)
    for _ in range(2):
        measure(x, Quantized(cast(x, torch.tensor(1.0), E4M3), torch.tensor(1.0)), counts)
    assert counts.tolist() == [16, 4, 2], "460 is rounded to 448, not cut"


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed"])
def test_measured_steps_have_metrics_of_each_tensor(name):
    model, measurement = build(recipe_name=name)
    x = torch.randn(16, 32)
    x[0, 0] = 1e-9
    assert take_step(model, measurement, 1, x) == {}
    metrics = take_step(model, measurement, 2, x)
    for kind in ("input", "weight", "grad_output"):
        assert {f"float8/0/{kind}/{part}" for part in ("amax", "scale", "saturated", "underflowed")} <= metrics.keys()
        assert metrics[f"float8/0/{kind}/saturated"] == 0.0
    assert metrics["float8/0/input/amax"] == x.bfloat16().abs().max()
    assert metrics["float8/0/input/underflowed"] == metrics["float8/underflowed_max"] >= 1 / 512
    assert not model[0].recipe.measures
    assert not model[0].counts_input.any()


def test_measuring_changes_no_result_and_the_history_goes_on():
    plain, _ = build(recipe_name="delayed", measure_freq=0)
    measured, measurement = build(recipe_name="delayed")
    for step in range(4):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        take_step(measured, measurement, step, x)
        plain(x.bfloat16().requires_grad_()).backward(torch.ones(16, 32, dtype=torch.bfloat16))
        plain.float8_history.sync()
    assert torch.equal(plain[0].weight.grad, measured[0].weight.grad)
    assert torch.equal(plain[0].scale_input, measured[0].scale_input)


def test_block_is_compiled_once_for_each_kind_of_step():
    """In the warm-up and after it, measured and not."""
    model, measurement = build(n_layers=2, recipe_name="delayed", delayed_warmup_steps=3)
    counter = CompileCounterWithBackend("eager")
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    for step in range(9):
        take_step(model, measurement, step, torch.randn(16, 32))
    assert counter.frame_count == 4


def test_growing_saturation_is_warned_about(caplog):
    model, measurement = build(
        recipe_name="static", static_scale_input=1.0, static_scale_weight=1.0, static_scale_grad_output=1.0
    )
    quiet, loud = torch.ones(16, 32), torch.full((16, 32), 1000.0)
    with caplog.at_level(logging.WARNING):
        assert take_step(model, measurement, 2, quiet)["float8/saturated_max"] == 0.0
        assert not caplog.messages
        assert take_step(model, measurement, 4, loud)["float8/saturated_max"] == 1.0
        take_step(model, measurement, 6, loud)
    assert caplog.messages == ["float8 saturation grows: 100.00% of the input of 0 is cut off"]
