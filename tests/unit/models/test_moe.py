"""The mixture against a loop over experts, its counts, empty experts, bf16, and compilation."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.common.moe import GroupedExperts, MoE
from models.common.router import Router
from models.common.token_dispatch import Rows, TokenDispatcher, sort_by_expert

DIM, HIDDEN, EXPERTS, TOP_K = 16, 24, 6, 2


def build_moe(*, n_shared_experts: int = 2, balance_alpha: float = 0.0) -> MoE:
    torch.manual_seed(0)
    router = Router(DIM, EXPERTS, TOP_K, scale=2.0, balance_alpha=balance_alpha)
    moe = MoE(DIM, HIDDEN, router=router, n_shared_experts=n_shared_experts)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return moe


def make_input(batch: int = 2, seq: int = 17) -> torch.Tensor:
    return torch.randn(batch, seq, DIM, generator=torch.Generator().manual_seed(1))


def run_experts_in_a_loop(experts: GroupedExperts, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """All results before any gate. x: (T, D); chosen: (T, K) -> (T, K, D)"""
    return torch.stack(
        [
            torch.stack(
                [experts.w2[e] @ (F.silu(experts.w1[e] @ token) * (experts.w3[e] @ token)) for e in row.tolist()]
            )
            for token, row in zip(x, chosen, strict=True)
        ]
    )


def run_in_a_loop(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert, each output times its gate."""
    tokens, routing = x.flatten(0, 1), moe.router(x)
    out = (run_experts_in_a_loop(moe.experts, tokens, routing.experts) * routing.gates.unsqueeze(-1)).sum(dim=1)
    return out.view_as(x) + (0 if moe.shared_experts is None else moe.shared_experts(x))


