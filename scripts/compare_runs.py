"""Compare runs: loss, speed and memory as curves in one PNG, and the differences with their noise.

    python scripts/compare_runs.py outputs/bf16 outputs/float8 --names bf16 float8 --out compare.png

A run is its `job.dump_folder`, or its `metrics.jsonl`. The first one is what the others are compared with. Steps are compared one
by one, where both runs have them: on the same data, what differs from batch to batch cancels out. The noise of a mean
difference is its standard error, with neighbouring steps counted as one where they are correlated.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.components.run_history import RunHistory, RunReadError, load_run  # noqa: E402 the root is on the path from here

MAX_BLOCKS = 20
"""Means of so many stretches of neighbouring steps give the noise of the mean of all (batch means)."""


class ComparisonError(ValueError):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Difference:
    """What a run has more than the first one, or times as much."""

    name: str
    steps: int
    """Compared, after the warm-up."""
    loss: float
    """Mean difference, nats a token."""
    loss_noise: float
    """Standard error of the former."""
    tail_loss_percent: float
    """The same over the last tenth of the steps, in percent of the first run's loss."""
    tail_loss_noise_percent: float
    speed: float | None
    """Ratio of the median tokens/s."""
    memory_gib: float | None
    """Difference of the peaks."""


def get_mean_and_noise(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error from the means of blocks of neighbours; NaN for fewer than two values."""
    blocks = min(MAX_BLOCKS, len(values))
    if blocks < 2:
        return (values[0] if values else math.nan), math.nan
    edges = [round(i * len(values) / blocks) for i in range(blocks + 1)]
    means = [statistics.fmean(values[begin:end]) for begin, end in itertools.pairwise(edges)]
    return statistics.fmean(values), statistics.stdev(means) / blocks**0.5


def compare(first: RunHistory, other: RunHistory, *, warmup: int) -> Difference:
    """Return how `other` differs from `first`, from step `warmup` + 1 on.

    Raises:
        ComparisonError: they have no step in common.
    """
    expected, actual = first.curve("loss"), other.curve("loss")
    steps = sorted(step for step in expected.keys() & actual.keys() if step > warmup)
    if not steps:
        raise ComparisonError(f"{first.name} and {other.name} have no step in common after step {warmup}")
    differences = [actual[step] - expected[step] for step in steps]
    tail = max(1, len(steps) // 10)
    level = statistics.fmean(expected[step] for step in steps[-tail:])
    loss, noise = get_mean_and_noise(differences)
    tail_loss, tail_noise = get_mean_and_noise(differences[-tail:])

    def get(run: RunHistory, key: str, combine: Any) -> float | None:
        values = [value for step, value in run.curve(key).items() if step > warmup]
        return combine(values) if values else None

    speeds = [get(run, "tokens_per_second", statistics.median) for run in (first, other)]
    memories = [get(run, "memory_gib", max) for run in (first, other)]
    return Difference(
        other.name,
        len(steps),
        loss,
        noise,
        100 * tail_loss / level,
        100 * tail_noise / level,
        None if None in speeds or not speeds[0] else speeds[1] / speeds[0],  # type: ignore[operator]
        None if None in memories else memories[1] - memories[0],  # type: ignore[operator]
    )


def format_table(first: RunHistory, differences: Sequence[Difference]) -> str:
    """Return a Markdown table."""
    lines = [
        f"| against {first.name} | steps | loss | loss at the end | tokens/s | memory |",
        "|-|-|-|-|-|-|",
    ]
    for d in differences:
        speed = "-" if d.speed is None else f"x {d.speed:.3f}"
        memory = "-" if d.memory_gib is None else f"{d.memory_gib:+.2f} GiB"
        lines.append(
            f"| {d.name} | {d.steps} | {d.loss:+.5f} ± {d.loss_noise:.5f} | "
            f"{d.tail_loss_percent:+.3f}% ± {d.tail_loss_noise_percent:.3f}% | {speed} | {memory} |"
        )
    return "\n".join(lines)


def plot(runs: Sequence[RunHistory], path: Path, *, warmup: int) -> None:
    """Draw loss, difference of the loss from the first run's, tokens/s and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = (
        ("loss", "loss, nats a token"),
        ("tokens_per_second", "tokens/s a device"),
        ("memory_gib", "peak memory, GiB"),
    )
    for axis, (key, label) in zip((axes[0, 0], axes[1, 0], axes[1, 1]), panels, strict=True):
        for run in runs:
            curve = run.curve(key)
            steps = [step for step in curve if key == "loss" or step > warmup]
            axis.plot(steps, [curve[step] for step in steps], label=run.name, linewidth=1)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        if key != "loss":
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])  # a line along the edge is not seen
    base = runs[0].curve("loss")
    for place, run in enumerate(runs[1:], start=1):
        curve = run.curve("loss")
        steps = [step for step in curve if step in base]
        axes[0, 1].plot(steps, [curve[s] - base[s] for s in steps], label=run.name, linewidth=0.7, color=f"C{place}")
    axes[0, 1].axhline(0, color="C0", linewidth=1)
    axes[0, 1].set_xlabel("step")
    axes[0, 1].set_ylabel(f"loss minus that of {runs[0].name}")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 if the runs cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of two or more runs, or their metrics.jsonl")
    parser.add_argument("--names", nargs="+", help="what to call them; default: the folders' names")
    parser.add_argument("--out", type=Path, help="PNG to draw (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--warmup", type=int, default=5, help="first steps to leave out of the figures")
    args = parser.parse_args(argv)
    try:
        if len(args.runs) < 2 or (args.names and len(args.names) != len(args.runs)):
            raise ComparisonError("name two runs or more, and as many --names")
        runs = [
            load_run(path, name) for path, name in zip(args.runs, args.names or [None] * len(args.runs), strict=True)
        ]
        differences = [compare(runs[0], run, warmup=args.warmup) for run in runs[1:]]
    except (ComparisonError, RunReadError) as error:
        print(error, file=sys.stderr)
        return 2
    print(format_table(runs[0], differences))
    if args.json:
        args.json.write_text(json.dumps([asdict(d) for d in differences], indent=1) + "\n", encoding="utf-8")
    if args.out:
        try:
            plot(runs, args.out, warmup=args.warmup)
        except ImportError:
            print("--out needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
