"""Delayed and static scaling: what a straightforward reference gives, through spikes, infinities, zeros and resumes."""

import copy
import json

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.llama3.args import LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from trainer.config.schema_quantize import Float8LinearConfig
from trainer.low_precision.convert import apply_float8
from trainer.low_precision.float8_linear import Float8Linear
from trainer.low_precision.float8_training import convert_to_float8_training, sync_float8_amax_and_scale_history
from trainer.low_precision.recipe import E4M3, E5M2
from trainer.low_precision.scaling_history import ScalingHistory, set_static_scales, write_static_scales

LIMITS = {"input": 448.0, "weight": 448.0, "grad_output": 57344.0}
DTYPES = {"input": E4M3, "weight": E4M3, "grad_output": E5M2}


def build(n_layers: int = 1, **settings) -> tuple[nn.Sequential, ScalingHistory]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(n_layers))).bfloat16()
    settings = {"recipe_name": "delayed", "emulate": True, "amax_history_len": 3, "delayed_warmup_steps": 1} | settings
    convert_to_float8_training(model, config=Float8LinearConfig(**settings))
    return model, model.float8_history


def make_batch(step: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 32, generator=generator) * scale
    return x.bfloat16(), (torch.randn(16, 32, generator=generator) * 1e-4).bfloat16()


def take_step(model: nn.Module, *batches: tuple[Tensor, Tensor], lr: float = 0.0) -> list[Tensor]:
    """Forward and backward of each batch, sync, and an update. Return outputs and gradients."""
    results = []
    for x, g in batches:
        x = x.clone().requires_grad_()
        y = model(x)
        y.backward(g)
        assert x.grad is not None
        results += [y.detach(), x.grad]
    sync_float8_amax_and_scale_history(model)
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            results.append(p.grad)
            p.sub_(lr * p.grad)
            p.grad = None
    return results


def get_scale(model: nn.Module, kind: str = "input", layer: int = 0) -> float:
    return getattr(model[layer], f"scale_{kind}").item()


class Reference:
    """Delayed scaling of one layer, written down plainly."""

    def __init__(self, weight: Tensor, history_len: int, algo: str) -> None:
        self.weight, self.length, self.algo = weight.clone(), history_len, algo
        self.past: dict[str, list[float]] = {kind: [] for kind in LIMITS}

    def get_scale(self, kind: str, tensor: Tensor) -> float:
        past = self.past[kind][-self.length :]
        if not past:
            past = [tensor.abs().max().item()]
        return torch.tensor(LIMITS[kind] / (max(past) if self.algo == "max" else past[-1])).item()

    def round(self, kind: str, tensor: Tensor) -> Tensor:
        scale, limit = self.get_scale(kind, tensor), LIMITS[kind]
        return (tensor.float() * scale).clamp(-limit, limit).to(DTYPES[kind]).float() / scale

    def step(self, *batches: tuple[Tensor, Tensor]) -> list[Tensor]:
        results, total = [], torch.zeros_like(self.weight)
        amaxes = dict.fromkeys(LIMITS, 0.0)
        for x, g in batches:
            x8, w8, g8 = self.round("input", x), self.round("weight", self.weight), self.round("grad_output", g)
            results += [(x8 @ w8.t()).bfloat16(), (g8 @ w8).bfloat16()]
            total += (g8.t() @ x8).bfloat16()
            for kind, tensor in (("input", x), ("weight", self.weight), ("grad_output", g)):
                amaxes[kind] = max(amaxes[kind], tensor.abs().max().item())
        for kind, amax in amaxes.items():
            self.past[kind].append(amax)
        return [*results, total]


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_delayed_scaling_equals_a_plain_reference(algo, microbatches):
    model, _ = build(amax_compute_algo=algo)
    reference = Reference(model[0].weight.detach(), 3, algo)
    for step in range(7):
        # Among them a spike, which saturates once and then leaves no room for the rest until it is forgotten.
        spike = 30.0 if step == 2 else 1.0
        batches = [make_batch(10 * step + i, spike if i == 0 else 1.0) for i in range(microbatches)]
        actual, expected = take_step(model, *batches), reference.step(*batches)
        for mine, theirs in zip(actual, expected, strict=True):
            assert (mine.float() - theirs.float()).norm() <= 4e-3 * theirs.float().norm(), step


def test_history_of_a_compiled_model_is_synced_once_a_step():
    model, history = build()
    compiled = torch.compile(model, backend="eager")
    for step in range(2):
        x, g = make_batch(step)
        compiled(x).backward(g)
        sync_float8_amax_and_scale_history(compiled)
        assert history.steps == step + 1
        assert (history.amaxes > 0).all()


