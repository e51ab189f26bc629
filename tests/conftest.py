"""What all tests share."""

from pathlib import Path
from typing import Any

import pytest
import torch

_TESTS = Path(__file__).parent

# Of these each test stands for itself, and there are many. Those of any other file share what its fixtures make.
_TABLE = "distributed/test_table.py"

_ORDER = ["cluster", "faults", "distributed", "unit", "gpu"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one of several workers. (`--dist loadgroup` does nothing under pytest 9.2 with pytest-xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(_TABLE) else file

    return Files(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests that are marked exhaustive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with tests that mostly wait, and end with the table's rows, short ones by which all workers end together."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive") is not None]
        items[:] = [item for item in items if item.get_closest_marker("exhaustive") is None]
        config.hook.pytest_deselected(items=left_out)

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
