"""A feed-forward that is one function in float8 gives what its layers give one by one, bit for bit.

`tests/gpu/test_float8.py` compares its kernels with the plain operations that serve here.
"""

import collections
import functools
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from models.common.feed_forward import FeedForward
from tests.unit.low_precision.test_float8_linear import relative_error
from trainer.config.schema_quantize import Float8LinearConfig
from trainer.low_precision.float8_feed_forward import Float8FeedForward
from trainer.low_precision.float8_tensor import Float8Tensor
from trainer.low_precision.float8_training import convert_to_float8_training, sync_float8_amax_and_scale_history
from trainer.low_precision.recipe import E4M3, KINDS
from trainer.low_precision.scaling import quantize
from trainer.low_precision.swiglu_cast import swiglu_backward_cast, swiglu_cast

STATIC = {"static_scale_input": 20.0, "static_scale_weight": 300.0, "static_scale_grad_output": 3e6}
SETTINGS: dict[str, dict[str, Any]] = {
    "tensorwise": {"recipe_name": "tensorwise"},
    "powers_of_2": {"round_scales_to_power_of_2": True, "pad_inner_dim": True},
    "real": {"recipe_name": "delayed", "emulate": False, "delayed_warmup_steps": 1},
    "delayed": {"recipe_name": "delayed", "delayed_warmup_steps": 1},
    "cold": {"recipe_name": "delayed", "delayed_warmup_steps": 0, "fused_cast": "all"},
    "static": {"recipe_name": "static", **STATIC},
    "mixed": {"recipe_name": "delayed", "scaling_type_grad_output": "dynamic", "scaling_type_weight": "static", **STATIC},
    "written": {"recipe_name": "tensorwise", "write_scales_file": "unused.json"},
    "recast": {"recipe_name": "delayed", "force_recompute_fp8_weight_in_bwd": True},
}  # fmt: skip


def make(settings: dict[str, Any], *, fuses: bool = True, dtype: torch.dtype = torch.bfloat16) -> FeedForward:
    torch.manual_seed(0)
    part = FeedForward(64, 96).to(dtype)
    config = Float8LinearConfig(**{"emulate": True, **settings, **({} if fuses else {"fused_cast": "never"})})
    convert_to_float8_training(part, config=config)
    assert (type(part) is Float8FeedForward) == fuses
    return part