def test_spike_is_remembered_as_long_as_the_history():
    scales = {}
    for algo in ("max", "most_recent"):
        model, _ = build(amax_compute_algo=algo)
        scales[algo] = []
        for step in range(7):
            take_step(model, make_batch(0, 64.0 if step == 2 else 1.0))
            scales[algo].append(get_scale(model))
    quiet, loud = scales["max"][0], scales["max"][0] / 64
    assert scales["max"] == [quiet, quiet, loud, loud, loud, quiet, quiet]
    assert scales["most_recent"] == [quiet, quiet, loud, quiet, quiet, quiet, quiet]


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 0.0])
def test_amax_that_says_nothing_changes_nothing(bad):
    model, history = build()
    take_step(model, make_batch(0))
    before = history.state_dict()
    x, g = make_batch(1)
    x = torch.zeros_like(x) if bad == 0.0 else x.index_fill(0, torch.tensor([0]), bad)
    take_step(model, (x, g))
    after = history.state_dict()
    assert torch.equal(before["0.scale"][0], after["0.scale"][0])
    assert torch.equal(before["0.amax_history"][:, 0], after["0.amax_history"][:, 0])
    assert not torch.equal(before["0.amax_history"][:, 1], after["0.amax_history"][:, 1]), "the weight's goes on"
    take_step(model, make_batch(2))
    assert all(value.isfinite().all() for value in history.state_dict().values())


def test_margin_leaves_room():
    wide, _ = build(margin=2)
    tight, _ = build()
    for model in (wide, tight):
        take_step(model, make_batch(0))
    assert get_scale(wide) * 4 == get_scale(tight)


def test_first_steps_scale_by_what_tensors_hold():
    """With scales of 1, gradients of 1e-7 would all be zero in e5m2."""
    model, _ = build(delayed_warmup_steps=2)
    x, g = make_batch(0)
    for _ in range(4):
        _, grad_x, grad_weight = take_step(model, (x, g * 1e-3))
        assert (grad_x != 0).float().mean() > 0.9
        assert (grad_weight != 0).float().mean() > 0.9


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_recomputation_and_compilation_change_nothing(compiles):
    plain, plain_history = build(2)
    other, other_history = build(2)
    inner = other.forward

    def forward(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=False)

    other.forward = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiles else forward
    for step in range(4):
        batches = [make_batch(2 * step), make_batch(2 * step + 1)]
        for a, b in zip(take_step(plain, *batches, lr=1.0), take_step(other, *batches, lr=1.0), strict=True):
            assert torch.equal(a, b)
    for name, value in plain_history.state_dict().items():
        assert torch.equal(value, other_history.state_dict()[name]), name


