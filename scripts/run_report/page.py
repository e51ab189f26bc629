"""The page of a run report: one HTML file with its styles, pictures and script inside, which asks nothing of a network."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from scripts.run_report import facts
from scripts.run_report.drawing import draw_svg, get_color
from scripts.run_report.panels import POINTS, Panel
from trainer.components.run_history import RunHistory

_HERE = Path(__file__).parent
VIEWS = (("whole run", 0.0), ("last half", 0.5), ("last tenth", 0.9))
_MIN_STEPS_FOR_VIEWS = 40
"""Logged ones. Of fewer the whole shows all there is to see."""


def build_page(runs: Sequence[RunHistory], panels: Sequence[Panel], *, now: float, refresh: int | None = None) -> str:
    """Return the page as HTML.

    now: Unix time, for how long ago something was. refresh: seconds after which a browser is to load the page again.
    """
    title = "Run report: " + ", ".join(run.name for run in runs[:4]) + (" and others" if len(runs) > 4 else "")
    body = "\n".join(
        [
            f"<h1>{_text(title)}</h1>",
            f"<p class='quiet'>Made {facts.format_time(now)} UTC, from what the run{'s' if len(runs) > 1 else ''} had written "
            "by then.</p>",
            *_build_summary(runs, now),
            *_build_remarks(runs, now),
            *_build_curves(runs, panels),
            *_build_settings(runs),
            *_build_checkpoints(runs),
            *_build_events(runs),
            *_build_environments(runs),
        ]
    )
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">{again}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever stands in a run's files: nothing is fetched, and no script but the page's own is run.
        f"<title>{_text(title)}</title>\n<style>\n{_read('page.css')}{_build_run_styles(runs)}</style>\n</head>\n"
        f"<body>\n{body}\n<script>\n{_read('page.js')}</script>\n</body>\n</html>\n"
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


def _build_run_styles(runs: Sequence[RunHistory]) -> str:
    """Return a rule for each run: its colour, and that its curves vanish while its box is not ticked."""
    return "".join(
        f".swatch-{number} {{ background: {get_color(number)}; }}\n"
        f"body:has(#show-{number}:not(:checked)) .run-{number} {{ display: none; }}\n"
        for number in range(len(runs))
    )


def _swatch(number: int) -> str:
    return f"<span class='swatch swatch-{number}'></span>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], *, kind: str = "") -> str:
    """Return a table from cells that are HTML already. The first cell of a row names it."""
    top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    lines = []
    for first, *others in rows:
        lines.append(f"<tr><th scope='row'>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>")
    return f"<div class='wide'><table class='{kind}'><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _name_all(runs: Sequence[RunHistory]) -> list[str]:
    return [_swatch(number) + _text(run.name) for number, run in enumerate(runs)]


def _by_key(columns: Sequence[Mapping[str, str]]) -> Iterator[list[str]]:
    """Yield a row for each key that any column has."""
    for key in dict.fromkeys(key for column in columns for key in column):
        yield [_text(key), *(_text(column.get(key, "-")) for column in columns)]


def _build_summary(runs: Sequence[RunHistory], now: float) -> Iterator[str]:
    yield "<h2>In short</h2>"
    columns = [facts.get_facts(run, now) for run in runs]
    if len(runs) == 1:
        state, _, sentence = columns[0].pop("state").partition(": ")
        yield f"<p class='state'><span class='badge {state.replace(' ', '-')}'>{_text(state)}</span> {_text(sentence)}</p>"
        known = [(key, value) for key, value in columns[0].items() if value not in ("-", "none")]
        yield (
            "<dl>"
            + "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in known)
            + "</dl>"
        )
        return
    rows = [row for row in _by_key(columns) if any(cell not in ("-", "none") for cell in row[1:])]
    yield _table(["", *_name_all(runs)], rows, kind="facts")


def _build_remarks(runs: Sequence[RunHistory], now: float) -> Iterator[str]:
    yield "<h2>What stands out</h2>"
    for number, run in enumerate(runs):
        remarks = facts.find_remarks(run, now)
        if len(runs) > 1:
            yield f"<h3>{_swatch(number)}{_text(run.name)}</h3>"
        items = "".join(
            f"<li class='{'bad' if remark.level == 'bad' else 'mild'}'>{_text(remark.text)}</li>" for remark in remarks
        )
        yield (
            f"<ul class='remarks'>{items}</ul>" if remarks else "<p>Nothing: no stop, no step left out, no warning.</p>"
        )


def _build_curves(runs: Sequence[RunHistory], panels: Sequence[Panel]) -> Iterator[str]:
    yield "<h2>Curves</h2>"
    means = " Where more steps are logged than fit, a line is the mean of neighbouring ones, and its shade their range."
    is_dense = max(len(run.records) for run in runs) > POINTS
    yield (
        "<p class='quiet'>By optimizer step. Point at a picture, and all show their values at that step."
        f"{means if is_dense else ''}</p>"
    )
    views = VIEWS if max(len(run.records) for run in runs) >= _MIN_STEPS_FOR_VIEWS else VIEWS[:1]
    yield "<div class='controls'>"
    if len(runs) > 1:
        for number, run in enumerate(runs):
            yield (
                f"<label><input type='checkbox' id='show-{number}' checked>{_swatch(number)}{_text(run.name)}</label>"
            )
    if len(views) > 1:
        for place, (name, _) in enumerate(views):
            checked = " checked" if place == 0 else ""
            yield f"<label><input type='radio' name='view' id='view-{place}'{checked}>{name}</label>"
    yield "</div>"
    end = get_last_step(runs)
    yield "<div class='panels'>"
    for panel in panels:
        unit = f" <span class='quiet'>{_text(panel.unit)}</span>" if panel.unit else ""
        drawn = "".join(
            f"<div class='view view-{place}'>{draw_svg(panel, begin=share * end, end=end)}</div>"
            for place, (_, share) in enumerate(views)
        )
        yield (
            f"<figure id='panel-{panel.key}'><h3>{_text(panel.title)}{unit}</h3>{drawn}"
            f"<div class='under'><figcaption>{_text(panel.note)}</figcaption><div class='readout'></div></div></figure>"
        )
    yield "</div>"


def get_last_step(runs: Sequence[RunHistory]) -> float:
    """Return where the axis of steps ends."""
    return float(max(1, *(run.last_step() for run in runs)))


def _build_settings(runs: Sequence[RunHistory]) -> Iterator[str]:
    yield "<h2>Settings</h2>"
    if len(runs) > 1:
        differences = facts.describe_differences(runs)
        if differences:
            rows = [[_text(key), *map(_text, values)] for key, values in differences.items()]
            yield "<p>What differs between the runs:</p>" + _table(["setting", *_name_all(runs)], rows, kind="code")
        else:
            yield "<p>The runs have the same settings.</p>"
    for number, run in enumerate(runs):
        changes = facts.describe_changes(run)
        rows = [[_text(key), *map(_text, pair)] for key, pair in changes.items()]
        table = _table(["setting", "value", "default"], rows, kind="code")
        name = f"{_swatch(number)}{_text(run.name)}: " if len(runs) > 1 else ""
        if not run.settings:
            yield f"<p>{name}no settings were kept with the run (config.toml).</p>"
        elif len(runs) > 1:
            yield f"<details><summary>{name}{len(rows)} settings that are not the defaults</summary>{table}</details>"
        else:
            yield f"<p>{len(rows)} are not the defaults:</p>{table}"


def _build_checkpoints(runs: Sequence[RunHistory]) -> Iterator[str]:
    yield "<h2>Checkpoints</h2>"
    for number, run in enumerate(runs):
        rows = [[_text(cell) for cell in row] for row in facts.describe_saves(run)]
        name = f"<h3>{_swatch(number)}{_text(run.name)}</h3>" if len(runs) > 1 else ""
        if not rows:
            yield f"{name}<p>None was saved.</p>"
            continue
        head = ["step", "GiB", "seconds until whole", "of these training stood still", ""]
        yield name + _fold(_table(head, rows, kind="numbers"), len(rows), "saves")


def _fold(table: str, rows: int, what: str) -> str:
    """Hide a long table until it is asked for."""
    return table if rows <= 12 else f"<details><summary>{rows} {what}</summary>{table}</details>"


def _build_events(runs: Sequence[RunHistory]) -> Iterator[str]:
    yield "<h2>Events</h2>"
    for number, run in enumerate(runs):
        happenings = facts.describe_events(run)
        if len(runs) > 1:
            yield f"<h3>{_swatch(number)}{_text(run.name)}</h3>"
        rows = [
            [_text(row.time), _text(row.steps), f"<span class='kind'>{_text(row.kind)}</span>", _text(row.text)]
            for row in happenings[-facts.MAX_ROWS :]
        ]
        yield (
            _table(["time, UTC", "step", "what", ""], rows, kind="events") if rows else "<p>None was written down.</p>"
        )
        if len(happenings) > facts.MAX_ROWS:
            yield f"<p class='quiet'>The last {facts.MAX_ROWS} of {len(happenings):,}.</p>"


def _build_environments(runs: Sequence[RunHistory]) -> Iterator[str]:
    yield "<h2>Environment</h2>"
    found = [column for run in runs for column in facts.describe_environments(run)]
    if found:
        rows = [[cell.replace("_", " ") if place == 0 else cell for place, cell in enumerate(row)] for row in _by_key([values for _, values in found])]  # fmt: skip
        yield _table(["", *(_text(title) for title, _ in found)], rows, kind="facts")
    else:
        yield "<p>Not written down: an older version of the program ran.</p>"
