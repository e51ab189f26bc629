"""Gradients that travel in float8: near to fp32 whatever FSDP is combined with, and the same on all who hold replicas."""

from typing import Any

import pytest
import torch

from tests.distributed.cases import EXPERT_ARGS, HSDP, Case, Outcome, run_case, run_reference
from tests.distributed.harness import run_distributed
from tests.distributed.test_float8 import ARGS

WIRE = {"gradient_wire_dtype": "float8"}
# Of the 2-norm of a gradient, for one rounding to 3 bits of mantissa, 2.6%, on the way to the sum of ranks, whose parts may cancel.
TOLERANCE = 0.045


def case(name: str, parallelism: dict[str, Any], base: Any = ARGS, **more: Any) -> Case:
    return Case(name, 4, parallelism, training=WIRE, base=base, **more)


CASES = (
    case("hsdp", {**HSDP, "fsdp_accumulation": "sharded"}, microbatches=2),
    case("tp", {"tensor_parallel_degree": 2}),
    case("experts", {"expert_parallel_degree": 2}, EXPERT_ARGS),
)


def run_cases() -> dict[str, Outcome]:
    return {case.name: run_case(case) for case in CASES}


def test_gradients_are_near_and_replicas_the_same() -> None:
    ranks = run_distributed(run_cases, 4, timeout=280)
    for this in CASES:
        expected = run_reference(Case("reference", base=this.base))
        outcomes = [results[this.name] for results in ranks]
        errors = []
        for outcome in outcomes:
            assert outcome.losses == pytest.approx(expected.losses, rel=1e-2)
            for name, gradient in outcome.gradients.items():
                error = ((gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()).item()
                assert error <= TOLERANCE, f"{this.name} {name}"
                errors.append(error)
                replicated = this.name == "hsdp" or (this.name == "tp" and "norm" in name)
                if replicated:
                    assert torch.equal(gradient, outcomes[0].gradients[name]), f"{this.name} {name}"
        assert max(errors) > 1e-3, f"{this.name}: nothing was rounded"
