"""Experts in float8 against a loop over them, with groups of any size, compiled, recomputed, measured, and refused."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from models.common.grouped_mm import grouped_mm
from models.common.moe import GroupedExperts, MoE
from models.common.router import Router
from models.common.token_dispatch import Rows
from trainer.config.schema_quantize import Float8GroupedMMConfig
from trainer.low_precision.float8_experts import (
    GroupedProduct,
    apply_float8_experts,
    build_expert_recipe,
    check_expert_device,
    list_products,
    plan_float8_experts,
)
from trainer.low_precision.measurement import Measurement

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
    out = GroupedProduct(build_expert_recipe(SECTION))(rows, weights, ends)
    out.backward(grad)
    for begin, end, weight, its_grad in zip([0, *ends], ends, weights.detach(), weights.grad, strict=False):
        x, g = rows.detach()[begin:end], grad[begin:end]
        torch.testing.assert_close(out[begin:end], round_rows(x) @ round_rows(weight).t())
        torch.testing.assert_close(rows.grad[begin:end], round_rows(g) @ round_rows(weight.t()).t())
        torch.testing.assert_close(its_grad, g.t() @ x, rtol=1e-4, atol=1e-4)


def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_its_row_alone() -> None:
    rows, weights = torch.randn(6, DIM), torch.randn(2, HIDDEN, DIM)
    rows[1], rows[4, 3], weights[1] = 0.0, float("inf"), 0.0
    rows.requires_grad_()
    out = GroupedProduct(build_expert_recipe(SECTION))(rows, weights, torch.tensor([3, 6], dtype=torch.int32))
    out[[0, 1, 2, 3, 5]].sum().backward()
    assert out[[1, 3, 5]].count_nonzero() == 0
    assert out.isfinite().all(dim=1).tolist() == [True, True, True, True, False, True]
    assert rows.grad.isfinite().all()


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


def make_measured() -> tuple[GroupedExperts, Measurement]:
    torch.manual_seed(0)
    experts = torch.nn.ModuleDict({"experts": GroupedExperts(DIM, HIDDEN, EXPERTS)}).bfloat16()
    apply_float8_experts(experts, section=Float8GroupedMMConfig(fqns=["experts"], emulate=True, measure_freq=2))
    return experts["experts"], Measurement(list_products(experts), freq=2)


def make_rows() -> Rows:
    """Of 40 rows the last 4 are nobody's, and the first have each a value too small for a scale that fits the row's largest."""
    tokens = torch.rand(40, DIM, generator=torch.Generator().manual_seed(1)).add(1).bfloat16()
    tokens[:9, 3] = 1e-6
    tokens[36:] = float("nan")
    return Rows(tokens, torch.ones(40), torch.tensor([5, 5, 20, 36], dtype=torch.int32))


def take_measured_step(experts: GroupedExperts, measurement: Measurement, step: int, **options) -> dict[str, float]:
    rows, forward = make_rows(), options.get("forward", experts)
    rows.tokens.requires_grad_()
    measurement.begin_step(step)
    for _ in range(2):  # microbatches
        out = checkpoint(forward, rows, use_reentrant=False) if options.get("recomputes") else forward(rows)
        grad = torch.full_like(out, 0.5)
        grad[36:] = float("nan")
        out.backward(grad)
    return {name: value.item() for name, value in measurement.collect().items()}


def test_each_weight_of_experts_is_measured_but_not_rows_that_are_nobodys() -> None:
    experts, measurement = make_measured()
    assert take_measured_step(experts, measurement, 1) == {}
    metrics = take_measured_step(experts, measurement, 2)
    for name in ("w1", "w2", "w3"):
        for kind in ("input", "weight", "grad_output"):
            amax, scale = (metrics[f"float8/experts.{name}/{kind}/{part}"] for part in ("amax", "scale"))
            assert scale == 2.0 ** math.floor(math.log2(448 / amax)), "neither zero nor NaN"
            assert metrics[f"float8/experts.{name}/{kind}/saturated"] == 0.0
        assert metrics[f"float8/experts.{name}/weight/amax"] == getattr(experts, name).abs().max()
    assert metrics["float8/experts.w2/grad_output/amax"] == 0.5
    for name in ("w1", "w3"):
        assert metrics[f"float8/experts.{name}/input/amax"] == make_rows().tokens[:36].abs().max()
        assert metrics[f"float8/experts.{name}/input/underflowed"] == pytest.approx(9 / (36 * DIM))
    assert metrics["float8/underflowed_max"] == max(metrics[name] for name in metrics if name.endswith("/underflowed"))
    experts.eval()
    measurement.begin_step(4)
    experts(make_rows())
    assert measurement.collect().keys() == {"float8/saturated_max", "float8/underflowed_max"}, "validation is no step"


def test_measuring_experts_changes_no_gradient_nor_does_recomputation_what_is_measured() -> None:
    (plain, _), (measured, measurement), (recomputed, again) = (make_measured() for _ in range(3))
    for step in (2, 3):
        for _ in range(2):
            out = plain(make_rows())
            out.backward(torch.where(out.isnan(), out, 0.5))
        metrics = take_measured_step(measured, measurement, step)
        assert take_measured_step(recomputed, again, step, recomputes=True) == metrics
    for ours, expected in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_experts_are_compiled_once_for_steps_that_are_measured_and_once_for_others() -> None:
    (eager, measurement), (experts, again) = make_measured(), make_measured()
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(experts.forward, backend=counter, fullgraph=True)
    for step in range(1, 5):
        expected = take_measured_step(eager, measurement, step)
        assert take_measured_step(experts, again, step, forward=forward) == pytest.approx(expected, rel=1e-2)
    assert counter.frame_count == 2


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
    assert list_products(mixtures).keys() == {"1.experts.w1", "1.experts.w2", "1.experts.w3"}
    assert mixtures[0].experts.product_w1 is grouped_mm
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
