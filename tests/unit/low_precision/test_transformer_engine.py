"""TransformerEngine's layers and recipe, by a stand-in for the package, which is not installed where tests run."""

import contextlib
import sys
import types
from typing import Any, ClassVar

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.unit.low_precision.test_convert import ARGS, NO_PLAN, build
from trainer.config.schema_quantize import Float8LinearConfig, QuantizeConfig, QuantizeLinearConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.low_precision.convert import apply_float8, check_device
from trainer.low_precision.float8_training import build_float8_training, convert_to_float8_training


class FakeLinear(nn.Module):
    """Has what is used of theirs: the signature, parameters by name, and a state beside them."""

    def __init__(self, in_features: int, out_features: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        assert not bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert FakeEngine.depth == 1, "outside of autocast"
        FakeEngine.products += 1
        return F.linear(x, self.weight)

    def get_extra_state(self) -> Any:
        raise AssertionError("in a checkpoint")

    set_extra_state = get_extra_state


class FakeEngine:
    """What the package was asked for."""

    depth = products = 0
    options: ClassVar[dict[str, Any]] = {}

    @classmethod
    @contextlib.contextmanager
    def autocast(cls, **options: Any):
        cls.depth, cls.options = cls.depth + 1, options
        yield
        cls.depth -= 1


@pytest.fixture(params=["autocast", "fp8_autocast"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    recipes: Any = types.ModuleType("transformer_engine.common.recipe")
    recipes.Format = types.SimpleNamespace(HYBRID="hybrid")
    recipes.DelayedScaling = lambda **settings: ("delayed", settings)
    recipes.Float8CurrentScaling = lambda **settings: ("current", settings)
    pytorch: Any = types.ModuleType("transformer_engine.pytorch")
    pytorch.Linear = FakeLinear
    setattr(pytorch, request.param, FakeEngine.autocast)
    package, common = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.common")
    package.pytorch, package.common, common.recipe = pytorch, common, recipes  # type: ignore[attr-defined]
    for module in (package, common, recipes, pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(FakeEngine, "products", 0)
    return request.param


def test_layers_are_theirs_and_all_else_stays(engine: str) -> None:
    section = Float8LinearConfig(backend="te", recipe_name="delayed", margin=1, filter_fqns=["layers.0."])
    plain, model = build(), build()
    conversion = apply_float8(model, section=section, plan=NO_PLAN)
    assert len(conversion.converted) == 7
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    for network in (plain, model):
        init_weights(network, seed=0, device="cpu")
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model(tokens), plain(tokens))
    assert FakeEngine.products == 7
    settings = {"fp8_format": "hybrid", "margin": 1, "amax_history_len": 16, "amax_compute_algo": "max"}
    names = ("recipe", "amax_reduction_group") if engine == "autocast" else ("fp8_recipe", "fp8_group")
    assert FakeEngine.options == {"enabled": True, names[0]: ("delayed", settings), names[1]: None}


def test_rest_of_the_run_knows_nothing_of_it(engine: str) -> None:
    section = Float8LinearConfig(backend="te")
    model = build()
    apply_float8(model, section=section, plan=NO_PLAN)
    init_weights(model, seed=0, device="cpu")
    model(torch.arange(16)[None])
    assert ("current", {"fp8_format": "hybrid"}) in FakeEngine.options.values()
    training = build_float8_training(
        model,
        converters=["float8"],
        quantize=QuantizeConfig(linear=QuantizeLinearConfig(float8=section)),
        dims=ParallelDims(world_size=1, dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1),
        device=torch.device("cpu"),
    )
    assert training.states() == {}
    with pytest.raises(ValueError, match="only native layers"):
        convert_to_float8_training(build(ARGS), config=section)


def test_package_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        ValueError, match=r"needs the package transformer_engine, which .*pip install .*, or use 'native'"
    ):
        check_device(Float8LinearConfig(backend="te"))


def test_cpu_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'te' needs a GPU"):
        check_device(Float8LinearConfig(backend="te"))
