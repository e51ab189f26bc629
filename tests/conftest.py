"""What all tests share."""

from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).parent

# Of these each test stands for itself, and there are many. Those of any other file share what its fixtures make.
_TABLE = "distributed/test_table.py"

_ORDER = ["cluster", "faults", "distributed", "unit", "gpu"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a file in one of several workers (pytest-xdist)."""
    if item.path != _TESTS / _TABLE:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests that mostly wait, and end with the table's rows, short ones by which all workers end together."""

    def get_place(item: pytest.Item) -> int:
        folder = item.path.relative_to(_TESTS).parts[0]
        return len(_ORDER) if item.path == _TESTS / _TABLE else _ORDER.index(folder)

    items.sort(key=get_place)


@pytest.fixture(autouse=True)
def _hide_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are not marked `gpu` do the same on every machine: here and in programs that they start there is no GPU."""
    if request.node.get_closest_marker("gpu") is not None:
        return
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # This process may have counted its GPUs already.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
