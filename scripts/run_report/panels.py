"""The pictures of a run report: which there are, and what is in each. No drawing here."""

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.components.run_history import RunHistory

POINTS = 400
"""Most points of a line."""
_LOG_FROM = 20.0
"""Curves whose largest value is so many times the median one are drawn on a logarithmic axis."""
_HEAD = 0.02
"""The first share of a run, whose high losses do not set the scale."""


@dataclass(frozen=True)
class Line:
    """A curve of one run."""

    run: int
    """Number of the run, for its colour."""
    label: str
    values: dict[int, float]
    """By step."""
    style: Literal["line", "dashed", "points"] = "line"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    run: int
    step: int
    kind: Literal["resume", "skip"]


@dataclass(frozen=True)
class Panel:
    """One picture: curves over the steps, or one run's values by layer and step."""

    key: str
    title: str
    unit: str
    note: str
    """What it shows, for someone who sees it for the first time."""
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    layers: dict[str, dict[int, float]] = field(default_factory=dict)
    """In place of lines: values of each layer."""
    from_zero: bool = False
    may_be_log: bool = False
    cuts_head: bool = False
    zero_line: bool = False

    def is_log(self) -> bool:
        """Whether its axis is logarithmic: spikes would hide all else on a linear one."""
        values = [value for line in self.lines for value in line.values.values()]
        if not self.may_be_log or min(values) <= 0:
            return False
        return max(values) > _LOG_FROM * statistics.median(values)

    def last_step(self) -> int:
        """Return the last step that has a value."""
        curves = [line.values for line in self.lines] + list(self.layers.values())
        return max(step for values in curves for step in values)

    def get_limits(self, begin: float) -> tuple[float, float] | None:
        """Return the range of the values after step `begin`, without the head of the whole run where that is cut off."""
        after = max(begin, _HEAD * self.last_step()) if self.cuts_head else begin
        values = [value for line in self.lines for step, value in line.values.items() if step > after]
        return (min(values), max(values)) if values else None


@dataclass(frozen=True)
class Points:
    """What is drawn of a curve: its values, or the means of stretches of neighbouring ones, and then their range."""

    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    is_mean: bool


def thin(values: dict[int, float], points: int = POINTS) -> Points:
    """Return at most `points` points of a curve."""
    items = list(values.items())
    if len(items) <= points:
        heights = [value for _, value in items]
        return Points([float(step) for step, _ in items], heights, heights, heights, is_mean=False)
    edges = [round(i * len(items) / points) for i in range(points + 1)]
    stretches = [items[begin:end] for begin, end in itertools.pairwise(edges)]
    heights_of = [[value for _, value in stretch] for stretch in stretches]
    return Points(
        [statistics.fmean(step for step, _ in stretch) for stretch in stretches],
        [statistics.fmean(heights) for heights in heights_of],
        [min(heights) for heights in heights_of],
        [max(heights) for heights in heights_of],
        is_mean=True,
    )


def build_panels(runs: Sequence[RunHistory]) -> list[Panel]:
    """Return the pictures for which at least one run has values."""
    panels = [_build_loss(runs), *([_build_difference(runs)] if len(runs) > 1 else []), *_build_simple(runs)]
    for number, run in enumerate(runs):
        panels += _build_layers(number, run, many=len(runs) > 1)
    return [panel for panel in panels if panel.lines or panel.layers]


def _collect(
    runs: Sequence[RunHistory],
    *keys: str,
    labels: Sequence[str] = ("",),
    scale: float = 1.0,
    styles: Sequence[Literal["line", "dashed", "points"]] = ("line", "dashed"),
    select: Callable[[RunHistory, str], dict[int, float]] = RunHistory.curve,
) -> list[Line]:
    """Return the curves of some keys: one line for each run that has one. labels: what to add to the run's name, by key."""
    lines = []
    for number, run in enumerate(runs):
        for place, key in enumerate(keys):
            values = {step: scale * value for step, value in select(run, key).items()}
            suffix = labels[place] if place < len(labels) else ""
            if values:
                lines.append(Line(number, f"{run.name} {suffix}".strip(), values, styles[place]))
    return lines


def _build_loss(runs: Sequence[RunHistory]) -> Panel:
    lines = _collect(runs, "loss")
    lines += _collect(
        runs,
        "loss",
        labels=("validation",),
        styles=("points",),
        select=lambda run, key: {e["step"]: e[key] for e in run.get_events("validation") if e.get(key) is not None},
    )
    marks = [
        Mark(number, event["step"], "resume" if event["event"] == "resume" else "skip")
        for number, run in enumerate(runs)
        for event in run.get_events("resume", "skip", "rollback")
    ]
    note = "Mean over the tokens of a step."
    note += " Circles: validation data." if any(line.style == "points" for line in lines) else ""
    note += " Dotted: the run was stopped or rolled back, and went on there." if _has(marks, "resume") else ""
    note += " Triangles: steps without an update." if _has(marks, "skip") else ""
    return Panel("loss", "Loss", "nats a token", note, lines, marks, cuts_head=True)


def _has(marks: Sequence[Mark], kind: str) -> bool:
    return any(mark.kind == kind for mark in marks)


