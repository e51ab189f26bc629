"""FSDP's collectives by copy engines give what NCCL gives, step after step, in buffers that are used again."""

import dataclasses
import os
from unittest import mock

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.distributed.cases import BF16, HSDP, STEPS, Case, Outcome, run_case
from tests.distributed.harness import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]

# Gradients that travel in bf16 are those of "sharded": the others have been added up in fp32 already.
SHARDED, UNSHARDED = {"fsdp_accumulation": "sharded"}, {"fsdp_accumulation": "unsharded"}
CASES = [
    Case("fsdp2", 2, SHARDED),
    Case("fsdp4", 4, SHARDED),
    Case("fsdp4_tied", 4, SHARDED, tied=True),
    Case("fsdp2_never", 2, {**SHARDED, "fsdp_reshard_after_forward": "never"}),
    Case("hsdp2x2", 4, {**SHARDED, **HSDP}),
    Case("fsdp2_accumulate_sharded", 2, SHARDED, microbatches=2),
    Case("fsdp4_accumulate_unsharded", 4, UNSHARDED, microbatches=2),
    Case("fsdp2_bf16", 2, SHARDED, BF16, tolerance=1e-2),
    Case("fsdp4_bf16", 4, SHARDED, BF16, tolerance=1e-2),
    Case("fsdp4_bf16_accumulate_sharded", 4, SHARDED, BF16, microbatches=2, tolerance=1e-2),
    Case("fsdp4_bf16_accumulate_unsharded", 4, UNSHARDED, BF16, microbatches=2, tolerance=1e-2),
]


def run_both(case: Case) -> tuple[Outcome, Outcome, list[int]]:
    """Run a case with NCCL and with copy engines. Also return how many buffers were made up to the end of each step."""
    # Two runs must differ in nothing but the collectives.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected = run_case(case, "cuda")
    counts: list[int] = []
    with mock.patch.object(symmetric_memory, "rendezvous", wraps=symmetric_memory.rendezvous) as rendezvous:
        hook = register_optimizer_step_post_hook(lambda *_: counts.append(rendezvous.call_count))
        parallelism = {**case.parallelism, "fsdp_collectives": "copy_engine"}
        actual = run_case(dataclasses.replace(case, parallelism=parallelism), "cuda")
        hook.remove()
    return expected, actual, counts


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_equals_nccl(case: Case) -> None:
    if torch.cuda.device_count() < case.world_size:
        pytest.skip(f"needs {case.world_size} CUDA devices")
    for rank, (expected, actual, counts) in enumerate(run_distributed(run_both, case.world_size, case, backend="nccl")):
        # The first step starts from the same weights: its sums differ in the order of the ranks at most.
        assert actual.losses[0] == expected.losses[0], f"rank {rank}"
        errors = {name: relative_error(actual.gradients[name], expected.gradients[name]) for name in expected.gradients}
        assert max(errors.values()) <= 1e-6, f"rank {rank}: {errors}"
        # Later steps show that no buffer is overwritten while it is still read.
        assert actual.losses == pytest.approx(expected.losses, rel=case.tolerance), f"rank {rank}"
        for name, parameter in expected.parameters.items():
            assert relative_error(actual.parameters[name], parameter) <= case.tolerance, f"rank {rank}: {name}"
        assert len(counts) == STEPS
        assert counts[0] > 0, "the copy engine was not used"
        assert counts[-1] == counts[-2], f"rank {rank}: each step makes new buffers: {counts}"
