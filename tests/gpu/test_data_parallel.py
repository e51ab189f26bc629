"""The cases of `tests/distributed/cases.py` on GPUs and NCCL, as many as this machine has GPUs for."""

import functools

import pytest
import torch

from tests.distributed.cases import CASES, Case, Outcome, run_case
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.gpu


@functools.cache
def _reference(tied: bool, offloads: bool) -> Outcome:
    # Offloaded weights are drawn on the CPU, whose numbers differ from the GPU's.
    return run_case(Case("reference", tied=tied), "cpu" if offloads else "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_equals_one_gpu(case: Case) -> None:
    if torch.cuda.device_count() < case.world_size:
        pytest.skip(f"needs {case.world_size} GPUs")
    offloads = bool(case.training.get("enable_cpu_offload"))
    expected = _reference(case.tied, offloads)
    backend = "cpu:gloo,cuda:nccl" if offloads else "nccl"
    tolerance = max(case.tolerance, 1e-4 if offloads else 1e-5)
    for actual in run_distributed(run_case, case.world_size, case, "cuda", backend=backend):
        assert actual.losses == pytest.approx(expected.losses, rel=tolerance)
        for name, parameter in expected.parameters.items():
            error = (actual.parameters[name] - parameter).norm() / parameter.norm()
            assert error <= tolerance, name
        for name, gradient in expected.gradients.items():
            error = (actual.gradients[name] - gradient).norm() / gradient.norm()
            assert error <= tolerance, name
