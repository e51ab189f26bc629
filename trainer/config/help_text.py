"""The `--help` text, rendered by tyro from the docstrings of the schema."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import sys
import textwrap

import tyro

from trainer.config.fields import get_item_section, get_leaves
from trainer.config.schema import JobConfig

_DESCRIPTION = """Pretrain a language model. Settings come from the TOML file named by --job.config_file, then from
the command line: --section.key VALUE or --section.key=VALUE. Booleans also read --section.key and
--section.no-key; lists take words, or words joined by commas; none unsets a setting that may be unset."""


def print_help() -> None:
    """Prints every setting with its meaning, type and default."""
    sys.stdout.write(render_help())


def render_help() -> str:
    """The help text, ending in a line break."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(
            JobConfig,
            prog="run_train.sh",
            description=" ".join(_DESCRIPTION.split()),
            args=["--help"],
            use_underscores=True,
        )
    return output.getvalue().rstrip() + "\n\n" + _describe_tables() + "\n"


def _describe_tables() -> str:
    """Settings that are lists of tables: tyro leaves out what it cannot fill from single words."""
    lines = ["lists of tables (in the TOML file, or on the command line as --section.key '[{name = value}, ...]')"]
    for leaf in get_leaves().values():
        section = get_item_section(leaf.type)
        if section is None:
            continue
        texts = _get_field_texts(section)
        lines += ["", f"[[{leaf.key}]]  {(section.__doc__ or '').strip()}"]
        for field in dataclasses.fields(section):
            lines.append(f"  {field.name} (default: {field.default})")
            lines += textwrap.wrap(texts[field.name], width=80, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _get_field_texts(section: type) -> dict[str, str]:
    """The string under each field of a section."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef), f"{section} is not a class"
    texts = {}
    for statement, following in itertools.pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            texts[statement.target.id] = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                texts[statement.target.id] = str(following.value.value)
    return texts
