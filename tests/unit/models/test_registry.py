"""Families by name, users' own families, and the absence of torch."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import models.registry as registry
from models.llama3 import SPEC
from models.llama3.args import LlamaArgs
from models.llama3.plan import build_plan
from models.registry import ModelSpec, get_model_spec, list_models, register_model

ROOT = Path(__file__).resolve().parents[3]


def make_spec(name: str, model_class: str = "models.llama3.model:Transformer") -> ModelSpec:
    return ModelSpec(
        name=name,
        flavors={"tiny": LlamaArgs(dim=64, n_heads=4, n_kv_heads=2)},
        build_plan=build_plan,
        model_class=model_class,
        adapter_class="models.llama3.state_dict_adapter:Llama3Adapter",
    )


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.parametrize(("name", "adapter"), [("llama3", "Llama3Adapter"), ("deepseek_v3", "DeepSeekV3Adapter")])
def test_get_model_spec_builtin_loads_classes(name: str, adapter: str) -> None:
    spec = get_model_spec(name)
    assert spec is importlib.import_module(f"models.{name}").SPEC
    assert spec.load_model_class().__name__ == "Transformer"
    assert spec.load_adapter_class().__name__ == adapter


@pytest.mark.parametrize(
    ("name", "hint"), [("lama3", "did you mean 'llama3'"), ("zzzzzz", "experimental.custom_import")]
)
def test_get_model_spec_unknown_names_the_known(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"unknown model\.name") as caught:
        get_model_spec(name)
    assert hint in str(caught.value)
    assert "Known: " in str(caught.value)


def test_get_args_unknown_flavor_suggests() -> None:
    with pytest.raises(ValueError, match=r"model\.flavor of 'llama3': '8b', did you mean '8B'"):
        SPEC.get_args("8b")


@pytest.mark.usefixtures("_own_registry")
def test_register_model_makes_it_known() -> None:
    spec = make_spec("mine")
    register_model(spec)
    register_model(spec)  # the module that registers it may be imported twice
    assert get_model_spec("mine") is spec
    assert list_models() == ["deepseek_v3", "llama3", "mine"]


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("name", ["llama3", "mine"])
def test_register_model_refuses_a_taken_name(name: str) -> None:
    if name == "mine":
        register_model(make_spec("mine", "elsewhere:Model"))
    with pytest.raises(ValueError, match=f"{name!r} is registered already"):
        register_model(make_spec(name))


@pytest.mark.parametrize(("name", "flavor"), [("llama3", "8B"), ("deepseek_v3", "16B")])
def test_configuration_side_imports_no_torch(name: str, flavor: str) -> None:
    code = (
        f"import sys, models.plan; from models.registry import get_model_spec as get; spec = get({name!r});"
        f"args = spec.get_args({flavor!r}); spec.build_plan(args); args.flops_per_token(8192);"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
