"""Float8 spread over processes: near to bf16 whatever it is combined with, and the same where nothing but the way differs."""

import collections
import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.llama3.args import LlamaArgs
from tests.distributed.cases import BF16, EAGER_COMPILE, EXPERT_ARGS, Case, Outcome, run_case, run_reference
from tests.distributed.harness import run_distributed
from trainer.low_precision.float8_training import Float8Training, build_float8_training

# On two ranks of tensor parallelism, too, each dim is a multiple of 16.
ARGS = LlamaArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=96, max_seq_len=16)
DEEP = dataclasses.replace(ARGS, n_layers=4)
# Products in float8 that are not emulated take the CPU long.
SHALLOW = dataclasses.replace(ARGS, n_layers=1)
# Largest relative errors against one process in fp32: of losses, and in the 2-norm of gradients. Rounding to 3 bits of mantissa
# (2 in gradients by tensor) in each layer; bf16 alone makes 0.01 to 0.02.
TOLERANCES = {"tensorwise": (1e-3, 0.16), "rowwise": (1e-3, 0.12), "rowwise_with_gw_hp": (1e-3, 0.11)}

EMULATED = {"emulate": True}
GATHER = {**EMULATED, "enable_fsdp_float8_all_gather": True}
PRECOMPUTE = {**GATHER, "precompute_float8_dynamic_scale_for_fsdp": True}
DELAYED = {"recipe_name": "delayed", "delayed_warmup_steps": 1, **EMULATED}
STATIC = {
    "recipe_name": "static",
    "static_scale_input": 60.0,
    "static_scale_weight": 1000.0,
    "static_scale_grad_output": 1e6,
}
TP = {"tensor_parallel_degree": 2}
ZBV = {
    "pipeline_parallel_degree": 2,
    "pipeline_parallel_schedule": "ZBVZeroBubble",
    "pipeline_parallel_microbatch_size": 2,
}
AC = {"mode": "selective", "selective_ac_option": "op"}

EXPERTS = dataclasses.replace(
    EXPERT_ARGS,
    dim=64,
    n_layers=2,
    hidden_dim=96,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    moe_hidden_dim=32,
)


def case(name: str, ranks: int, float8: dict, parallelism: dict | None = None, base: Any = ARGS, **more) -> Case:
    return Case(name, ranks, parallelism or {}, training=BF16, base=base, float8=float8, **more)


def run_all(*cases: Case) -> list[dict[str, Outcome]]:
    """What each rank has of each case, all run by the same processes."""
    by_case = [run_distributed(run_case, case.world_size, case, reuse=True) for case in cases]
    return [
        {case.name: outcome for case, outcome in zip(cases, of_rank, strict=True)}
        for of_rank in zip(*by_case, strict=True)
    ]


@functools.cache
def reference(base: Any = ARGS, device_type: str = "cpu") -> Outcome:
    return run_reference(Case("reference", base=base), device_type)


