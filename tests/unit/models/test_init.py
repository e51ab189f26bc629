"""Distributions of fresh parameters."""

import pytest
import torch

from models.common.init import Init


def draw(init: Init, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return init.fill_(torch.empty(200, 500, dtype=dtype), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "value"), [("ones", 1.0), ("zeros", 0.0)])
def test_fill_constant(kind: str, value: float) -> None:
    assert torch.equal(draw(Init(kind)), torch.full((200, 500), value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [Init("normal", std=0.5), Init("trunc_normal", std=0.5, cut=2.0)])
def test_fill_has_the_moments_and_the_tails(init: Init, dtype: torch.dtype) -> None:
    x = draw(init, dtype).double()
    # Of a normal cut at 2 sigma the standard deviation is 0.8796 sigma.
    std = 0.5 if init.kind == "normal" else 0.5 * 0.8796
    assert x.mean().abs() < 0.01
    assert x.std().item() == pytest.approx(std, rel=0.01)
    beyond = (x.abs() > 2 * 0.5).double().mean().item()
    assert beyond == (pytest.approx(0.0455, abs=0.004) if init.kind == "normal" else 0.0)
    quarter = x.quantile(0.25).item() if x.numel() < 2**24 else None
    assert quarter == pytest.approx(-0.3372 if init.kind == "normal" else -0.3201, abs=0.01)


@pytest.mark.parametrize("kind", ["normal", "trunc_normal"])
def test_fill_depends_on_the_generator_alone(kind: str) -> None:
    init = Init(kind, std=1.0)
    torch.manual_seed(1)
    first = draw(init)
    torch.manual_seed(2)
    assert torch.equal(first, draw(init))
    assert not torch.equal(first, draw(init, seed=1))


def test_fill_bf16_rounds_the_fp32_values() -> None:
    init = Init("trunc_normal", std=0.02)
    assert torch.equal(draw(init, torch.bfloat16), draw(init).bfloat16())


def test_fill_strided_view_leaves_the_rest() -> None:
    whole = torch.zeros(6, 4)
    Init("normal", std=1.0).fill_(whole[:, 1:3], torch.Generator().manual_seed(0))
    assert (whole[:, 1:3] != 0).all()
    assert (whole[:, [0, 3]] == 0).all()


@pytest.mark.parametrize(
    "arguments", [{"kind": "normal"}, {"kind": "trunc_normal", "std": 1.0, "cut": 0.0}, {"kind": "uniform", "std": 1.0}]
)
def test_init_refuses_what_cannot_be_drawn(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs std > 0|must be normal"):
        Init(**arguments)
