"""Adam with moments of few bits: the updates of torch and torchao, rounding that is right on average, and its state."""

import copy
import logging

import pytest
import torch
from torch import nn

from trainer.components.optimizer import build_optimizer
from trainer.config.schema_training import OptimizerConfig
from trainer.low_precision import adam
from trainer.low_precision.moments import Moment, choose_block, draw_bits, get_table, read, round_stochastically, write

SECTIONS = {
    "bfloat16": OptimizerConfig(lr=0.01, state_dtype="bfloat16"),
    "float8": OptimizerConfig(lr=0.01, state_dtype="float8"),
    "AdamW8bit": OptimizerConfig(lr=0.01, name="AdamW8bit"),
    "AdamWFp8": OptimizerConfig(lr=0.01, name="AdamWFp8"),
    "AdamW4bit": OptimizerConfig(lr=0.01, name="AdamW4bit"),
}
LOW_BIT = ("AdamW8bit", "AdamWFp8", "AdamW4bit")


@pytest.fixture(scope="module")
def torchao_optim():
    logging.getLogger("torchao").setLevel(logging.ERROR)
    return pytest.importorskip("torchao.optim")


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(256, 48).to(dtype)


def step(model, optimizer, number, scale=1.0):
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    optimizer.step()


def train(section, steps=3, dtype=torch.float32):
    model = make_model(dtype)
    optimizers = build_optimizer(model, section=section)
    for number in range(steps):
        step(model, optimizers, number)
    return model, optimizers


def get_distance(model, other):
    """How far apart two models are, as a share of the way that one has come."""
    start = make_model(model.weight.dtype).weight
    return ((model.weight - other.weight).norm() / (other.weight - start).norm()).item()


def get_bytes(optimizers):
    return sum(
        t.numel() * t.element_size() for name, t in optimizers.state_dict().items() if name.startswith("state.weight")
    )


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_moments_in_float32_give_the_updates_of_torch(name):
    """They are asked for beside parameters in bfloat16; here the optimizer is made for parameters in float32."""
    theirs, _ = train(OptimizerConfig(name=name, lr=0.01, weight_decay=0.3))
    ours = make_model()
    optimizer = adam.LowPrecisionAdam(
        ours.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3, moments=adam.MomentFormat("float32", "float32"),
        decoupled=name == "AdamW",
    )  # fmt: skip
    for number in range(3):
        step(ours, optimizer, number)
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)


def test_parameters_in_bfloat16_can_have_moments_in_float32():
    _, optimizers = train(OptimizerConfig(lr=0.01, state_dtype="float32"), dtype=torch.bfloat16)
    assert optimizers.state_dict()["state.weight.exp_avg"].dtype == torch.float32
    _, optimizers = train(OptimizerConfig(lr=0.01, state_dtype="float32"))
    assert type(optimizers.optimizers[0]) is torch.optim.AdamW, "torch's own kernel where it serves"


@pytest.mark.parametrize(
    ("key", "bytes_per_value", "distance"),
    [("bfloat16", 4, 0.01), ("float8", 3, 0.05), ("AdamW8bit", 2, 0.03), ("AdamWFp8", 2, 0.06), ("AdamW4bit", 1, 0.25)],
)
def test_moments_take_few_bytes_and_stay_near_float32(key, bytes_per_value, distance):
    expected, _ = train(OptimizerConfig(lr=0.01), steps=20)
    model, optimizers = train(SECTIONS[key], steps=20)
    assert 0 < get_distance(model, expected) < distance
    assert get_bytes(optimizers) / model.weight.numel() == pytest.approx(bytes_per_value, rel=0.07)