def _build_difference(runs: Sequence[RunHistory]) -> Panel:
    base = runs[0].curve("loss")
    lines = []
    for number, run in enumerate(runs[1:], start=1):
        common = {step: value - base[step] for step, value in run.curve("loss").items() if step in base}
        lines += [Line(number, run.name, common)] if common else []
    note = f"Step by step, where both logged it: below zero is better than {runs[0].name}."
    return Panel(
        "difference", f"Loss minus that of {runs[0].name}", "nats a token", note, lines, cuts_head=True, zero_line=True
    )


def _build_simple(runs: Sequence[RunHistory]) -> list[Panel]:
    """Return the pictures that show keys of the records as they are."""
    mtp = list(dict.fromkeys(key for run in runs for key in run.find_keys("mtp/loss_")))
    depths: list[Line] = []
    for place, key in enumerate(mtp):
        label = f"depth {key.removeprefix('mtp/loss_')}"
        depths += _collect(runs, key, labels=(label,), styles=("dashed" if place % 2 else "line",))
    return [
        Panel("mtp", "Loss of the further predictions", "nats a token", "Multi-token prediction: depth K predicts K places further ahead.", depths, cuts_head=True),
        Panel("grad_norm", "Gradient norm", "2-norm", "Of the whole gradient, before clipping.", _collect(runs, "grad_norm"), may_be_log=True),
        Panel("lr", "Learning rate", "", "Of the first parameter group.", _collect(runs, "lr"), from_zero=True),
        Panel("speed", "Speed", "tokens/s a device", "Validation, checkpoints and traces are left out of the time. The first step of a start compiles and warms up.", _collect(runs, "tokens_per_second"), from_zero=True),
        Panel("mfu", "MFU", "% of the bf16 peak", "Model FLOPs with exact causal attention, over the dense bf16 peak of the device.", _collect(runs, "mfu"), from_zero=True),
        Panel("memory", "Memory", "GiB", "Peak since the step logged before, on the first rank: what the allocator had reserved (dashed: what tensors took); on a CPU: resident memory.", _collect_memory(runs), from_zero=True),
        Panel("data_wait", "Data wait", "% of the time", "Time in which the loop waited for a batch.", _collect(runs, "data_wait", scale=100), from_zero=True),
        Panel("alone", "Slowest rank in a step", "s", "Longest time that a rank took before it met the others: reading its batch, mostly.", _collect(runs, "ranks/alone_seconds"), from_zero=True),
        Panel("slowdown", "Slowest GPU", "times the median", "Time of a fixed matrix product on the slowest GPU over the median one: 1 is even.", _collect(runs, "ranks/matmul_slowdown")),
        Panel("experts", "Expert load", "busiest / mean", "Tokens of the busiest expert over those of the mean one, in the worst layer: 1 is even.", _collect(runs, "experts/max_over_mean")),
        Panel("entropy", "Evenness of the experts", "1 is even", "Entropy of the experts' shares over its largest value, in the worst layer.", _collect(runs, "experts/entropy")),
        Panel("saturated", "Float8: cut off", "% of elements", "Too large for their scale, in the worst tensor. Up to 0.01% is harmless.", _collect(runs, "float8/saturated_max", scale=100), from_zero=True),
        Panel("underflowed", "Float8: lost as zero", "% of elements", "Too small for their scale, in the worst tensor.", _collect(runs, "float8/underflowed_max", scale=100), from_zero=True),
    ]  # fmt: skip


def _collect_memory(runs: Sequence[RunHistory]) -> list[Line]:
    lines = _collect(runs, "memory_gib", "memory_active_gib", labels=("", "in tensors"))
    reserved = {line.run: line.values for line in lines if line.style == "line"}
    # On a CPU there is one figure for both.
    return [line for line in lines if line.style == "line" or line.values != reserved.get(line.run)]


def _build_layers(number: int, run: RunHistory, *, many: bool) -> list[Panel]:
    """Return how the experts of each layer are loaded, and how much of each layer's float8 tensors, experts' too, is cut off and lost."""
    kinds = (
        ("experts/", "/max_over_mean", "Expert load by layer", "busiest / mean", 1.0),
        ("float8/", "/saturated", "Float8 cut off, by layer", "%, worst tensor", 100.0),
        ("float8/", "/underflowed", "Float8 lost as zero, by layer", "%, worst tensor", 100.0),
    )
    panels = []
    for prefix, suffix, title, unit, scale in kinds:
        layers: dict[str, dict[int, float]] = {}
        for key in run.find_keys(prefix):
            if not key.endswith(suffix) or key == prefix.strip("/") + suffix:
                continue
            name = key.removeprefix(prefix).split("/")[0]
            block = re.match(r".*?layers\.\d+", name)
            layer = layers.setdefault((block[0] if block else name).removeprefix("layers."), {})
            for step, value in run.curve(key).items():
                layer[step] = max(scale * value, layer.get(step, 0.0))
        if any(layers.values()):
            shown = f"{title}: {run.name}" if many else title
            note = "One row a layer, one column a logged step."
            panels.append(Panel(f"{suffix[1:]}_layers_{number}", shown, unit, note, layers=layers))
    return panels
