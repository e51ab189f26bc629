"""Write the table of docs/reliability.md from the data that is tested: `python -m tests.faults.render_table`."""

import sys
from pathlib import Path

from tests.faults.table import ROWS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def render() -> str:
    """Return the table as Markdown."""
    lines = ["| | what happens | what the run does | test |", "|-|-|-|-|"]
    for row in ROWS:
        tests = "<br>".join(f"[{name}](../{path})" for path, _, name in (test.partition("::") for test in row.tests))
        lines.append(f"| {row.number} | {row.fault} | {row.wanted} | {tests} |")
    return "\n".join(lines)


def insert(page: str) -> str:
    """Return the page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
