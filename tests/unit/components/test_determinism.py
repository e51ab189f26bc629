"""determinism.py."""

import os
import random

import numpy as np
import pytest
import torch

from trainer.components.determinism import set_determinism
from trainer.config.schema import DebugConfig


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    """Leave generators, kernels and the environment as they were."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def draw(seed, rank, **debug):
    set_determinism(debug=DebugConfig(**debug), seed=seed, rank=rank)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_same_seed_and_rank_give_the_same_numbers():
    assert draw(5, 1) == draw(5, 1)


@pytest.mark.parametrize("other", [(5, 1), (6, 0)])
def test_other_rank_or_seed_gives_other_numbers_of_each_generator(other):
    assert all(a != b for a, b in zip(draw(5, 0), draw(*other), strict=True))


def test_seed_beyond_numpys_range_is_taken():
    assert draw(2**32 + 5, 0) == draw(2**32 + 5, 0)


@pytest.mark.parametrize(
    ("debug", "deterministic", "warn_only"),
    [
        ({}, False, False),
        ({"deterministic_warn_only": True}, False, False),  # has no effect alone
        ({"deterministic": True}, True, False),
        ({"deterministic": True, "deterministic_warn_only": True}, True, True),
    ],
)
def test_deterministic_kernels_only_if_asked(debug, deterministic, warn_only):
    draw(1, 0, **debug)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    if deterministic:
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark


def test_deterministic_refuses_what_has_no_deterministic_kernel():
    draw(1, 0, deterministic=True)
    target, index = torch.zeros(4), torch.tensor([0, 0])
    with pytest.raises(RuntimeError, match="deterministic"):
        target.put_(index, torch.ones(2), accumulate=False)


def test_workspace_that_the_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    draw(1, 0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