def assert_near(
    outcomes: list[Outcome], recipe: str = "tensorwise", base: LlamaArgs = ARGS, device_type: str = "cpu"
) -> None:
    of_loss, of_gradient = TOLERANCES[recipe]
    expected, seen = reference(base, device_type), set()
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=of_loss)
        for name, gradient in outcome.gradients.items():
            error = ((gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()).item()
            assert error <= of_gradient, name
            seen.add(name)
    assert seen == set(expected.gradients)


def test_recipes_on_two_ranks() -> None:
    recipes = [case(name, 2, {"recipe_name": name, **EMULATED}) for name in TOLERANCES]
    real = {"compile": EAGER_COMPILE, "activation_checkpoint": AC, "base": SHALLOW}
    reals = [case("real", 2, {"enable_fsdp_float8_all_gather": True}, **real), case("emulated", 2, GATHER, **real)]
    ways = [
        case("gather", 2, GATHER),
        case("precompute", 2, {**PRECOMPUTE, "fused_cast": "never"}),  # layer by layer, the others as one function
        case("ac", 2, PRECOMPUTE, activation_checkpoint=AC),
        case("ac_compile", 2, PRECOMPUTE, activation_checkpoint=AC, compile=EAGER_COMPILE),
        case("recast", 2, {**EMULATED, "force_recompute_fp8_weight_in_bwd": True}),
        case("accumulation", 2, PRECOMPUTE, {"fsdp_accumulation": "sharded"}, microbatches=2),
    ]
    results = run_all(*recipes, *reals, *ways)
    for name in results[0]:
        recipe, base = name if name in TOLERANCES else "tensorwise", SHALLOW if name in ("real", "emulated") else ARGS
        assert_near([result[name] for result in results], recipe, base)
    losses = {name: outcome.losses for name, outcome in results[0].items()}
    assert losses["gather"] == losses["precompute"] == losses["ac"] == losses["ac_compile"]
    assert losses["recast"] == losses["tensorwise"] != losses["gather"], "from fp32 shards, not from bf16 weights"
    assert losses["real"] == pytest.approx(losses["emulated"], rel=1e-4)


@pytest.mark.exhaustive
def test_each_recipe_with_all_at_once() -> None:
    """FSDP2, compilation, recomputation and accumulation; products emulated and real."""
    recipes = {name: {"recipe_name": name} for name in TOLERANCES}
    recipes |= {"delayed": {**DELAYED, "enable_fsdp_float8_all_gather": True}, "static": STATIC}
    if torch.__version__ < "2.13":
        recipes = {name: of for name, of in recipes.items() if not name.startswith("rowwise")}
    together = {"compile": EAGER_COMPILE, "activation_checkpoint": AC, "microbatches": 2, "base": SHALLOW}
    results = run_all(
        *(case(f"{name}, emulated", 2, {**of, **EMULATED}, **together) for name, of in recipes.items()),
        *(case(f"{name}, real", 2, {**of, "emulate": False}, **together) for name, of in recipes.items()),
    )
    for recipe in recipes:
        emulated, real = f"{recipe}, emulated", f"{recipe}, real"
        for name in (emulated, real):
            assert_near([result[name] for result in results], recipe if recipe in TOLERANCES else "tensorwise", SHALLOW)
        assert results[0][real].losses == pytest.approx(results[0][emulated].losses, rel=1e-4)


@pytest.mark.exhaustive
def test_other_parallelisms_on_four_ranks() -> None:
    results = run_all(
        case("tp", 4, PRECOMPUTE, TP),
        case("tp_compile", 4, PRECOMPUTE, TP, compile=EAGER_COMPILE, activation_checkpoint=AC),
        case("tp_mixed", 4, {**EMULATED, "filter_fqns": ["attention.wk", "w3"]}, TP),
        case("pp", 4, PRECOMPUTE, {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}),
        case("zero_bubble", 4, EMULATED, ZBV, base=DEEP),
        case("hsdp", 4, PRECOMPUTE, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}),
    )
    for name in results[0]:
        assert_near([result[name] for result in results], base=DEEP if name == "zero_bubble" else ARGS)
    assert results[0]["tp"].losses == results[0]["tp_compile"].losses


def test_tensor_parallel_rowwise_and_with_fewer_heads_than_ranks() -> None:
    four = {"tensor_parallel_degree": 4}
    wide = LlamaArgs(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=128, max_seq_len=16)
    float8 = Case("tensorwise", 4, four, training=BF16, base=wide, float8=EMULATED)
    rowwise = Case("rowwise", 4, four, training=BF16, base=wide, float8={"recipe_name": "rowwise", **EMULATED})
    results, expected = run_all(float8, rowwise), run_reference(Case("reference", base=wide))
    for name, outcome in results[0].items():
        for parameter, gradient in outcome.gradients.items():
            exact = expected.gradients[parameter]
            assert (gradient - exact).norm() <= TOLERANCES[name][1] * exact.norm(), parameter