def assert_same_with_gradients(
    moe: MoE, x: torch.Tensor, first: Callable[..., torch.Tensor], second: Callable[..., torch.Tensor]
) -> None:
    outs = [run(x) for run in (first, second)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    wanted = {"x": x, **dict(moe.named_parameters())}
    gradients = [torch.autograd.grad((out * weights).sum(), list(wanted.values())) for out in outs]
    for name, ours, theirs in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("n_shared_experts", [0, 1, 2])
def test_forward_equals_loop_with_all_gradients(n_shared_experts: int) -> None:
    moe, x = build_moe(n_shared_experts=n_shared_experts), make_input().requires_grad_()
    assert_same_with_gradients(moe, x, lambda x: moe(x)[0], lambda x: run_in_a_loop(moe, x))


@pytest.mark.parametrize("favourite", [(0, 1), (4, 5), (1, 4)])
def test_experts_without_tokens_equal_loop_and_get_zero_gradients(favourite: tuple[int, int]) -> None:
    moe, x = build_moe(), make_input().requires_grad_()
    moe.router.expert_bias[list(favourite)] = 100.0
    assert_same_with_gradients(moe, x, lambda x: moe(x)[0], lambda x: run_in_a_loop(moe, x))
    out, load = moe(x)
    assert [e for e, count in enumerate(load.tokens.tolist()) if count] == list(favourite)
    out.square().sum().backward()
    idle = [e for e in range(EXPERTS) if e not in favourite]
    for weight in (moe.experts.w1, moe.experts.w2, moe.experts.w3):
        assert (weight.grad[idle] == 0).all()
        assert (weight.grad[list(favourite)] != 0).any(dim=(1, 2)).all()


def test_counts_are_the_routers_and_change_nothing_here() -> None:
    moe, x = build_moe(), make_input()
    _, load = moe(x)
    assert torch.equal(load.tokens.long(), moe.router(x).experts.flatten().bincount(minlength=EXPERTS))
    assert load.tokens.sum() == 2 * 17 * TOP_K
    assert moe.tokens_per_expert.tolist() == [0] * EXPERTS
    assert moe.tokens_per_expert.dtype == torch.int64
    assert "tokens_per_expert" not in moe.state_dict()


def test_balance_loss_comes_from_the_router() -> None:
    moe, x = build_moe(balance_alpha=0.1), make_input()
    assert torch.equal(moe(x)[1].balance_loss, moe.router(x).balance_loss)
    assert build_moe()(x)[1].balance_loss is None


def test_force_load_balance_balances() -> None:
    moe = build_moe()
    moe.router.force_load_balance = True
    assert moe(make_input(3, 8))[1].tokens.tolist() == [8] * EXPERTS


def test_bf16_is_near_fp32() -> None:
    moe, x = build_moe(), make_input(4, 32).bfloat16()
    low = copy.deepcopy(moe).bfloat16()
    exact = copy.deepcopy(low).float()
    x_low, x_exact = x.clone().requires_grad_(), x.float().requires_grad_()
    out, expected = low(x_low)[0], exact(x_exact)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    expected.square().sum().backward()
    pairs = [(out, expected), (x_low.grad, x_exact.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(low.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert (ours.float() - theirs).norm() < 2e-2 * theirs.norm()


def test_sort_by_expert_is_a_stable_permutation() -> None:
    experts = torch.tensor([[3, 0], [0, 3], [5, 3]])
    order = sort_by_expert(experts, 6)
    assert order.slots.tolist() == [1, 2, 0, 3, 5, 4]
    assert order.counts.tolist() == [2, 0, 0, 3, 0, 1]
    assert order.ends.tolist() == [2, 2, 2, 5, 5, 6]
    assert order.ends.dtype == torch.int32
    assert torch.equal(order.places.flatten()[order.slots], torch.arange(6))
    last = sort_by_expert(torch.tensor([[299], [255], [256]]), 300)
    assert last.slots.tolist() == [1, 2, 0]
    assert last.counts.nonzero().flatten().tolist() == [255, 256, 299]


def test_dispatcher_passes_gradcheck_there_and_back() -> None:
    torch.manual_seed(0)
    order = sort_by_expert(torch.tensor([[3, 0], [0, 3], [2, 3]]), 4)
    dispatcher = TokenDispatcher()

    def go(tokens: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        sent = dispatcher.send(tokens, gates, order)
        rows = dispatcher.receive(sent)
        return dispatcher.combine(rows.tokens.sin() * rows.gates.unsqueeze(-1), sent)

    tokens = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(go(tokens, gates), tokens.sin() * gates.sum(dim=1, keepdim=True))
    assert torch.autograd.gradcheck(go, (tokens, gates))


def test_combine_adds_up_in_fp32() -> None:
    order = sort_by_expert(torch.arange(8).view(1, 8), 8)
    rows = torch.tensor([256.0] + [1.0] * 7, dtype=torch.bfloat16).unsqueeze(1)
    sent = TokenDispatcher().send(torch.zeros(1, 1), torch.ones(1, 8), order)
    # bf16 has no 257: one after the other the ones would vanish.
    assert TokenDispatcher().combine(rows, sent).item() == 264.0


def test_rows_beyond_the_last_are_left_alone() -> None:
    """A dispatcher may hand out a buffer that is longer than what arrived."""
    moe = build_moe()
    tokens, gates = torch.randn(10, DIM), torch.rand(10)
    ends = torch.tensor([2, 2, 5, 6, 6, 7], dtype=torch.int32)
    padded = Rows(tokens.clone().requires_grad_(), gates.clone().requires_grad_(), ends)
    exact = Rows(tokens[:7].clone().requires_grad_(), gates[:7].clone().requires_grad_(), ends)
    weights = torch.randn(7, DIM)
    wanted = list(moe.experts.parameters())
    found = []
    for rows in (padded, exact):
        out = moe.experts(rows)[:7]
        gradients = torch.autograd.grad((out * weights).sum(), (rows.tokens, rows.gates, *wanted))
        found.append([out, *(g[:7] for g in gradients[:2]), *gradients[2:]])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputes", [False, True])
def test_moe_compiles_in_one_graph(recomputes: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    eager, x = build_moe(balance_alpha=0.1).to(dtype), make_input().to(dtype)
    compiled = copy.deepcopy(eager)
    forward = compiled.forward

    def recomputed(x: torch.Tensor) -> object:
        return checkpoint(forward, x, use_reentrant=False)

    run = torch.compile(recomputed if recomputes else forward, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        (out, load), (expected, expected_load) = run(x), eager(x)
        torch.testing.assert_close(out, expected)
        assert torch.equal(load.tokens, expected_load.tokens)
        (out.square().sum() + load.balance_loss).backward()
        (expected.square().sum() + expected_load.balance_loss).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < tolerance * theirs.grad.norm(), name
