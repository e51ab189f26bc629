"""`--help`: complete, quick, and without torch."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.fields import get_item_section, get_leaves
from trainer.config.help_text import render_help

ROOT = Path(__file__).resolve().parents[3]
MAX_CPU_SECONDS = 3.0  # twice what is promised of an idle machine, since CPU time too grows on a busy one


def run(code):
    """Runs Python code at the root of the repository; its result and the CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_names_every_setting():
    text = render_help()
    for key, leaf in get_leaves().items():
        flag = f"[[{key}]]" if get_item_section(leaf.type) else f"--{key}"
        assert re.search(rf"{re.escape(flag)}(\s|,|$)", text, re.MULTILINE), key


def test_help_tells_what_a_field_of_a_list_of_tables_means():
    text = " ".join(render_help().split())
    assert "[[data.sources]]" in text
    assert "Share of the sequences drawn from this source" in text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_0_quickly_and_without_torch(flag):
    code = f"""
import sys
from trainer.config.manager import load_config
try:
    load_config(["--training.steps", "1", "{flag}"])
except SystemExit as stop:
    assert stop.code == 0, stop.code
    assert "torch" not in sys.modules
    print("done")
"""
    result, cpu_seconds = run(code)
    assert result.returncode == 0, result.stderr
    assert "--training.steps" in result.stdout
    assert result.stdout.endswith("done\n")
    assert cpu_seconds < MAX_CPU_SECONDS


def test_config_error_comes_quickly_and_without_torch():
    code = """
import sys
from trainer.config.errors import ConfigError
from trainer.config.manager import load_config
from trainer.preflight import check
try:
    check(load_config(["--training.steps", "0", "--training.step", "1"]), world_size=8)
except ConfigError as error:
    assert len(error.problems) == 2, error.problems
    assert "torch" not in sys.modules
    print("done")
"""
    result, cpu_seconds = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
    assert cpu_seconds < MAX_CPU_SECONDS


def test_no_file_of_the_config_imports_torch():
    for path in (ROOT / "trainer" / "config").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "numpy", "models"), f"{path}: {name}"
                assert not name.startswith("trainer.") or name.startswith("trainer.config."), f"{path}: {name}"
