"""Globs over module names, and Llama 3's plan on its real modules."""

import dataclasses

import pytest
import torch

from models.llama3.args import FLAVORS
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from models.plan import match_modules

NAMES = ["", "tok_embeddings", "layers", "layers.0", "layers.0.attention", "layers.0.attention.wq", "layers.10", "norm"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("layers.*", ["layers.0", "layers.10"]),
        ("norm", ["norm"]),
        ("layers.*.attention", ["layers.0.attention"]),
        ("layers.*.attention.w*", ["layers.0.attention.wq"]),
        ("layers.0", ["layers.0"]),
    ],
)
def test_match_modules_star_is_one_component(glob: str, expected: list[str]) -> None:
    assert match_modules(glob, NAMES) == expected


@pytest.mark.parametrize("glob", ["layer.*", "layers.*.feed_forward", "norm.*", "*.*.*.*.*", "layersx0"])
def test_match_modules_raises_where_nothing_matches(glob: str) -> None:
    with pytest.raises(ValueError, match="matches no module") as caught:
        match_modules(glob, NAMES)
    assert repr(glob) in str(caught.value)
    assert "tok_embeddings" in str(caught.value)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_plan_covers_the_model(tie_embeddings: bool) -> None:
    args = dataclasses.replace(FLAVORS["debugmodel"], tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = Transformer(args)
    plan = build_plan(args)
    names = [name for name, _ in model.named_modules()]
    assert match_modules(plan.blocks, names) == [f"layers.{i}" for i in range(args.n_layers)]
    units = [name for unit in plan.fsdp_units for glob in unit for name in match_modules(glob, names)]
    assert len(units) == len(set(units))
    in_units = {id(p) for name in units for p in model.get_submodule(name).parameters()}
    in_root = [name for name, p in model.named_parameters() if id(p) not in in_units]
    assert in_root == (["tok_embeddings.weight", "norm.weight"] if tie_embeddings else [])
