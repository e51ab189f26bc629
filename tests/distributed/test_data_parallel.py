"""Every way to spread the model gives the losses, gradients and trained weights of one process."""

import functools

import pytest
import torch

from tests.distributed.cases import CASES, Case, Outcome, list_parameters, run_case
from tests.distributed.harness import run_distributed

# A compiler on cores that others use as well takes longer than anything else here.
COMPILING_SECONDS = 240.0


@functools.cache
def _reference(tied: bool) -> Outcome:
    """The run of one process in fp32, without process group, FSDP, checkpointing or compilation."""
    return run_case(Case("reference", tied=tied))


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "case",
    list_parameters(
        CASES, exhaustive=("fsdp4_everything", "hsdp2x2_accumulate_sharded", "hsdp2x2_accumulate_unsharded")
    ),
)
def test_run_equals_one_process(case: Case) -> None:
    expected = _reference(case.tied)
    outcomes = run_distributed(run_case, case.world_size, case, timeout=COMPILING_SECONDS, reuse=True)
    for rank, actual in enumerate(outcomes):
        assert actual.losses == pytest.approx(expected.losses, rel=case.tolerance), f"loss on rank {rank}"
        assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=case.tolerance), f"norm on rank {rank}"
        for kind in ("gradients", "parameters"):
            tensors, references = getattr(actual, kind), getattr(expected, kind)
            assert tensors.keys() == references.keys()
            errors = {name: _relative_error(tensors[name], references[name]) for name in references}
            wrong = {name: error for name, error in errors.items() if not error <= case.tolerance}
            assert not wrong, f"{kind} on rank {rank}"
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values()), "master weights are fp32"


def test_reference_learns() -> None:
    outcome = _reference(tied=False)
    assert len(outcome.gradients) == 4 * 9 + 3
    assert all(gradient.norm() > 0 for gradient in outcome.gradients.values())
