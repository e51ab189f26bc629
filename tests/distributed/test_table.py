"""Every row of the table gives the losses, gradients and trained weights of one process, or is refused with its reason."""

import pytest

from tests.distributed import render_table
from tests.distributed.cases import Case, Outcome, assert_equal_outcomes, build_parameter, run_case, run_reference
from tests.distributed.harness import run_distributed
from tests.distributed.table import REFUSED, Row, find_refusal, list_rows

# A compiler on cores that others use as well takes longer than anything else here.
TIMEOUT_SECONDS = 240.0


_references: dict[str, Outcome] = {}


def _get_reference(case: Case) -> Outcome:
    """Return what a run of `Row.reference` gives, run once."""
    key = repr(case)
    if key not in _references:
        rounds = bool(case.training)
        _references[key] = run_distributed(run_case, 1, case, reuse=True)[0] if rounds else run_reference(case)
    return _references[key]


# Rows of as many ranks one after another: they share processes. Large ones first, so that workers end together.
ROWS = sorted(list_rows(), key=lambda row: -row.case.world_size)


@pytest.mark.parametrize("row", [build_parameter(row, row.name, exhaustive=row.is_exhaustive) for row in ROWS])
def test_row_equals_one_process_or_is_refused(row: Row) -> None:
    names = {technique.name for technique in row.techniques}
    expected_reason = next((reason for combination, reason in REFUSED.items() if combination <= names), None)
    refusal = find_refusal(row)
    if expected_reason is not None:
        assert refusal is not None, "what cannot work must not start"
        assert expected_reason in refusal
        return
    assert refusal is None, "nothing else may be refused"
    case = row.case
    outcomes = run_distributed(run_case, case.world_size, case, timeout=TIMEOUT_SECONDS, reuse=True)
    assert_equal_outcomes(outcomes, _get_reference(row.reference), case.tolerance)


def test_page_shows_the_table_that_is_tested() -> None:
    page = render_table.PAGE.read_text(encoding="utf-8")
    assert page == render_table.insert(page), "run `python -m tests.distributed.render_table`"


def test_table_has_every_pair() -> None:
    rows = [frozenset(technique.name for technique in row.techniques) for row in list_rows()]
    assert len(rows) == len(set(rows))
    assert sum(len(names) == 2 for names in rows) > 200


def test_pairs_on_fewer_than_eight_ranks_run_each_time_if_only_in_a_larger_row() -> None:
    run = [{t.name for t in row.techniques} for row in list_rows() if not row.is_exhaustive]
    for row in list_rows():
        names = {technique.name for technique in row.techniques}
        assert len(names) != 2 or row.case.world_size == 8 or any(names <= larger for larger in run), row.name
