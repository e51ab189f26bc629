"""The table is about tests that there are, and the page shows it."""

import ast

import pytest

from tests.faults import render_table
from tests.faults.table import ROWS, Row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_row_has_its_tests(row: Row) -> None:
    assert row.tests
    for test in row.tests:
        path, _, name = test.partition("::")
        tree = ast.parse((render_table.ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_rows_are_numbered_in_order() -> None:
    assert [row.number for row in ROWS] == [*range(1, 32)]


def test_page_shows_the_table_that_is_tested() -> None:
    page = render_table.PAGE.read_text(encoding="utf-8")
    assert page == render_table.insert(page), "run `python -m tests.faults.render_table`"
