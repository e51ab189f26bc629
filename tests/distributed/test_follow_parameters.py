"""An optimizer built before sharding equals one built after, whatever its kind; and the benchmark that measures what it costs."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.llama3 import SPEC
from models.llama3.args import LlamaArgs
from models.registry import register_model
from scripts.fsdp2 import claims
from scripts.fsdp2.measure import measure
from scripts.fsdp2.variants import Settings, get_obstacle
from tests.distributed.harness import run_distributed
from trainer.components.follow_parameters import follow_parameters

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    # It makes its state at once, for the whole parameters.
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.5),
}
SIZE = LlamaArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=2048, ffn_hidden_dim=256, max_seq_len=64)
SETTINGS = Settings(model="little_llama", flavor="little", device="cpu", steps=5, batch_size=1, seq_len=64)


def _build_model() -> nn.Module:
    torch.manual_seed(0)
    # Five rows on two ranks: shards of 3 and 2.
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model[2].bias.requires_grad_(False)
    return model


def _shard(model: nn.Module) -> None:
    fully_shard(model[0])
    fully_shard(model)


def _take_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _train(build, *, fixed: bool) -> list[torch.Tensor]:
    model = _build_model()
    if fixed:
        optimizer = build(model.parameters())
        with follow_parameters(model, optimizer):
            _shard(model)
    else:
        _shard(model)
        optimizer = build(model.parameters())
    _take_steps(model, optimizer)
    return [parameter.to_local() for parameter in model.parameters()]


def _shard_under_way(build) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Shard after the first step, when the optimizer knows something already. Return its state beside the whole one."""
    model = _build_model()
    optimizer = build(model.parameters())
    model(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    whole = {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
    with follow_parameters(model, optimizer):
        _shard(model)
    pairs = []
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            assert isinstance(value, DTensor) == (value.shape == parameter.shape), f"{name}.{key}"
            pairs.append((full, whole[name][key]))
    return pairs


def _compare_all():
    trained = {name: (_train(b, fixed=True), _train(b, fixed=False)) for name, b in OPTIMIZERS.items()}
    states = {name: _shard_under_way(OPTIMIZERS[name]) for name in ("AdamW", "SGD with momentum")}
    register_model(dataclasses.replace(SPEC, name=SETTINGS.model, flavors={SETTINGS.flavor: SIZE}))
    results = {}
    for variant in claims.VARIANTS:
        if get_obstacle(variant, SETTINGS) is None:
            results[variant] = measure(variant, SETTINGS, torch.device("cpu"))
    return trained, states, results


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(_compare_all, 2)


def test_optimizer_built_before_sharding_equals_one_built_after_bitwise(ranks):
    for trained, _, _ in ranks:
        for name, (fixed, after) in trained.items():
            assert all(torch.equal(a, b) for a, b in zip(fixed, after, strict=True)), name


def test_state_is_sharded_with_its_parameter(ranks):
    for _, states, _ in ranks:
        assert [len(pairs) for pairs in states.values()] == [9, 3]
        assert all(torch.equal(a, b) for pairs in states.values() for a, b in pairs)


def test_benchmark_finds_what_it_claims_and_draws_it(ranks, tmp_path):
    results = {name: {**result, "settings": vars(SETTINGS)} for name, result in ranks[0][2].items()}
    assert list(results) == [claims.AFTER, claims.NOT_FIXED, claims.FIXED, claims.TRAINER]
    found = claims.check(results)
    assert len(found) == 7
    assert not [claim for claim in found if not claim.holds]
    held = {name: result["optimizer_parameter_bytes"][0] / result["model_bytes"] for name, result in results.items()}
    assert held[claims.NOT_FIXED] == 1
    assert held[claims.FIXED] == held[claims.TRAINER] == pytest.approx(0.5, abs=0.01)
    assert "| trainer |" in claims.format_table(results)
    assert [path.name for path in claims.draw(results, tmp_path)] == ["host_memory.png", "losses.png"]


def test_benchmark_notices_what_is_not_so(ranks):
    results = dict(ranks[0][2])
    results[claims.NOT_FIXED] = results[claims.AFTER]
    results[claims.FIXED] = {
        **results[claims.AFTER],
        "losses": [loss + 1e-6 for loss in results[claims.AFTER]["losses"]],
    }
    failed = [claim.text for claim in claims.check(results) if not claim.holds]
    assert failed == [
        f"{claims.AFTER} learns",
        f"{claims.NOT_FIXED} does not train",
        f"{claims.NOT_FIXED} holds the unsharded parameters",
        f"{claims.FIXED} equals {claims.AFTER} bit for bit: losses",
    ]
