"""Routing against a reference that goes token by token, forced balance, the auxiliary loss, and the bias."""

import copy
import math

import pytest
import torch

from models.common.router import Router

DIM, EXPERTS, TOP_K = 16, 12, 3
CASES = {
    "v3": {"n_groups": 4, "n_limited_groups": 2, "scale": 2.5},
    "v3_no_groups": {},
    "v3_no_bias": {"n_groups": 4, "n_limited_groups": 2, "uses_bias": False},
    "v2": {
        "score_func": "softmax",
        "n_groups": 3,
        "n_limited_groups": 2,
        "normalizes": False,
        "uses_bias": False,
        "scale": 16.0,
    },
    "softmax_with_bias": {"score_func": "softmax", "normalizes": False},
}


def build_router(**options: object) -> Router:
    torch.manual_seed(0)
    router = Router(DIM, EXPERTS, TOP_K, **options)
    torch.nn.init.normal_(router.gate.weight, std=0.5)
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.3 if router.score_func == "sigmoid" else 0.05)
    return router


def make_input(batch: int = 3, seq: int = 20) -> torch.Tensor:
    return torch.randn(batch, seq, DIM, generator=torch.Generator().manual_seed(1))


def score_plainly(router: Router, token: torch.Tensor) -> list[float]:
    logits = [sum(a * b for a, b in zip(row, token.tolist(), strict=True)) for row in router.gate.weight.tolist()]
    if router.score_func == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def choose_plainly(router: Router, scores: list[float], bias: list[float]) -> list[int]:
    """Sort, in words of the papers."""
    by = [score + b for score, b in zip(scores, bias, strict=True)]
    size = EXPERTS // router.n_groups
    best = 2 if router.score_func == "sigmoid" else 1
    quality = [sum(sorted(by[g * size : (g + 1) * size])[-best:]) for g in range(router.n_groups)]
    groups = sorted(range(router.n_groups), key=lambda g: -quality[g])[: router.n_limited_groups]
    eligible = [e for e in range(EXPERTS) if e // size in groups or router.n_groups == router.n_limited_groups]
    return sorted(eligible, key=lambda e: -by[e])[:TOP_K]


def get_bias(router: Router) -> list[float]:
    return [0.0] * EXPERTS if router.expert_bias is None else router.expert_bias.tolist()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_forward_equals_token_by_token_reference(options: dict[str, object]) -> None:
    router, x = build_router(**options), make_input()
    routing = router(x)
    assert routing.experts.shape == routing.gates.shape == (60, TOP_K)
    assert routing.gates.dtype == torch.float32
    assert routing.balance_loss is None
    for token, experts, gates in zip(x.flatten(0, 1), routing.experts.tolist(), routing.gates.tolist(), strict=True):
        scores = score_plainly(router, token)
        expected = choose_plainly(router, scores, get_bias(router))
        total = sum(scores[e] for e in expected) if router.normalizes else 1.0
        found = dict(zip(experts, gates, strict=True))
        assert sorted(found) == sorted(expected)
        assert [found[e] for e in expected] == pytest.approx(
            [router.scale * scores[e] / total for e in expected], rel=1e-5
        )


def test_bias_changes_the_choice_but_not_the_gates() -> None:
    router, x = build_router(normalizes=False), make_input()
    router.expert_bias.zero_()
    before = router(x)
    router.expert_bias[4] = 10.0
    after = router(x)
    assert (after.experts == 4).any(dim=1).all()
    assert not (before.experts == 4).any(dim=1).all()
    scores = (x.flatten(0, 1) @ router.gate.weight.t()).sigmoid()
    torch.testing.assert_close(after.gates, scores.gather(1, after.experts))


def test_gradient_of_the_gates_reaches_the_router_and_its_input() -> None:
    router, x = build_router(**CASES["v3"]), make_input().requires_grad_()
    routing = router(x)
    weights = torch.randn_like(routing.gates)
    found = torch.autograd.grad((routing.gates * weights).sum(), (x, router.gate.weight))
    scores = (x.flatten(0, 1) @ router.gate.weight.t()).sigmoid().gather(1, routing.experts)
    gates = 2.5 * scores / scores.sum(dim=1, keepdim=True)
    expected = torch.autograd.grad((gates * weights).sum(), (x, router.gate.weight))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_router_computes_in_fp32_under_bf16() -> None:
    router, x = build_router(**CASES["v3"]), make_input().bfloat16()
    router = router.to(torch.bfloat16)
    assert router.gate.weight.dtype == torch.bfloat16
    exact = copy.deepcopy(router).float()
    for ours, theirs in zip(router(x)[:2], exact(x.float())[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_expert_bias_stays_fp32_and_is_in_the_state_dict() -> None:
    router = build_router()
    bias = router.expert_bias.clone()
    router.to(torch.bfloat16)
    assert torch.equal(router.expert_bias, bias)
    assert router.expert_bias.dtype == torch.float32
    assert set(router.state_dict()) == {"gate.weight", "expert_bias"}
    assert set(build_router(uses_bias=False).state_dict()) == {"gate.weight"}
    with torch.device("meta"):
        fresh = Router(DIM, EXPERTS, TOP_K).to(torch.bfloat16)
    fresh.to_empty(device="cpu")
    fresh.init_buffers("cpu")
    assert torch.equal(fresh.expert_bias, torch.zeros(EXPERTS))


@pytest.mark.parametrize("options", [CASES["v3"], CASES["v2"]], ids=["v3", "v2"])
def test_force_load_balance_deals_evenly(options: dict[str, object]) -> None:
    router, x = build_router(**options), make_input(2, 8)
    router.force_load_balance = True
    routing = router(x)
    assert torch.equal(routing.experts.flatten(), torch.arange(16 * TOP_K) % EXPERTS)
    assert set(routing.experts.flatten().bincount(minlength=EXPERTS).tolist()) == {4}
    scores = torch.tensor([score_plainly(router, token) for token in x.flatten(0, 1)])
    gates = scores.gather(1, routing.experts)
    gates = gates / gates.sum(dim=1, keepdim=True) if router.normalizes else gates
    torch.testing.assert_close(routing.gates, router.scale * gates, rtol=1e-5, atol=1e-6)


def get_balance_loss_plainly(router: Router, x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Equations 17 to 20 of the paper, sequence by sequence and expert by expert, each sequence times its tokens."""
    total = torch.zeros(())
    for sequence in x:
        logits = sequence @ router.gate.weight.t()
        scores = logits.sigmoid() if router.score_func == "sigmoid" else logits.softmax(-1)
        chosen = [choose_plainly(router, row, [0.0] * EXPERTS) for row in scores.tolist()]
        for expert in range(EXPERTS):
            frequency = EXPERTS / (TOP_K * len(sequence)) * sum(expert in experts for experts in chosen)
            share = (scores[:, expert] / scores.sum(dim=1)).mean()
            total = total + alpha * frequency * share * len(sequence)
    return total


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_balance_loss_equals_formula_with_gradients(options: dict[str, object]) -> None:
    router, x = build_router(balance_alpha=0.7, **options), make_input().requires_grad_()
    loss = router(x).balance_loss
    expected = get_balance_loss_plainly(router, x, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = (x, router.gate.weight)
    gradients = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted), rtol=1e-4, atol=1e-6)


def test_balance_loss_of_parts_of_sequences_adds_up() -> None:
    """As ranks of context parallelism have them: each its tokens, and the counts of all."""
    router, x = build_router(balance_alpha=1.0), make_input()
    whole = router(x).balance_loss
    parts = x.split((7, 13), dim=1)
    counts: list[torch.Tensor] = []
    router.sum_over_sequence = lambda own: counts.append(own) or own
    for part in parts:
        router(part)
    router.sum_over_sequence = lambda own: counts[0] + counts[1]
    torch.testing.assert_close(router(parts[0]).balance_loss + router(parts[1]).balance_loss, whole)


def test_balance_loss_is_for_training_only() -> None:
    router = build_router(balance_alpha=1.0)
    assert router(make_input()).balance_loss is not None
    assert router.eval()(make_input()).balance_loss is None


def test_update_expert_bias_moves_towards_balance() -> None:
    router = build_router()
    before = router.expert_bias.clone()
    counts = torch.tensor([5, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3])
    router.update_expert_bias(counts, speed=0.1)
    step = router.expert_bias - before
    torch.testing.assert_close(step[0] - step[2], torch.tensor(-0.1))
    torch.testing.assert_close(step[1] - step[2], torch.tensor(0.1))
    assert step.sum().abs() < 1e-6
    assert step[2:].std() < 1e-6


def test_proportional_update_moves_by_how_far_the_load_is_off() -> None:
    router = build_router(bias_update="proportional")
    before = router.expert_bias.clone()
    counts = torch.tensor([9, 0, 4, 3, 2, 3, 3, 3, 3, 0, 3, 3])  # mean 3
    router.update_expert_bias(counts, speed=0.3)
    step = router.expert_bias - before
    torch.testing.assert_close(step[:5] - step[3], torch.tensor([-0.3, 0.3, -0.1, 0.0, 0.1]))
    assert step.sum().abs() < 1e-6


def test_update_without_a_token_moves_all_alike() -> None:
    router = build_router(bias_update="proportional")
    before = router.expert_bias.clone()
    router.update_expert_bias(torch.zeros(EXPERTS, dtype=torch.int64), speed=0.3)
    torch.testing.assert_close(router.expert_bias, before)


def test_updates_balance_a_skewed_router() -> None:
    router, x = build_router(), make_input(8, 64)
    router.gate.weight.data[0] += 1.0 * x.mean(dim=(0, 1)).sign()
    router.expert_bias.zero_()

    def get_counts() -> torch.Tensor:
        return router(x).experts.flatten().bincount(minlength=EXPERTS)

    def get_excess() -> float:
        counts = get_counts().float()
        return (counts.max() / counts.mean()).item()

    before = get_excess()
    for _ in range(200):
        router.update_expert_bias(get_counts(), speed=2e-3)
    assert before > 1.4
    assert get_excess() < 1.1


def test_update_without_bias_does_nothing() -> None:
    router = build_router(uses_bias=False)
    router.update_expert_bias(torch.arange(EXPERTS), speed=0.1)
    assert router.expert_bias is None
