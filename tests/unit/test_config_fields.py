"""Every setting of the schema is read somewhere: none is a knob that does nothing."""

import ast
from pathlib import Path

import pytest

from trainer.config.fields import get_item_section, get_leaves, get_type_hints
from trainer.config.unavailable import REFUSED, SILENT, WITHOUT_EFFECT

ROOT = Path(__file__).resolve().parents[2]

# Folders whose reading of a field counts. The configuration's own files mention every key, to check it; the one that plans
# the pipeline is among them since it needs no torch.
READERS = ("trainer", "models")
READERS_ALL_THE_SAME = {ROOT / "trainer" / "config" / "pipeline_layout.py"}
NOT_READERS = tuple(ROOT / "trainer" / name for name in ("config", "preflight.py", "preflight_parallel.py"))

# Read by the configuration itself.
READ_HERE = {
    "job.config_file",
    "job.validate_only",
    "model.tokenizer_path",
    "quantize.linear.float8.fp8_opt_level",
    "compile.graph_passes",
    "compile.model_backend_override",
}


def read_attributes():
    """Names of all attributes that some file reads."""
    names = set()
    for folder in READERS:
        for path in (ROOT / folder).rglob("*.py"):
            is_skipped = any(path == skipped or skipped in path.parents for skipped in NOT_READERS)
            if is_skipped and path not in READERS_ALL_THE_SAME:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


ATTRIBUTES = read_attributes()
ACCOUNTED_FOR = READ_HERE | {refusal.key for refusal in REFUSED} | set(WITHOUT_EFFECT) | SILENT


@pytest.mark.parametrize("key", sorted(get_leaves().keys() - ACCOUNTED_FOR))
def test_setting_is_read(key):
    assert key.rpartition(".")[2] in ATTRIBUTES, f"nothing reads {key}: honour it, or list it in config/unavailable.py"


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (key, field)
        for key, leaf in get_leaves().items()
        if (section := get_item_section(leaf.type)) is not None
        for field in get_type_hints(section)
    ],
)
def test_field_of_a_list_of_tables_is_read(key, field):
    assert field in ATTRIBUTES, f"nothing reads {field} of {key}"


def test_keys_accounted_for_are_settings():
    assert get_leaves().keys() >= ACCOUNTED_FOR


@pytest.mark.parametrize("key", sorted(set(WITHOUT_EFFECT)))
def test_setting_said_to_be_without_effect_is_not_read(key):
    name = key.rpartition(".")[2]
    others = [other for other in get_leaves() if other.rpartition(".")[2] == name and other not in WITHOUT_EFFECT]
    assert others or name not in ATTRIBUTES, f"{key} is read: take its line out of config/unavailable.py"
