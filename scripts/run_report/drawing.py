"""Draws the pictures of a run report with matplotlib: as SVG for the page, and all in one PNG."""

import html
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from scripts.run_report.panels import Line, Panel, thin

# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WIDTH, _HEIGHT = 460, 210
"""Of a picture in points, the unit of its SVG."""
_BOX = (0.13, 0.13, 0.84, 0.83)
"""Left, bottom, width and height of the axes, as shares of these."""
_MANY_POINTS = 25
"""Circles on a line; more are drawn smaller."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "path.simplify": False,  # the page reads the values back from the paths
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "image.cmap": "viridis",
}


def get_color(run: int) -> str:
    """Return the colour of a run."""
    return COLORS[run % len(COLORS)]


def draw_svg(panel: Panel, *, begin: float = 0.0, end: float) -> str:
    """Return a picture of the steps from `begin` to `end` as an SVG element, wrapped in what the page's script needs.

    The wrapper's attributes say where the axes lie in the SVG and which values they span: the script reads values under the
    pointer back from the drawn curves, so that no number is in the page twice.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"{panel.key}-{begin}"}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        axes = figure.add_axes(_BOX)
        draw(panel, axes, begin=begin, end=end)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    box = axes.get_position()  # a colour bar makes the axes narrower
    data: dict[str, Any] = {
        "box": [box.x0 * _WIDTH, box.x1 * _WIDTH, (1 - box.y1) * _HEIGHT, (1 - box.y0) * _HEIGHT],
        "x": axes.get_xlim(),
        "y": axes.get_ylim(),
        "log": panel.is_log(),
        "lines": [{"label": line.label, "run": line.run} for line in panel.lines],
    }
    title = html.escape(panel.title)
    svg = _clean(text.getvalue()).replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return f"<div class='plot' data-plot='{html.escape(json.dumps(data), quote=True)}'>{svg}</div>"


def _clean(svg: str) -> str:
    """Take away what an SVG inside HTML does not need, and ids that would be in the page many times."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="curve-(\d+)-(\d+)"', r'<g class="curve run-\1" data-line="\2"', svg)
    svg = re.sub(r'<g id="band-(\d+)"', r'<g class="run-\1"', svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d{4})\d+", r"\1", path[0]), svg)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    return re.sub(r"\n\s*", "\n", svg)


def draw(panel: Panel, axes: Any, *, begin: float, end: float) -> None:
    """Draw a picture of the steps from `begin` to `end` into matplotlib axes."""
    axes.set_xlim(begin, end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.layers:
        _draw_layers(panel, axes, begin=begin, end=end)
        return
    for number, line in enumerate(panel.lines):
        _draw_line(line, axes, gid=f"curve-{line.run}-{number}", begin=begin)
    _set_value_axis(panel, axes, begin)
    for mark in panel.marks:
        if mark.kind == "resume" and mark.step >= begin:
            axes.axvline(mark.step, color=get_color(mark.run), linestyle=":", linewidth=1)
    skips = [mark for mark in panel.marks if mark.kind == "skip" and mark.step >= begin]
    axes.scatter(
        [mark.step for mark in skips],
        [0.02] * len(skips),
        transform=axes.get_xaxis_transform(),
        c=[get_color(mark.run) for mark in skips],
        marker="^",
        s=22,
        zorder=5,
    )


def _draw_line(line: Line, axes: Any, *, gid: str, begin: float) -> None:
    points = thin({step: value for step, value in line.values.items() if step >= begin})
    look: dict[str, Any] = {"color": get_color(line.run), "label": line.label, "gid": gid}
    if line.style == "points":
        size = 5 if len(points.steps) <= _MANY_POINTS else 2.5
        look |= {"marker": "o", "markersize": size, "markerfacecolor": "white", "linewidth": 0.6, "linestyle": ":"}
    else:
        look |= {"linestyle": "--" if line.style == "dashed" else "-"}
        look |= {"marker": "."} if len(points.steps) == 1 else {}
    axes.plot(points.steps, points.values, **look)
    if points.is_mean:
        band = axes.fill_between(points.steps, points.low, points.high, color=look["color"], alpha=0.25, linewidth=0)
        band.set_gid(f"band-{line.run}")


def _set_value_axis(panel: Panel, axes: Any, begin: float) -> None:
    if panel.zero_line:
        axes.axhline(0, color="#999999", linewidth=1)
    if panel.is_log():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    limits = panel.get_limits(begin)
    if limits is not None and limits[1] > limits[0]:
        room = 0.06 * (limits[1] - limits[0])
        low = 0.0 if panel.from_zero and not begin else limits[0] - room
        axes.set_ylim(low, limits[1] + room)
    elif panel.from_zero:
        axes.set_ylim(bottom=0)


def _draw_layers(panel: Panel, axes: Any, *, begin: float, end: float) -> None:
    """Draw one row a layer. A column reaches from halfway after the step before to halfway to the next."""
    names = list(panel.layers)
    steps = sorted({step for values in panel.layers.values() for step in values if step >= begin})
    if not steps:
        return
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    edges = [max(begin, steps[0] - 0.5), *middles, max(end, steps[-1] + 0.5)]
    rows = [[panel.layers[name].get(step, float("nan")) for step in steps] for name in names]
    image = axes.pcolormesh(edges, [i - 0.5 for i in range(len(names) + 1)], rows, rasterized=True)
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_xlim(begin, end)
    every = -(-len(names) // 12)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=14)


def write_png(panels: Sequence[Panel], path: Path, *, title: str, end: float) -> None:
    """Draw all pictures of the whole runs into one PNG file."""
    columns = 2
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 2.9 * rows + 0.6), layout="constrained")
        figure.suptitle(title, fontsize=13)
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, axes in zip(panels, places, strict=False):
            draw(panel, axes, begin=0.0, end=end)
            axes.set_title(f"{panel.title}, {panel.unit}" if panel.unit else panel.title, loc="left", fontsize=10)
            if len(panel.lines) > 1:
                axes.legend(fontsize=8, frameon=False)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
