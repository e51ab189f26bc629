import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from models.common.moe import MoE
from models.common.router import Router
from trainer.components.expert_balance import ExpertBalance, build_expert_balance
from trainer.distributed.parallel_dims import ParallelDims

RUN, SKIP = torch.tensor(0.0), torch.tensor(1.0)
SPEED = 0.25


def make_mixture(counts: list[int]) -> MoE:
    mixture = MoE(4, 4, router=Router(4, len(counts), 1))
    mixture.tokens_per_expert.copy_(torch.tensor(counts))
    return mixture


def make_balance(*counts: list[int]) -> ExpertBalance:
    layers = {f"layers.{i}": make_mixture(its_counts) for i, its_counts in enumerate(counts)}
    return ExpertBalance(layers, bias_update_speed=SPEED, groups=[])


def bias_of(load: ExpertBalance, layer: int) -> list[float]:
    bias = load.layers[f"layers.{layer}"].router.expert_bias
    assert bias is not None
    return bias.tolist()


def test_update_makes_busy_experts_less_likely_and_counts_anew() -> None:
    load = make_balance([9, 1, 1, 1], [2, 2, 3, 1])
    load.update(RUN)
    # Steps of the sign, less their mean.
    assert bias_of(load, 0) == pytest.approx([-0.375, 0.125, 0.125, 0.125])
    assert bias_of(load, 1) == pytest.approx([0, 0, -SPEED, SPEED])
    assert all(not mixture.tokens_per_expert.any() for mixture in load.layers.values())


def test_step_that_is_left_out_moves_no_bias_and_counts_anew() -> None:
    load = make_balance([9, 1, 1, 1])
    load.update(SKIP)
    assert bias_of(load, 0) == [0, 0, 0, 0]
    assert not load.layers["layers.0"].tokens_per_expert.any()


def test_measures_tell_how_even_the_load_was() -> None:
    load = make_balance([4, 4, 4, 4], [16, 0, 0, 0])
    assert load.measure() == {}, "no step yet"
    load.update(RUN)
    values = {name: value.item() for name, value in load.measure().items()}
    assert values["experts/layers.0/max_over_mean"] == 1.0
    assert values["experts/layers.0/entropy"] == pytest.approx(1.0)
    assert values["experts/layers.1/max_over_mean"] == values["experts/max_over_mean"] == 4.0
    assert values["experts/layers.1/entropy"] == values["experts/entropy"] == 0.0
    assert values["experts/dropped"] == 0.0
    assert "experts/forced_balance" not in values


def test_lost_tokens_show() -> None:
    load = make_balance([3, 3], [3, 2])
    load.update(RUN)
    assert load.measure()["experts/dropped"] == 1.0


def test_entropy_is_that_of_the_shares() -> None:
    load = make_balance([3, 1])
    load.update(RUN)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert load.measure()["experts/entropy"].item() == pytest.approx(expected)


def test_forced_balance_is_set_on_the_routers_and_labelled() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleDict({"3": nn.ModuleDict({"moe": make_mixture([1, 1])})})})
    dims = ParallelDims(world_size=1)
    options = {
        "args": SimpleNamespace(n_experts=2, bias_update_speed=SPEED),
        "dims": dims,
        "device": torch.device("cpu"),
    }
    assert list(build_expert_balance(model, **options).layers) == ["layers.3"]
    load = build_expert_balance(model, **options, force_load_balance=True)
    assert load.layers["layers.3"].router.force_load_balance
    load.update(RUN)
    assert load.measure()["experts/forced_balance"] == 1.0


def test_forced_balance_is_labelled_by_a_stage_of_dense_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank writes the metrics, and its stage of a pipeline may have no experts."""
    monkeypatch.setattr(dist, "all_reduce", lambda worst, **_: worst.fill_(1.0))
    stage = ExpertBalance({}, bias_update_speed=SPEED, groups=[], pp_group=object(), is_forced=True)  # type: ignore[arg-type]
    assert stage.measure()["experts/forced_balance"] == 1.0


def test_model_without_experts_has_nothing_to_do() -> None:
    load = build_expert_balance(
        nn.Linear(2, 2), args=SimpleNamespace(), dims=ParallelDims(world_size=1), device=torch.device("cpu")
    )
    load.update(RUN)
    assert load.measure() == {}
