"""The rows of `tests/distributed/table.py` on GPUs and NCCL, as many as this machine has GPUs for."""

import functools

import pytest
import torch

from tests.distributed.cases import Case, Outcome, assert_equal_outcomes, run_case, run_reference
from tests.distributed.harness import run_distributed
from tests.distributed.table import ARGS, Row, find_refusal, list_rows

pytestmark = pytest.mark.gpu


@functools.cache
def _reference(tied: bool, documents: bool) -> Outcome:
    return run_reference(Case("reference", tied=tied, documents=documents, base=ARGS), "cuda")


@pytest.mark.parametrize("row", [row for row in list_rows() if find_refusal(row) is None], ids=lambda row: row.name)
def test_row_equals_one_gpu(row: Row) -> None:
    case = row.case
    if torch.cuda.device_count() < case.world_size:
        pytest.skip(f"needs {case.world_size} GPUs")
    outcomes = run_distributed(run_case, case.world_size, case, "cuda", backend="nccl", timeout=240.0)
    # Kernels of attention differ in how they add up.
    assert_equal_outcomes(outcomes, _reference(case.tied, case.documents), max(case.tolerance, 1e-4))
