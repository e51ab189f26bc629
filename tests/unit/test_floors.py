"""The house's rules, read from the source: who may import whom, who may name what, how long things may be.

Every import counts: at the top, inside a function, under TYPE_CHECKING, and `importlib.import_module("a literal")`. The
rules are tried on made-up trees that break them, so that this file can fail.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# By the longest prefix of the path. A file imports from its own floor and from those below.
FLOORS = {
    "trainer/config/": 0,
    "models/": 1,
    "trainer/distributed/": 2,
    "trainer/low_precision/": 2,
    "trainer/parallelize.py": 2.5,
    "trainer/components/": 3,
    "trainer/build_model.py": 2.7,
    "trainer/build_passes.py": 3.5,
    "trainer/planner/": 4,
    "trainer/preflight.py": 4,
    "trainer/preflight_low_precision.py": 4,
    "trainer/preflight_parallel.py": 4,
    "trainer/trainer.py": 4,
    "trainer/train.py": 4,
}
PROJECT = ("trainer", "models", "scripts", "tests")
CONFIG_MAY_IMPORT = {*sys.stdlib_module_names, "tomli", "tomli_w", "tyro"}
MAY_NAME_JOB_CONFIG = {
    *(
        "trainer/train.py",
        "trainer/trainer.py",
        "trainer/preflight.py",
        "trainer/parallelize.py",
        "trainer/build_model.py",
        "trainer/build_passes.py",
    ),
    *(f"trainer/planner/{name}.py" for name in ("dry_run", "main", "plan", "search")),
}
MAY_READ_ENVIRONMENT = {"trainer/train.py"}
ENVIRONMENT_SETTERS = {"setdefault", "update"}
# Calls that make meshes and process groups, and the one place of each. Checkpoints talk on the host, beside training.
ONLY_IN = {
    **dict.fromkeys(("init_device_mesh", "DeviceMesh", "_unflatten"), "trainer/distributed/parallel_dims.py"),
    "new_group": "trainer/components/checkpoint_ranks.py",
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LONGER_FUNCTIONS = {("trainer/trainer.py", "Trainer.__init__"): 80}


class Source:
    """One file: its path from the root, its module name and its tree."""

    def __init__(self, root: Path, path: Path):
        self.path = path.relative_to(root).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        parts = self.path.removesuffix(".py").split("/")
        self.is_package = parts[-1] == "__init__"
        self.module = ".".join(parts[:-1] if self.is_package else parts)

    def nodes(self) -> Iterator[tuple[ast.AST, ast.AST | None]]:
        """Each node with its parent."""
        stack: list[tuple[ast.AST, ast.AST | None]] = [(self.tree, None)]
        while stack:
            node, parent = stack.pop()
            yield node, parent
            stack.extend((child, node) for child in ast.iter_child_nodes(node))

    def imports(self) -> Iterator[tuple[int, str, str | None]]:
        """Each import as (line, module, name taken from it)."""
        for node, _ in self.nodes():
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._resolve(node)
                yield from ((node.lineno, base, alias.name) for alias in node.names)
            elif isinstance(node, ast.Call) and get_dotted(node.func).endswith("import_module"):
                literals = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
                yield from ((node.lineno, literal, None) for literal in literals if isinstance(literal, str))

    def _resolve(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])


def get_dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = get_dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def get_floor(path: str) -> float | None:
    prefixes = [prefix for prefix in FLOORS if path == prefix or (prefix.endswith("/") and path.startswith(prefix))]
    return FLOORS[max(prefixes, key=len)] if prefixes else None


def load_sources(root: Path, folders: tuple[str, ...] = ("trainer", "models")) -> dict[str, Source]:
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {source.module: source for source in (Source(root, path) for path in files)}


def find_target(sources: dict[str, Source], module: str, name: str | None) -> str:
    """The module that an import reaches: `from a import b` may mean a.b."""
    full = f"{module}.{name}" if name else module
    return full if full in sources else module


def find_import_faults(root: Path) -> Iterator[str]:
    sources = load_sources(root)
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for source in sources.values():
        floor = get_floor(source.path)
        if floor is None:
            if source.path != "trainer/__init__.py":
                yield f"{source.path}: stands on no floor; give it one in FLOORS, or put it where it belongs"
            continue
        for line, module, name in source.imports():
            where = f"{source.path}:{line}"
            top = module.split(".")[0]
            if floor == 0 and top not in CONFIG_MAY_IMPORT and not module.startswith("trainer.config"):
                yield f"{where}: trainer/config must not import {module}"
                continue
            if floor == 1 and f"{module}.{name}".startswith("torch.distributed"):
                yield f"{where}: models must not import torch.distributed"
            if top not in PROJECT:
                continue
            target = find_target(sources, module, name)
            if top in ("scripts", "tests"):
                yield f"{where}: nothing here imports {top}"
            elif target not in sources:
                yield f"{where}: {target} does not exist"
            elif floor == 1 and top == "trainer":
                yield f"{where}: models must not import trainer"
            else:
                graph[source.module].add(target)
                above = get_floor(sources[target].path)
                if above is not None and above > floor:
                    yield f"{where}: a step upwards, from floor {floor} to {target} on floor {above}"
        if floor == 1:
            for node, _ in source.nodes():
                if get_dotted(node) == "torch.distributed":
                    yield f"{source.path}:{node.lineno}: models must not use torch.distributed"
    for circle in find_circles(graph):
        yield f"circle of imports: {' -> '.join(circle)}"


def find_circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """One circle for each way back that a walk over the graph meets."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield [*path[path.index(module) :], module]
        elif module not in done:
            for target in sorted(graph[module]):
                yield from walk(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        yield from walk(module, [])


def find_naming_faults(root: Path) -> Iterator[str]:
    for source in load_sources(root).values():
        if not source.path.startswith("trainer/config/") and source.path not in MAY_NAME_JOB_CONFIG:
            for node, _ in source.nodes():
                names = (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
                is_annotation = isinstance(node, ast.Constant) and node.value == "JobConfig"
                if "JobConfig" in names or is_annotation:
                    yield f"{source.path}:{node.lineno}: only the top of the house names JobConfig; take sections"
        if source.path not in MAY_READ_ENVIRONMENT:
            yield from find_environment_reads(source)
        name = source.path.split("/")
        if source.is_package and source.text.strip() and not (name[0] == "models" and len(name) == 3):
            yield f"{source.path}: package files stay empty"
        for node, _ in source.nodes():
            called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if source.path != ONLY_IN.get(called, source.path):
                yield f"{source.path}:{node.lineno}: {called} is called in {ONLY_IN[called]} alone"


def find_environment_reads(source: Source) -> Iterator[str]:
    parents = {id(node): parent for node, parent in source.nodes()}
    for node, parent in source.nodes():
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            read = any(alias.name in ("environ", "environb", "getenv", "getenvb") for alias in node.names)
        elif get_dotted(node) in ("os.getenv", "os.getenvb"):
            read = True
        elif get_dotted(node) in ("os.environ", "os.environb"):
            sets_item = isinstance(parent, ast.Subscript) and not isinstance(parent.ctx, ast.Load)
            calls_setter = isinstance(parent, ast.Attribute) and parent.attr in ENVIRONMENT_SETTERS
            # The value of os.environ.setdefault() is a reading; alone on its line it is not.
            if calls_setter:
                call = parents[id(parent)]
                calls_setter = isinstance(call, ast.Call) and isinstance(parents[id(call)], ast.Expr)
            read = not (sets_item or calls_setter)
        else:
            continue
        if read:
            yield f"{source.path}:{node.lineno}: the environment is read in trainer/train.py alone"


def find_length_faults(root: Path) -> Iterator[str]:
    for source in load_sources(root, ("trainer", "models", "scripts")).values():
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{source.path}: {lines} lines, over {MAX_FILE_LINES}"
        for node, parent in source.nodes():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{parent.name}.{node.name}" if isinstance(parent, ast.ClassDef) else node.name
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                limit = LONGER_FUNCTIONS.get((source.path, name), MAX_FUNCTION_LINES)
                if length > limit:
                    yield f"{source.path}:{node.lineno}: {name} has {length} lines, over {limit}"


@pytest.mark.parametrize("check", [find_import_faults, find_naming_faults, find_length_faults])
def test_house_keeps_the_rule(check):
    assert load_sources(ROOT), "no source was found"
    faults = list(check(ROOT))
    assert not faults, "\n".join(faults)


GOOD = {
    "trainer/__init__.py": "",
    "trainer/config/schema.py": "from dataclasses import dataclass\nimport tyro\nclass JobConfig: ...\n",
    "models/registry.py": "import torch\nfrom models.plan import Plan\n",
    "models/plan.py": "class Plan: ...\n",
    "models/llama3/__init__.py": "from models.llama3 import args\nSPEC = args\n",
    "models/llama3/args.py": "",
    "trainer/distributed/fsdp.py": "import torch.distributed\nfrom trainer.config.schema import X\nfrom models import plan\n",
    "trainer/parallelize.py": "from trainer.distributed.fsdp import a\nfrom trainer.config.schema import JobConfig\n",
    "trainer/components/loss.py": "import os\nos.environ['A'] = 'b'\nos.environ.setdefault('A', 'b')\n",
    "trainer/components/metrics.py": "from .loss import x\n'''A JobConfig is not taken here.'''\n",
    "trainer/trainer.py": "from trainer.components import loss, metrics\nfrom trainer.parallelize import p\n",
    "trainer/train.py": "import os\nfrom trainer.trainer import Trainer\nrank = os.environ['RANK']\n",
}


def build_tree(root: Path, changes: dict[str, str]) -> Path:
    for name, text in {**GOOD, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def find_all_faults(root: Path) -> list[str]:
    return [*find_import_faults(root), *find_naming_faults(root), *find_length_faults(root)]


def test_checker_accepts_a_tree_that_keeps_the_rules(tmp_path):
    assert find_all_faults(build_tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("trainer/config/bad.py", "import torch\n", "bad.py:1: trainer/config must not import torch"),
        (
            "trainer/config/bad.py",
            "def f():\n    from models import plan\n",
            "bad.py:2: trainer/config must not import",
        ),
        ("models/bad.py", "import trainer.config.schema\n", "bad.py:1: models must not import trainer"),
        ("models/bad.py", "from trainer.config import schema\n", "bad.py:1: models must not import trainer"),
        (
            "models/bad.py",
            "from torch.distributed.tensor import DTensor\n",
            "bad.py:1: models must not import torch.dist",
        ),
        ("models/bad.py", "from torch import distributed\n", "bad.py:1: models must not import torch.distributed"),
        (
            "models/bad.py",
            "import torch\nr = torch.distributed.get_rank()\n",
            "bad.py:2: models must not use torch.dist",
        ),
        ("trainer/distributed/bad.py", "from trainer.components import loss\n", "bad.py:1: a step upwards"),
        ("trainer/distributed/bad.py", "from ..components.loss import x\n", "bad.py:1: a step upwards"),
        ("trainer/distributed/bad.py", "import trainer.parallelize\n", "bad.py:1: a step upwards"),
        (
            "trainer/components/bad.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trainer.trainer import Trainer\n",
            "bad.py:3: a step upwards",
        ),
        ("trainer/components/bad.py", "def f():\n    import trainer.train\n", "bad.py:2: a step upwards"),
        (
            "trainer/components/bad.py",
            "import importlib\nimportlib.import_module('trainer.trainer')\n",
            "bad.py:2: a step upwards",
        ),
        ("trainer/components/bad.py", "import tests.unit\n", "bad.py:1: nothing here imports tests"),
        ("trainer/components/bad.py", "from trainer.nowhere import x\n", "bad.py:1: trainer.nowhere does not exist"),
        ("trainer/bad.py", "", "trainer/bad.py: stands on no floor"),
        ("trainer/components/loss.py", "from trainer.components import metrics\n", "circle of imports"),
        (
            "models/plan.py",
            "def f():\n    from models import registry\n",
            "circle of imports: models.plan -> models.reg",
        ),
        ("models/plan.py", "import models.plan\n", "circle of imports: models.plan -> models.plan"),
        ("trainer/components/bad.py", "def f(config: 'JobConfig'): ...\n", "bad.py:1: only the top of the house"),
        (
            "trainer/components/bad.py",
            "from trainer.config.schema import JobConfig as C\n",
            "bad.py:1: only the top of the house",
        ),
        (
            "trainer/components/bad.py",
            "import trainer.config.schema as s\nx = s.JobConfig\n",
            "bad.py:2: only the top of the house",
        ),
        ("trainer/components/bad.py", "import os\nx = os.environ['A']\n", "bad.py:2: the environment is read"),
        ("trainer/components/bad.py", "import os\nx = os.environ.get('A')\n", "bad.py:2: the environment is read"),
        ("trainer/components/bad.py", "import os\nx = os.environ.setdefault('A', 'b')\n", "bad.py:2: the environment"),
        ("trainer/components/bad.py", "import os\nx = dict(os.environ)\n", "bad.py:2: the environment is read"),
        ("trainer/components/bad.py", "import os\nx = os.getenv('A')\n", "bad.py:2: the environment is read"),
        ("trainer/components/bad.py", "from os import environ\n", "bad.py:1: the environment is read"),
        ("trainer/components/bad.py", "m = init_device_mesh('cpu', (2,))\n", "bad.py:1: init_device_mesh is called in"),
        ("trainer/distributed/bad.py", "def f(dist):\n    dist.new_group()\n", "bad.py:2: new_group is called in"),
        ("trainer/components/__init__.py", "x = 1\n", "trainer/components/__init__.py: package files stay empty"),
        ("models/__init__.py", "x = 1\n", "models/__init__.py: package files stay empty"),
        ("models/llama3/deep/__init__.py", "x = 1\n", "package files stay empty"),
        ("scripts/bad.py", "x = 1\n" * 501, "scripts/bad.py: 501 lines, over 500"),
        ("models/bad.py", "def f():\n" + "    x = 1\n" * 60, "models/bad.py:1: f has 61 lines, over 60"),
        (
            "trainer/trainer.py",
            "class Trainer:\n    def __init__(self):\n" + "        x = 1\n" * 80,
            "trainer/trainer.py:2: Trainer.__init__ has 81 lines, over 80",
        ),
    ],
)
def test_checker_finds_the_fault(tmp_path, path, text, fault):
    faults = find_all_faults(build_tree(tmp_path, {path: text}))
    assert len(faults) == 1, faults
    assert fault in faults[0]


@pytest.mark.parametrize(("lines", "faults"), [(79, 0), (80, 1)])
def test_checker_gives_trainer_init_more_room(tmp_path, lines, faults):
    text = "class Trainer:\n    def __init__(self):\n" + "        x = 1\n" * lines
    assert len(find_all_faults(build_tree(tmp_path, {"trainer/trainer.py": text}))) == faults
