"""Multi-token prediction and the sequence-wise balance loss, whose losses look beyond one token, give the gradients of one process."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

from models.deepseek_v3.args import DeepSeekV3Args
from tests.distributed.cases import (
    BF16,
    EAGER_COMPILE,
    Case,
    Outcome,
    assert_equal_outcomes,
    list_parameters,
    run_case,
    run_reference,
)
from tests.distributed.harness import run_distributed

# Two depths, so that they must stay together in the last stage; a balance loss that weighs as much as the rest.
ARGS = DeepSeekV3Args(
    dim=24,
    n_layers=4,
    n_dense_layers=1,
    n_heads=2,
    vocab_size=67,
    hidden_dim=26,
    q_lora_rank=0,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_experts=4,
    top_k=2,
    moe_hidden_dim=16,
    n_expert_groups=1,
    n_limited_groups=1,
    balance_loss_alpha=0.5,
    mtp_depth=2,
    mtp_weight=0.6,
    max_seq_len=16,
)
TIMEOUT_SECONDS = 240.0


def context(method: str, **more: Any) -> dict[str, Any]:
    return {"context_parallel_degree": 2, "context_parallel_method": method, **more}


def pipeline(schedule: str, **more: Any) -> dict[str, Any]:
    return {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule, **more}


def case(name: str, parallelism: dict[str, Any], base: DeepSeekV3Args = ARGS, **options: Any) -> Case:
    axes = ("context", "pipeline", "tensor")
    ranks = math.prod(parallelism.get(f"{axis}_parallel_degree", 1) for axis in axes)
    return Case(name, options.pop("world_size", ranks), parallelism, base=base, **options)


SHALLOW = dataclasses.replace(ARGS, mtp_depth=1)
# In bf16 the best experts of a token can be others than in fp32: here all are.
ALL_CHOSEN = dataclasses.replace(ARGS, n_experts=2)
BALANCED = dataclasses.replace(ARGS, n_layers=2, n_dense_layers=0, mtp_depth=0)  # one kind of block to compile
AC_OP = {"mode": "selective", "selective_ac_option": "op"}
TP = {"tensor_parallel_degree": 2}
REPLICATED = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}

# The others run with --all.
DAILY = {
    *("fsdp_accumulation", "cp_allgather_documents_ac_op", "cp_ring_ac_full", "cp_ulysses", "pp_1f1b_accumulation"),
    *("pp_ZBVZeroBubble", "tp", "cp_pp_1f1b", "tp_ep_accumulation"),
}
CASES = [
    case("fsdp", {}, world_size=2),
    case("fsdp_accumulation", {}, world_size=2, microbatches=2),
    case("cp_allgather", context("allgather")),
    case("cp_allgather_documents_ac_op", context("allgather"), documents=True, activation_checkpoint=AC_OP),
    case("cp_ring_ac_full", context("ring"), activation_checkpoint={"mode": "full"}),
    case("cp_ulysses", context("ulysses"), documents=True),
    case("cp_ulysses_compile", context("ulysses"), BALANCED, compile=EAGER_COMPILE, activation_checkpoint=AC_OP),
    case("pp_1f1b", pipeline("1F1B")),
    case("pp_1f1b_accumulation", pipeline("1F1B", fsdp_accumulation="sharded"), microbatches=2, documents=True),
    case("pp_1f1b_ac_op", pipeline("1F1B"), SHALLOW, activation_checkpoint=AC_OP),
    # Four stages, of which the last has both depths: one block each is left for the others.
    *(case(f"pp_{s}", pipeline(s)) for s in ("Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")),
    case("pp_dualpipev_bf16", pipeline("DualPipeV"), ALL_CHOSEN, training=BF16, tolerance=4e-2),
    case("fsdp_pp_zbv", pipeline("ZBVZeroBubble"), world_size=4),
    case("fsdp_pp_1f1b_offload", pipeline("1F1B"), world_size=4, training={"enable_cpu_offload": True}),
    case("ddp_pp_interleaved", pipeline("Interleaved1F1B", **REPLICATED), world_size=4, microbatches=2),
    case("cp_pp_1f1b", pipeline("1F1B", **context("ring"))),
    case("cp_pp_dualpipev", pipeline("DualPipeV", **context("allgather")), documents=True),
    case("tp", TP),
    case("tp_ep_accumulation", {**TP, "expert_parallel_degree": 2}, microbatches=2, documents=True),
    case("tp_pp_1f1b_ac_op", {**TP, **pipeline("1F1B")}, SHALLOW, activation_checkpoint=AC_OP),
    case("pp4_1f1b", {**pipeline("1F1B"), "pipeline_parallel_degree": 4}),
]


@functools.cache
def reference(args: DeepSeekV3Args, documents: bool) -> Outcome:
    return run_reference(Case("reference", documents=documents, base=args))


@pytest.mark.parametrize("case", list_parameters(CASES, exhaustive={case.name for case in CASES} - DAILY))
def test_case_equals_one_process(case: Case) -> None:
    outcomes = run_distributed(run_case, case.world_size, case, timeout=TIMEOUT_SECONDS, reuse=True)
    assert_equal_outcomes(outcomes, reference(case.base, case.documents), case.tolerance)


def test_both_losses_weigh_in_the_gradients() -> None:
    """Else the other tests here would show nothing."""
    whole = reference(ARGS, documents=False)
    for changes, name in (
        ({"balance_loss_alpha": 0.0}, "layers.1.moe.router.gate.weight"),
        ({"balance_loss_alpha": 0.0}, "layers.0.attention.wo.weight"),
        ({"mtp_weight": 0.0}, "tok_embeddings.weight"),
    ):
        without = reference(dataclasses.replace(ARGS, **changes), documents=False)
        difference = (whole.gradients[name] - without.gradients[name]).norm() / whole.gradients[name].norm()
        assert difference > 1e-2, name
    assert set(whole.predictions) == {"mtp/main_loss", "mtp/loss_1", "mtp/loss_2"}
    assert torch.isfinite(torch.tensor(list(whole.predictions.values()))).all()
