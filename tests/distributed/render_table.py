"""Write the table of docs/parallelism.md from the data that is tested: `python -m tests.distributed.render_table`."""

import string
import sys
from pathlib import Path

from tests.distributed.table import FURTHER_TECHNIQUES, TECHNIQUES, Row, find_refusal, list_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
EQUAL, SAME_KIND = "=", "."


def render() -> str:
    """Return the table as Markdown: a matrix of all pairs, the reasons of what is refused, and the larger sets."""
    rows = list_rows()
    reasons: list[str] = []
    verdicts = {row.name: _verdict(row, reasons) for row in rows}
    letters = string.ascii_lowercase
    width = max(len(technique.label) for technique in TECHNIQUES)
    lines = ["```text", " " * (width + 3) + " ".join(letters[: len(TECHNIQUES)])]
    for i, technique in enumerate(TECHNIQUES):
        cells = [verdicts.get(Row((other, technique)).name, SAME_KIND) for other in TECHNIQUES[:i]]
        lines.append(f"{letters[i]} {technique.label:<{width}} {' '.join([*cells, verdicts[technique.name]])}")
    lines += ["```", "", "| refused | because |", "|-|-|"]
    lines += [f"| {number} | {reason} |" for number, reason in enumerate(reasons, start=1)]
    lines += ["", "| larger sets | |", "|-|-|"]
    for row in rows:
        if len(row.techniques) > 2:
            verdict = verdicts[row.name]
            told = "equal" if verdict == EQUAL else f"refused ({verdict})"
            lines.append(f"| {', '.join(t.label for t in row.techniques)} | {told} on {row.case.world_size} |")
    lines += ["", "| technique | settings |", "|-|-|"]
    lines += [f"| {technique.label} | `{technique.settings}` |" for technique in (*TECHNIQUES, *FURTHER_TECHNIQUES)]
    return "\n".join(lines)


def _verdict(row: Row, reasons: list[str]) -> str:
    refusal = find_refusal(row)
    if refusal is None:
        return EQUAL
    if refusal not in reasons:
        reasons.append(refusal)
    return str(reasons.index(refusal) + 1)


def insert(page: str) -> str:
    """Return the page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