class _CountGathered(TorchDispatchMode):
    """Counts the numbers that all-gathers bring, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.numbers[args[0].dtype] += args[0].numel()
        return func(*args, **(kwargs or {}))


def count_gathered(cases: list[Case]) -> dict[str, collections.Counter]:
    counted = {}
    for case in cases:
        with _CountGathered() as mode:
            run_case(case)
        counted[case.name] = mode.numbers
    return counted


def test_tensor_parallel_ranks_gather_bytes_in_place_of_bf16() -> None:
    """Else all goes well, and nothing is faster."""
    cases = [case(name, 2, {"recipe_name": name, **EMULATED}, TP, base=SHALLOW) for name in ("tensorwise", "rowwise")]
    for counted in run_distributed(count_gathered, 2, cases, reuse=True):
        tensorwise, rowwise = counted["tensorwise"], counted["rowwise"]
        assert rowwise[torch.uint8] == 0
        assert tensorwise[torch.uint8] == rowwise[torch.bfloat16] - tensorwise[torch.bfloat16] > 0


@pytest.mark.exhaustive
def test_model_with_experts_has_them_or_its_other_layers_in_float8() -> None:
    """Its latent attention has matrices that tensor parallelism does not cut."""
    delayed = {**DELAYED, "enable_fsdp_float8_all_gather": True}
    parallelism = {**TP, "expert_parallel_degree": 2}
    experts = {"float8_experts": {"fqns": ["experts"], "emulate": True}, "compile": EAGER_COMPILE}
    results = run_all(
        *(case(name, 4, float8, parallelism, EXPERTS) for name, float8 in (("a", PRECOMPUTE), ("b", delayed))),
        Case("experts", 4, parallelism, training=BF16, base=EXPERTS, activation_checkpoint=AC, **experts),
    )
    expected = reference(EXPERTS)
    for outcome in (outcome for result in results for outcome in result.values()):
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-3)
        for name, gradient in outcome.gradients.items():
            exact = expected.gradients[name]
            # Some tokens go to other experts.
            assert (gradient - exact).norm() <= 0.25 * exact.norm(), name
    assert len(results[0]["b"].float8) == 16


def measure_cases(cases: list[Case]) -> dict[str, dict[str, float]]:
    """The metrics of the first step of each."""

    def build(*args: Any, **kwargs: Any) -> Float8Training:
        training = build_float8_training(*args, **kwargs)
        training.begin_step(0)
        return training

    def before_update(training: Float8Training) -> dict[str, Tensor]:
        steps.append(collect(training))
        return steps[-1]

    metrics, collect = {}, Float8Training.before_update
    with (
        mock.patch("tests.distributed.cases.build_float8_training", build),
        mock.patch.object(Float8Training, "before_update", before_update),
    ):
        for case in cases:
            steps: list[dict[str, Tensor]] = []
            run_case(case)
            assert not any(steps[1:]), "no step but the first is measured"
            metrics[case.name] = {name: value.item() for name, value in steps[0].items()}
    return metrics


@pytest.mark.exhaustive
def test_experts_are_measured_alike_however_they_are_spread() -> None:
    more = {
        "training": BF16,
        "base": EXPERTS,
        "float8_experts": {"fqns": ["experts"], "emulate": True, "measure_freq": 5},
    }
    expert_parallel, full = {"expert_parallel_degree": 2}, {"mode": "full"}
    cases = [
        Case("fsdp", 4, activation_checkpoint=full, **more),
        Case("ep", 4, {"expert_parallel_degree": 4}, microbatches=2, activation_checkpoint=full, **more),
        Case("etp", 4, {**TP, **expert_parallel, "expert_tensor_parallel_degree": 2}, **more),
        Case("cp", 4, {"context_parallel_degree": 2, **expert_parallel}, **more),
        # The first of the stages has no experts.
        Case(
            "pp", 4, {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2, **expert_parallel}, **more
        ),
    ]
    compiled = Case("compiled", 2, expert_parallel, compile=EAGER_COMPILE, **more)
    (expected,) = run_distributed(measure_cases, 1, [Case("one", 1, **more)], reuse=True)[0].values()
    assert len(expected) == 2 + 3 * 3 * 4
    results = [
        *run_distributed(measure_cases, 4, cases, timeout=280, reuse=True),
        *run_distributed(measure_cases, 2, [compiled], timeout=280, reuse=True),
    ]
    for rank, of_rank in enumerate(results):
        for name, metrics in of_rank.items():
            is_without = name == "pp" and rank < 2
            assert metrics.keys() == {key for key in expected if key.count("/") == 1 or not is_without}, (rank, name)
            for key, value in metrics.items():
                # A scale by rows is another one for a part of a row.
                assert value == pytest.approx(expected[key], rel=0.1, abs=2e-3), (rank, name, key)
                if "/weight/amax" in key:
                    assert value == expected[key], (rank, name, key)


def assert_same_scales(results: list[dict[str, Outcome]], names: list[str]) -> None:
    for name in names:
        assert_near([result[name] for result in results])
        scales: dict[str, list[float]] = {}
        for result in results:
            for layer, values in result[name].float8.items():
                assert scales.setdefault(layer, values) == values, f"{layer} with {name}"
        assert len(scales) == 14
        assert all(scale not in (0.0, 1.0) for values in scales.values() for scale in values)


def test_delayed_scaling_has_the_same_scales_on_all_ranks() -> None:
    gather = {**DELAYED, "enable_fsdp_float8_all_gather": True}
    results = run_all(
        case("fsdp", 2, DELAYED),
        case("gather", 2, gather),
        case("gather_ac_compile", 2, gather, compile=EAGER_COMPILE, activation_checkpoint=AC),
        case("accumulation", 2, DELAYED, microbatches=2),
        case("accumulation_ac", 2, DELAYED, microbatches=2, activation_checkpoint={"mode": "full"}),
    )
    assert_same_scales(results, list(results[0]))
    losses = {name: outcome.losses for name, outcome in results[0].items()}
    assert losses["gather"] == losses["gather_ac_compile"]
    assert losses["accumulation"] == losses["accumulation_ac"]


@pytest.mark.exhaustive
def test_delayed_scaling_has_the_same_scales_on_all_ranks_of_a_stage() -> None:
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}
    results = run_all(
        case("tp", 4, {**DELAYED, "enable_fsdp_float8_all_gather": True}, TP),
        case("tp_pp", 4, DELAYED, {**TP, **pipeline}),
        case("pp", 4, DELAYED, pipeline),
        # Several forward passes come before the first backward pass, which writes to what the graph of each keeps.
        case("pp_compile", 4, DELAYED, pipeline, compile=EAGER_COMPILE),
    )
    assert_same_scales(results, list(results[0]))
    assert results[3]["pp"].losses == results[3]["pp_compile"].losses
