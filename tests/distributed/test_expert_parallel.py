"""Expert parallelism alone: losses, gradients, weights and routers' biases are those of one process that computes its experts in a loop."""

import dataclasses
import functools
import sys
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from models.common.moe import MoE
from models.common.router import Router
from models.plan import ParallelPlan
from tests.distributed import fake_deep_ep
from tests.distributed.cases import (
    EAGER_COMPILE,
    EXPERT_ARGS,
    HSDP,
    Case,
    Outcome,
    assert_equal_outcomes,
    list_parameters,
    run_case,
    run_reference,
)
from tests.distributed.harness import run_distributed
from tests.distributed.loop_experts import use_loops
from tests.unit.distributed.test_activation_checkpoint import _CountOps
from trainer.config.schema_parallel import ActivationCheckpointConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.expert_dispatch import COPY_TO_HOST
from trainer.distributed.expert_parallel import apply_expert_parallel
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.turns import Turns

EP2, EP4 = {"expert_parallel_degree": 2}, {"expert_parallel_degree": 4}
TP2 = {"tensor_parallel_degree": 2}
DDP = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}
FEW_EXPERTS = dataclasses.replace(
    EXPERT_ARGS, n_experts=2, top_k=1, n_expert_groups=1, n_limited_groups=1, normalizes_gates=False
)

CASES = [
    Case("one_process", base=EXPERT_ARGS),
    # One expert on each rank of ep, for two to share: FSDP cuts its rows.
    Case("ep2_fsdp2_few_experts", 4, EP2, base=FEW_EXPERTS),
    Case("tp2_ddp2", 4, {**DDP, **TP2, **EP2}, base=EXPERT_ARGS),
    Case("tp2_ddp2_ep1", 4, {**DDP, **TP2}, base=EXPERT_ARGS),
    Case("tp2_plain_queries", 2, TP2, base=dataclasses.replace(EXPERT_ARGS, q_lora_rank=0)),
    Case("ep2_offload", 2, EP2, training={"enable_cpu_offload": True}, base=EXPERT_ARGS),
    Case("ep4_all_ranks", 4, EP4, base=EXPERT_ARGS),
    Case(
        "ep2_fsdp2_prefetch",
        4,
        {**EP2, "fsdp_prefetch": 2},
        activation_checkpoint={"mode": "full"},
        base=EXPERT_ARGS,
    ),
    Case("ep2_hsdp", 4, {**EP2, **HSDP}, base=EXPERT_ARGS),
    Case("ep2_fsdp2_hsdp", 8, {**EP2, "data_parallel_replicate_degree": 2}, base=EXPERT_ARGS),
    *(
        Case(f"ep2_accumulate_{mode}", 4, {**EP2, "fsdp_accumulation": mode}, microbatches=2, base=EXPERT_ARGS)
        for mode in ("sharded", "unsharded")
    ),
]


@functools.cache
def _reference(base: Any) -> Outcome:
    return run_reference(Case("reference", base=base))


@pytest.mark.parametrize(
    "case",
    list_parameters(
        CASES,
        exhaustive=(
            "ep2_fsdp2_hsdp",
            "ep2_hsdp",
            "tp2_ddp2_ep1",
            "tp2_plain_queries",
            "ep2_accumulate_unsharded",
            "ep2_accumulate_sharded",
            "ep2_offload",
        ),
    ),
)
def test_equals_one_process_with_a_loop_over_experts(case: Case) -> None:
    outcomes = run_distributed(run_case, case.world_size, case, reuse=True)
    assert_equal_outcomes(outcomes, _reference(case.base), case.tolerance)


# --- two passes at once ---

DUAL = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "DualPipeV", **EP2}


def _run_counting_turns(case: Case) -> tuple[Outcome, int]:
    """Return the outcome, and how many of two passes at once let the other go on: that is 0, 1 or 2."""
    switches = set()
    pass_on = Turns.pass_on

    def counting(turns: Turns) -> None:
        if len(turns._running) == 2:
            switches.add(threading.get_ident() == turns._first_thread)
        pass_on(turns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Turns, "pass_on", counting)
        outcome = run_case(case)
    return outcome, len(switches)


@pytest.mark.exhaustive
@pytest.mark.parametrize("recomputes", [False, True])
def test_passes_of_dualpipev_take_turns_and_change_nothing(recomputes: bool) -> None:
    section = {"mode": "full"} if recomputes else {}
    case = Case("dualpipev", 4, DUAL, activation_checkpoint=section, base=EXPERT_ARGS)
    outcomes, switches = zip(*run_distributed(_run_counting_turns, 4, case, reuse=True), strict=True)
    assert switches == (1, 1, 2, 2), "the first stage, which the first two ranks have, is a dense block"
    assert_equal_outcomes(list(outcomes), _reference(EXPERT_ARGS), case.tolerance)
    off = dataclasses.replace(case, parallelism={**DUAL, "pipeline_parallel_expert_parallel_overlap": False})
    outcomes, switches = zip(*run_distributed(_run_counting_turns, 4, off, reuse=True), strict=True)
    assert switches == (0, 0, 0, 0)
    assert_equal_outcomes(list(outcomes), _reference(EXPERT_ARGS), case.tolerance)


# --- where the tokens go ---