def run(part: nn.Module, *, steps: int = 3, tokens: int = 48, needs_x: bool = True) -> list[Tensor]:
    """Output and all gradients, and what was recorded, of each step."""
    generator, like = torch.Generator().manual_seed(1), part.w1.weight
    results = []
    for step in range(steps):
        x = (torch.randn(2, tokens // 2, 64, generator=generator) * (1 + step)).to(like)
        x.requires_grad_(needs_x)
        y = part(x)
        part.zero_grad()
        y.backward((torch.randn(y.shape, generator=generator) * 1e-5).to(y))
        results += [y.detach(), x.grad, *(weight.grad for weight in part.parameters())]
        results += [buffer.clone() for name, buffer in part.named_buffers(remove_duplicate=False) if "amax" in name]
        if hasattr(part, "float8_history"):
            sync_float8_amax_and_scale_history(part)
    return results


class _CountCasts(TorchDispatchMode):
    """Counts the fused operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bloomery":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def run_fused(part: nn.Module, passes: tuple[int, int] = (3, 3), **options: Any) -> list[Tensor]:
    """As `run`. passes: how often the function has to run, forward and backward."""
    with _CountCasts() as mode:
        results = run(part, **options)
    assert (mode.counts["swiglu_cast"], mode.counts["swiglu_backward_cast"]) == passes
    return results


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or (mine.dtype == other.dtype and torch.equal(mine, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_one_function_gives_the_bits_of_its_layers(name, dtype):
    expected = run(make(SETTINGS[name], fuses=False, dtype=dtype))
    assert all(result.float().abs().max() > 0 for result in expected[:5])
    assert_same(run_fused(make(SETTINGS[name], dtype=dtype)), expected)


@pytest.mark.parametrize("name", ["delayed", "tensorwise"])
def test_compiled_or_recomputed_it_gives_the_same(name):
    expected = run(make(SETTINGS[name], fuses=False))
    part = make(SETTINGS[name])
    part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
    with _CountCasts() as mode:
        assert_same(run(part), expected)
    assert mode.counts["swiglu_cast"] == 2 * mode.counts["swiglu_backward_cast"] == 6
    torch._dynamo.reset()
    part = make(SETTINGS[name])
    part.forward = torch.compile(part.forward, backend="aot_eager", fullgraph=True)
    assert_same(run(part), expected)


def test_layers_that_share_the_input_cast_it_once_and_record_the_same():
    """As the converter's plan has it."""

    def share(part: FeedForward) -> FeedForward:
        for name in ("scale_input", "amax_input"):
            part.w3._buffers[name] = part.w1._buffers[name]
        return part

    expected = run(share(make(SETTINGS["delayed"], fuses=False)))
    assert_same(run_fused(share(make(SETTINGS["delayed"]))), expected)
    saved: dict[int, Tensor] = {}
    part = share(make(SETTINGS["delayed"]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        part(torch.randn(48, 64, dtype=torch.bfloat16))
    kept = collections.Counter((t.dtype, tuple(t.shape)) for t in saved.values() if t.ndim)
    assert kept[torch.bfloat16, (48, 96)] == 2, "a and b, and not what is made of them"
    assert kept[E4M3, (48, 64)] == 1


@pytest.mark.parametrize("name", ["delayed", "tensorwise"])
@pytest.mark.parametrize("frozen", [("w1",), ("w3", "x"), ("w2",), ("w1", "w3", "x"), ("w1", "w3", "w2")], ids=str)
def test_what_needs_no_gradient_gets_and_records_none(name, frozen):
    results = []
    for fuses in (True, False):
        part = make(SETTINGS[name], fuses=fuses)
        for weight in frozen:
            getattr(part, weight, nn.Linear(1, 1)).requires_grad_(False)
        results.append(run(part, needs_x="x" not in frozen))
    assert_same(*results)
    assert sum(result is None for result in results[0][:5]) == len(frozen)


def test_evaluation_leaves_no_trace():
    part = make(SETTINGS["cold"])
    x = torch.randn(48, 64, dtype=torch.bfloat16)
    with torch.no_grad(), _CountCasts() as mode:
        part.eval()(x)
    assert mode.counts["swiglu_cast"] == 1
    assert not any(getattr(linear, f"amax_{kind}") for linear in part.children() for kind in KINDS)
    part.train()(x)
    assert part.w2.amax_input > 0


def test_weights_that_came_in_float8_are_used_as_they_are():
    """As FSDP gathers them."""
    results = []
    for fuses in (True, False):
        part = make(SETTINGS["static"], fuses=fuses)
        weights = []
        for linear in part.children():
            weight = linear.weight.detach()
            del linear.weight
            linear.weight = Float8Tensor(*quantize(weight.float(), E4M3), torch.bfloat16).requires_grad_()
            weights.append(linear.weight)
        x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        y = part(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])])
    assert_same(*results)


@pytest.mark.parametrize("why", ["measured", "hook", "recipes", "autocast", "method"])
def test_layers_that_do_more_than_multiply_compute_one_by_one(why):
    part = make({**SETTINGS["delayed"], "measure_freq": 1, "delayed_warmup_steps": 0})
    seen: list[Tensor] = []
    if why == "measured":
        for linear in part.children():
            linear.recipe = linear.recipe._replace(measures=True)
    elif why == "hook":
        part.w2.register_forward_hook(lambda module, args, y: seen.append(y))
    elif why == "recipes":
        part.w3.recipe = part.w3.recipe._replace(scalings=("dynamic",) * 3)
    elif why == "method":
        part.w1.forward = part.w1.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), _CountCasts() as mode:
        part(torch.randn(48, 64, dtype=torch.bfloat16))
    assert mode.counts["swiglu_cast"] == 0
    assert len(seen) == (why == "hook")
    assert bool(part.w2.counts_input.any()) == (why == "measured")


def test_parts_with_other_layers_stay_as_they_are():
    part = FeedForward(64, 96)
    convert_to_float8_training(part, module_filter_fn=lambda module, name: name != "w2")
    assert type(part) is FeedForward
    assert type(make({"recipe_name": "rowwise"}, fuses=False)) is FeedForward


def test_names_and_values_of_parameters_stay():
    part, plain = make(SETTINGS["delayed"]), FeedForward(64, 96)
    assert part.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(0)
    exact = run(FeedForward(64, 96).bfloat16(), steps=1)
    for mine, other in zip(run(part, steps=1)[:5], exact, strict=True):
        assert 0.005 < relative_error(mine, other) < 0.16


def test_operations_describe_themselves():
    a, b, gh = (torch.randn(48, 33, dtype=torch.bfloat16) for _ in range(3))
    scale, utils = torch.tensor(30.0), ("test_schema", "test_faketensor")
    for finds_amax in (False, True):
        torch.library.opcheck(swiglu_cast, (a, b, scale, finds_amax), test_utils=utils)
        torch.library.opcheck(swiglu_backward_cast, (gh, a, b, scale, scale, scale, finds_amax), test_utils=utils)
    for rows in (1, 0):
        *outputs, amaxes = swiglu_backward_cast(gh[:rows], a[:rows], b[:rows], scale, scale, scale, rows > 0)
        assert [output.shape for output in outputs] == [(rows, 33), (33, rows)] * 2 + [(33, rows)]
        assert bool(amaxes.all()) == (rows > 0)