def test_resume_is_exact():
    model, history = build(2, delayed_warmup_steps=3)
    for step in range(2):
        take_step(model, make_batch(step), lr=1.0)
    resumed, its_history = build(2, delayed_warmup_steps=3)
    resumed.load_state_dict(model.state_dict())
    its_history.load_state_dict(history.state_dict())
    for step in range(2, 7):  # through the end of the warm-up
        for a, b in zip(*(take_step(m, make_batch(step), lr=1.0) for m in (model, resumed)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("length", [2, 5])
def test_history_of_another_length_is_cut_or_begins_with_what_there_is(length):
    model, history = build()
    for step, size in enumerate((8.0, 1.0, 4.0)):
        take_step(model, make_batch(step, size))
    resumed, its_history = build(amax_history_len=length)
    its_history.load_state_dict(history.state_dict())
    take_step(resumed, make_batch(9, 0.1))
    newest = its_history.state_dict()["0.amax_history"][:, 0]
    assert len(newest) == length
    assert torch.equal(newest[1 : min(length, 4)], history.state_dict()["0.amax_history"][: min(length, 4) - 1, 0])
    assert (newest > 0).sum() == min(length, 4)


def test_model_has_no_new_state_and_scales_stay_float32():
    model, _ = build()
    assert list(model.state_dict()) == ["0.weight"]
    take_step(model, make_batch(0))
    scale = get_scale(model)
    assert copy.deepcopy(model).half().float()[0].scale_input.item() == scale
    assert model.to_empty(device="cpu")[0].scale_input.dtype == torch.float32


def test_validation_leaves_no_trace():
    model, history = build()
    take_step(model, make_batch(0))
    model.eval()
    model(make_batch(1, 100.0)[0])
    assert not model[0].amax_input
    assert history.steps == 1


@pytest.mark.parametrize("kind", ["input", "weight", "grad_output"])
def test_scaling_is_chosen_for_each_kind(kind):
    settings = {"recipe_name": "tensorwise", f"scaling_type_{kind}": "delayed"}
    model, history = build(**settings)
    dynamic, _ = build(recipe_name="tensorwise", write_scales_file="x")
    results = [take_step(m, make_batch(0)) for m in (model, dynamic)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "in the first step all are dynamic"
    assert [get_scale(model, other) != 1.0 for other in LIMITS] == [other == kind for other in LIMITS]
    assert history.get_static_scales()["0"].keys() == {kind}


def test_resumed_run_that_writes_scales_says_what_they_leave_out(caplog):
    model, history = build(write_scales_file="scales.json")
    take_step(model, make_batch(0))
    history.load_state_dict(history.state_dict())
    assert not caplog.messages, "it was seen here"
    build(write_scales_file="scales.json")[1].load_state_dict(history.state_dict())
    assert [line.rpartition(":")[0] for line in caplog.messages] == [
        "the scales for scales.json will be of what is seen from now on"
    ]


def test_static_scales_come_from_a_run_that_writes_them(tmp_path):
    model, history = build(2, recipe_name="tensorwise", write_scales_file="x")
    dynamic = take_step(model, make_batch(0))
    path = tmp_path / "scales.json"
    write_static_scales(path, history.get_static_scales())
    settings = {"recipe_name": "static", "emulate": True, "static_scales_file": str(path)}
    torch.manual_seed(0)
    static = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(2))).bfloat16()
    convert_to_float8_training(static, config=Float8LinearConfig(**settings))
    assert get_scale(static, "grad_output", 1) == json.loads(path.read_text())["scales"]["1"]["grad_output"]
    x = make_batch(0)[0].requires_grad_()
    y = static(x)
    y.backward(make_batch(0)[1])
    assert torch.equal(y, dynamic[0])
    assert torch.equal(x.grad, dynamic[1])
    with pytest.raises(ValueError, match="scaling is dynamic or static"):
        sync_float8_amax_and_scale_history(static)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "0 has the scale None. Give all layers one by quantize.linear.float8.static_scale_input"),
        ({"static_scales_file": "/nowhere"}, "cannot be read as a file of scales"),
    ],
)
def test_missing_static_scale_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(recipe_name="static", **settings)


def test_own_loop_as_the_readme_of_torchao_had_it():
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 16)).bfloat16()
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(recipe_name="delayed", emulate=True),
        module_filter_fn=lambda module, name: name != "1",
    )
    assert [type(module) for module in model] == [Float8Linear, nn.Linear]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(torch.ones(16, 64, dtype=torch.bfloat16)).square().mean()
        loss.backward()
        sync_float8_amax_and_scale_history(model)
        optimizer.step()
    assert loss < 1e-2
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        convert_to_float8_training(nn.Sequential(nn.Linear(3, 3)))


def test_own_loop_refuses_what_it_would_not_follow(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64))
    for settings in ({"filter_fqns": ["0"]}, {"keep_last_blocks": 1}, {"fp8_opt_level": "O2"}):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))} = .*: is for a run of the trainer"):
            convert_to_float8_training(model, config=Float8LinearConfig(**settings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ValueError, match=r"A100 has 8\.0"):
        convert_to_float8_training(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_layers_with_the_same_input_share_its_scale(tp_degree):
    """So that a compiled block casts it once."""
    args = LlamaArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=96, max_seq_len=16)
    section = Float8LinearConfig(recipe_name="delayed", emulate=True)
    model = Transformer(args)
    apply_float8(model, section=section, plan=build_plan(args), tp_degree=tp_degree)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    set_static_scales(layers, section)
    for block in model.layers.values():
        attention, feed_forward = block.attention, block.feed_forward
        assert attention.wq.amax_input is attention.wk.amax_input is attention.wv.amax_input
        assert feed_forward.w1.scale_input is feed_forward.w3.scale_input
        apart = {id(layer.amax_input) for layer in (attention.wq, attention.wo, feed_forward.w1, feed_forward.w2)}
        assert len(apart) == 4
    assert model.layers["0"].attention.wq.amax_input is not model.layers["1"].attention.wq.amax_input
    assert all(
        layer.amax_weight is not layers["layers.0.attention.wq"].amax_weight for layer in list(layers.values())[1:]
    )
