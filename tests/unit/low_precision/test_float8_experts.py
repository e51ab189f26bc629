"""Experts in float8 against a loop over them, with groups of any size, compiled, recomputed, and refused."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.common.moe import MoE
from models.common.router import Router
from trainer.config.schema_quantize import Float8GroupedMMConfig
from trainer.low_precision.float8_experts import (
    apply_float8_experts,
    check_expert_device,
    emulate_groups,
    plan_float8_experts,
)

DIM, HIDDEN, EXPERTS = 32, 48, 4
SECTION = Float8GroupedMMConfig(fqns=["experts"], emulate=True)


def round_rows(x: Tensor) -> Tensor:
    """Each row, rounded as it is in float8 with the largest power of two for a scale that it has room for."""
    scale = 2.0 ** torch.floor(torch.log2(448.0 / x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)))
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def test_each_group_is_multiplied_as_one_matrix_is() -> None:
    torch.manual_seed(0)
    sizes = [5, 0, 17, 10]
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    rows = torch.randn(40, DIM) * torch.logspace(-3, 3, 40)[:, None]
    rows[32:] = float("nan")  # nobody's
    weights = (torch.randn(4, HIDDEN, DIM) * 0.1).requires_grad_()
    grad = torch.randn(40, HIDDEN)
    grad[32:] = float("nan")
    rows.requires_grad_()
    out = emulate_groups(rows, weights, ends)
    out.backward(grad)
    for begin, end, weight, its_grad in zip([0, *ends], ends, weights.detach(), weights.grad, strict=False):
        x, g = rows.detach()[begin:end], grad[begin:end]
        torch.testing.assert_close(out[begin:end], round_rows(x) @ round_rows(weight).t())
        torch.testing.assert_close(rows.grad[begin:end], round_rows(g) @ round_rows(weight.t()).t())
        torch.testing.assert_close(its_grad, g.t() @ x, rtol=1e-4, atol=1e-4)


def run(*, float8: bool = True, recomputes: bool = False, compiles: bool = False) -> list[Tensor]:
    """Output and gradients of a mixture."""
    torch.manual_seed(0)
    moe = MoE(DIM, HIDDEN, router=Router(DIM, EXPERTS, 2), n_shared_experts=0).bfloat16()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if float8:
        (line,) = apply_float8_experts(moe, section=SECTION)
        assert line == "1 x 4 experts (32 -> 48 -> 32): converted"
    x = torch.randn(2, 16, DIM).bfloat16().requires_grad_()
    forward = torch.compile(moe, fullgraph=True, backend="aot_eager") if compiles else moe
    y = checkpoint(lambda x: forward(x)[0], x, use_reentrant=False) if recomputes else forward(x)[0]
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]


def test_mixture_is_near_bf16_however_it_is_run() -> None:
    exact, plain = run(float8=False), run()
    for actual, expected in zip(plain, exact, strict=True):
        error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
        assert 0 < error < 0.12
    for other in (run(recomputes=True), run(compiles=True)):
        for actual, expected in zip(other, plain, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("fqns", "expected"),
    [
        ([], "names nothing: set it to"),
        (["layers.7"], "'layers.7' is part of no name of experts. Names are like experts"),
        (["experts"], "32 -> 24 on a rank, not multiples of 16"),
    ],
)
def test_what_cannot_be_converted_is_refused(fqns: list[str], expected: str) -> None:
    moe = MoE(DIM, HIDDEN, router=Router(DIM, EXPERTS, 2))
    with pytest.raises(ValueError, match=expected):
        plan_float8_experts(moe, section=Float8GroupedMMConfig(fqns=fqns), degree=2)


def test_experts_that_are_not_named_stay() -> None:
    mixtures = torch.nn.ModuleList(MoE(DIM, HIDDEN, router=Router(DIM, EXPERTS, 2)) for _ in range(3))
    lines = apply_float8_experts(mixtures, section=Float8GroupedMMConfig(fqns=["1.experts"], emulate=True))
    assert [mixture.experts.product is emulate_groups for mixture in mixtures] == [False, True, False]
    assert lines == [
        "2 x 4 experts (32 -> 48 -> 32): stay in high precision: fqns does not name them",
        "1 x 4 experts (32 -> 48 -> 32): converted",
    ]


def test_device_without_the_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"this is the CPU\. Set quantize\.grouped_mm\.float8\.emulate = true"):
        check_expert_device(Float8GroupedMMConfig(fqns=["experts"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "B200")
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if capability == (9, 0):
            check_expert_device(Float8GroupedMMConfig())
        else:
            with pytest.raises(ValueError, match=r"B200 \(10\.0\)"):
                check_expert_device(Float8GroupedMMConfig())
