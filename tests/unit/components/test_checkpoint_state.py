"""What goes into a checkpoint: names, random number generators, plain values."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from trainer.components.checkpoint_state import ModelState, RngState, is_plain, merge_plain, select_plain


def test_model_names_are_clean_and_tied_weights_stored_once():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "block": nn.Linear(3, 3), "output": nn.Linear(3, 5, bias=False)}
    )
    model["output"].weight = model["embed"].weight
    model["block"] = torch.compile(model["block"], backend="eager")
    state = ModelState(model)
    assert list(state.state_dict()) == ["embed.weight", "block.weight", "block.bias"]
    state.load_state_dict({name: torch.full_like(value, 2.0) for name, value in state.state_dict().items()})
    assert all(bool((parameter == 2).all()) for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"missing \['block\.bias'"):
        state.load_state_dict({"embed.weight": torch.zeros(5, 3)})


def test_rng_state_repeats_every_generator():
    random.gauss(0, 1)  # leaves a second value behind, part of the state
    np.random.standard_normal()
    rng = RngState(rank=3)
    saved = rng.state_dict()

    def draw():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(3).tolist(),
        )

    first = draw()
    assert draw() != first
    rng.load_state_dict(saved)
    assert draw() == first


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": [1, None, "x", 0.1]}, True),
        ({1: 2}, False),
        ({"t": (1,)}, False),
        ({"t": torch.ones(1)}, False),
        ({}, True),
    ],
)
def test_is_plain(value, plain):
    assert is_plain(value) is plain


def test_plain_values_that_differ_by_rank_need_the_same_number_of_ranks():
    merged = merge_plain([{"dataloader": {"shard": r}, "train_state": {"step": 1}} for r in range(2)])
    assert select_plain(merged["train_state"], "train_state", rank=3, world_size=4) == {"step": 1}
    assert select_plain(merged["dataloader"], "dataloader", rank=1, world_size=2) == {"shard": 1}
    with pytest.raises(ValueError, match="dataloader was saved by 2 processes"):
        select_plain(merged["dataloader"], "dataloader", rank=0, world_size=4)