TOKENS, DIM, N_EXPERTS = 12, 16, 8
ROUTES = {
    "as_they_like": [0.0] * 8,
    "an_expert_without_tokens": [0.0] * 5 + [-9.0, 0.0, 0.0],
    "one_rank_has_all": [9.0, 9.0] + [0.0] * 6,
    "one_expert_has_half_of_all": [0.0] * 7 + [9.0],
}


def _run_mixtures(backend: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the largest differences from a loop over the experts, of all ranks, by route and by what differs."""
    sys.modules["deep_ep"] = fake_deep_ep
    dims = ParallelDims(world_size=4, dp_shard=4, ep=4)
    dims.build_mesh("cpu")
    dims.build_expert_mesh()
    return {name: _compare_mixtures(dims, torch.tensor(bias), backend) for name, bias in ROUTES.items()}


def _compare_mixtures(dims: ParallelDims, bias: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    # Ranks need not have equally many tokens, but for the stand-in.
    x = torch.randn(
        1, TOKENS + (rank if backend == "standard" else 0), DIM, generator=torch.Generator().manual_seed(rank)
    )
    grad = torch.randn_like(x)
    outcomes = []
    for spreads in (False, True):
        torch.manual_seed(7)
        model = nn.ModuleDict({"moe": MoE(DIM, 16, router=Router(DIM, N_EXPERTS, 2))})
        mixture = model["moe"]
        assert isinstance(mixture, MoE)
        mixture.router.expert_bias = bias
        if spreads:
            plan = ParallelPlan(fsdp_units=(), blocks="moe", experts="moe")
            apply_expert_parallel(model, plan=plan, dims=dims, backend=backend)
        else:
            use_loops(model)
        inputs = x.clone().requires_grad_()
        out, load = mixture(inputs)
        out.backward(grad)
        assert inputs.grad is not None
        outcome = {"out": out, "x": inputs.grad, "router": mixture.router.gate.weight.grad, "load": load.tokens}
        for name, weight in mixture.experts.named_parameters():
            if spreads:
                outcome[name] = weight.grad.full_tensor()
            else:
                dist.all_reduce(weight.grad)
                outcome[name] = weight.grad
        outcomes.append(outcome)
    expected, actual = outcomes
    return {name: (actual[name] - expected[name]).abs().max() for name in expected}


@pytest.mark.parametrize("backend", ["standard", "deepep"])
def test_rows_come_back_wherever_they_went(backend: str) -> None:
    for by_route in run_distributed(_run_mixtures, 4, backend):
        for route, differences in by_route.items():
            assert all(difference < 1e-6 for difference in differences.values()), (route, differences)


def _run_with_stand_in(case: Case) -> Outcome:
    sys.modules["deep_ep"] = fake_deep_ep
    return run_case(case)


def test_deepep_under_recomputation_and_accumulation_equals_one_process() -> None:
    deepep = {**EP2, "expert_parallel_comm_backend": "deepep"}
    case = Case("deepep", 2, deepep, activation_checkpoint={"mode": "full"}, microbatches=2, base=EXPERT_ARGS)
    assert_equal_outcomes(run_distributed(_run_with_stand_in, 2, case), _reference(EXPERT_ARGS), case.tolerance)


# --- recomputed ---


EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default


def _count_in_recomputation() -> list[tuple[int, int]]:
    """Copies to the host, and exchanges, in a mixture's forward pass and in its backward pass, which recomputes it."""
    dims = ParallelDims(world_size=2, dp_shard=2, ep=2)
    dims.build_mesh("cpu")
    dims.build_expert_mesh()
    model = nn.ModuleDict({"moe": MoE(DIM, 16, router=Router(DIM, N_EXPERTS, 2))})
    plan = ParallelPlan(fsdp_units=(), blocks="moe", experts="moe")
    apply_expert_parallel(model, plan=plan, dims=dims, backend="standard")
    apply_activation_checkpoint(model, plan=plan, section=ActivationCheckpointConfig(mode="full"))
    with _CountOps() as forward:
        out, _ = model["moe"](torch.randn(1, TOKENS, DIM, requires_grad=True))
    with _CountOps() as backward:
        out.sum().backward()
    return [(ops.counts[COPY_TO_HOST], ops.counts[EXCHANGE]) for ops in (forward, backward)]


def test_recomputation_has_the_numbers_of_rows_and_waits_for_none() -> None:
    # Counts, rows, gates, results; then these but the counts again, and their gradients.
    assert run_distributed(_count_in_recomputation, 2, reuse=True) == [[(1, 4), (0, 3 + 3)]] * 2


# --- compiled ---


def _count_graphs() -> tuple[Outcome, int]:
    from torch._dynamo.utils import counters

    counters.clear()
    case = Case("", 2, EP2, compile=EAGER_COMPILE, chunk_size=8, base=EXPERT_ARGS)
    return run_case(case), counters["stats"]["unique_graphs"]


def test_experts_have_one_graph_for_any_number_of_rows() -> None:
    """In three blocks and three steps ranks get 9 numbers of rows."""
    for _, n_graphs in run_distributed(_count_graphs, 2, timeout=240.0):
        # The dense block; of a block with experts what comes before, routing, the shared experts, the experts; the loss.
        assert n_graphs <= 6
