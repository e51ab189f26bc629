"""The rows of `tests/distributed/table.py` on GPUs and NCCL, as many as this machine has GPUs for."""

import pytest
import torch

from tests.distributed.cases import Case, Outcome, assert_equal_outcomes, run_case, run_reference
from tests.distributed.harness import run_distributed
from tests.distributed.table import Row, find_refusal, list_rows

pytestmark = pytest.mark.gpu


_references: dict[str, Outcome] = {}


def _get_reference(case: Case) -> Outcome:
    """Return what a run of `Row.reference` gives, run once."""
    key = repr(case)
    if key not in _references:
        rounds = bool(case.training)
        _references[key] = (
            run_distributed(run_case, 1, case, "cuda", backend="nccl")[0] if rounds else run_reference(case, "cuda")
        )
    return _references[key]


@pytest.mark.parametrize("row", [row for row in list_rows() if find_refusal(row) is None], ids=lambda row: row.name)
def test_row_equals_one_gpu(row: Row) -> None:
    case = row.case
    if torch.cuda.device_count() < case.world_size:
        pytest.skip(f"needs {case.world_size} GPUs")
    outcomes = run_distributed(run_case, case.world_size, case, "cuda", backend="nccl", timeout=240.0)
    # Kernels of attention differ in how they add up.
    assert_equal_outcomes(outcomes, _get_reference(row.reference), max(case.tolerance, 1e-4))