@pytest.mark.parametrize("name", LOW_BIT)
def test_codes_and_updates_are_those_of_torchao(name, torchao_optim):
    ours, optimizers = train(SECTIONS[name])
    theirs = make_model()
    reference = getattr(torchao_optim, name)(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    with torch.compiler.set_stance("force_eager"):
        for number in range(3):
            step(theirs, reference, number)
    torch.testing.assert_close(ours.weight, theirs.weight, atol=2e-6, rtol=1e-5)
    state = optimizers.optimizers[0]
    for index, key in enumerate(("exp_avg", "exp_avg_sq")):
        actual = read(state._get_moment(ours.weight, index)).view(48, 256)
        expected = reference.state[theirs.weight][key].dequantize()
        # A value that lies between two codes may go either way by a rounding error of its own.
        assert torch.isclose(actual, expected, rtol=1e-5, atol=1e-9).float().mean() > 0.999


@pytest.mark.parametrize(
    ("kind", "is_signed"), [("dynamic8", True), ("dynamic8", False), ("dynamic4", True), ("linear4", False)]
)
def test_every_code_is_stored_and_read_back(kind, is_signed):
    table = get_table(kind, is_signed, torch.device("cpu"))
    block = 32
    values = table.values.repeat(2).view(-1, block) * 3.0
    values[:, 0] = 3.0  # each block has a value that the table's 1 stands for
    moment = Moment(kind, torch.zeros(values.numel() // (2 if kind.endswith("4") else 1), dtype=torch.uint8), torch.zeros(len(values)), is_signed)  # fmt: skip
    write(moment, values, None)
    torch.testing.assert_close(read(moment), values)


@pytest.mark.parametrize("key", SECTIONS)
def test_resumed_run_goes_on_bit_for_bit_and_a_skipped_step_counts_for_nothing(key):
    expected, _ = train(SECTIONS[key], steps=4)
    model, optimizers = train(SECTIONS[key], steps=2)
    resumed = copy.deepcopy(model)
    resumed_optimizers = build_optimizer(resumed, section=SECTIONS[key])
    resumed_optimizers.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for parameter in resumed.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    resumed_optimizers.step(torch.tensor(1.0))
    for number in (2, 3):
        step(resumed, resumed_optimizers, number)
    assert torch.equal(resumed.weight, expected.weight)
    assert torch.equal(resumed.bias, expected.bias)


def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_not_finite():
    values = torch.tensor([1.0 + 1 / 512, -3.3, 1e-30, 0.0, 1.0]).repeat(4096)
    rounded = round_stochastically(values, draw_bits(values.numel(), step=7, salt=1, device=values.device)[0]).float()
    assert ((rounded - values).abs() <= values.abs() / 128).all()
    means = rounded.view(-1, 5).double().mean(0)
    torch.testing.assert_close(means, values[:5].double(), rtol=5e-4, atol=0)
    assert len(rounded.view(-1, 5)[:, 0].unique()) == 2
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), torch.finfo(torch.float32).max])
    for bits in (0, 65535):
        result = round_stochastically(odd, torch.full((4,), bits)).float()
        assert torch.equal(result[:2], odd[:2])
        assert result[2].isnan()
        assert not result[3].isnan()


def test_random_bits_differ_by_step_parameter_and_moment():
    draws = [draw_bits(5000, step=s, salt=p, device=torch.device("cpu")) for s, p in ((1, 0), (2, 0), (1, 1))]
    streams = [bits.float() for pair in draws for bits in pair]
    for position, bits in enumerate(streams):
        assert bits.mean() / 65535 == pytest.approx(0.5, abs=0.02)
        for other in streams[:position]:
            assert abs(torch.corrcoef(torch.stack([bits, other]))[0, 1]) < 0.06


def test_second_moment_in_bfloat16_falls_again_with_a_beta2_near_one():
    """By rounding to nearest a step of 0.1% would change nothing, ever."""
    section = OptimizerConfig(lr=0.01, beta2=0.999, state_dtype="bfloat16")
    model = make_model()
    optimizers = build_optimizer(model, section=section)
    step(model, optimizers, 0)
    before = optimizers.state_dict()["state.weight.exp_avg_sq"].float().mean()
    for number in range(100):
        step(model, optimizers, number, scale=0.0)
    after = optimizers.state_dict()["state.weight.exp_avg_sq"].float().mean()
    assert (after / before).item() == pytest.approx(0.999**100, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "shards", "block"),
    [((64, 1024), 1, 256), ((64, 1408), 1, 128), ((4, 64, 10944), 1, 64), ((64, 1408), 8, None), ((8192,), 1, None), ((8, 256), 1, None), ((64, 100), 1, None), ((64, 1000), 3, None)],
)  # fmt: skip
def test_blocks_divide_the_last_dim_on_a_rank(shape, shards, block):
    assert choose_block("float8", torch.Size(shape), shards) == block


def test_state_in_float32_can_be_gone_on_from_in_bfloat16_but_codes_cannot():
    _, optimizers = train(OptimizerConfig(lr=0.01))
    saved = optimizers.state_dict()
    resumed = build_optimizer(make_model(), section=SECTIONS["bfloat16"])
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state_dict()["state.weight.exp_avg"], saved["state.weight.exp_avg"].bfloat16())
    with pytest.raises(ValueError, match=r"does not fit: missing .*exp_avg_codes"):
        build_optimizer(make_model(), section=SECTIONS["AdamW8bit"]).load_state_dict(saved)
