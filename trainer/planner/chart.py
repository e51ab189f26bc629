"""Memory over one step, by its parts, as a picture."""

from pathlib import Path
from typing import Any

from trainer.planner.hardware import GIB
from trainer.planner.memory import PARTS
from trainer.planner.plan import Plan


def draw_memory(plan: Plan, path: Path) -> None:
    """Write a PNG of the fullest rank's memory over a step: parts on top of each other, the peak, and what the GPU has.

    Raises:
        ImportError: matplotlib is not installed (the extra `plots`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    memory = plan.worst.memory
    figure, axes = pyplot.subplots(figsize=(11, 6), layout="constrained")
    times = [1e3 * seconds for seconds, _ in memory.curve]
    stacks = [[parts.get(part, 0) / GIB for _, parts in memory.curve] for part in PARTS]
    axes.stackplot(times, *stacks, labels=PARTS, step="post", colors=pyplot.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    _draw_limit(axes, memory.reserved / GIB, f"reserved at most: {memory.reserved / GIB:.1f} GiB", "black")
    _draw_limit(axes, plan.gpu_bytes / GIB, f"{plan.gpu}: {plan.gpu_bytes / GIB:.1f} GiB", "tab:red")
    place = f", rank {plan.worst.pipeline_rank} of the pipeline" if len(plan.ranks) > 1 else ""
    axes.set(
        xlabel="ms since the step began, as planned",
        ylabel="GiB",
        title=f"Planned memory of one step on {plan.world_size} {plan.gpu}{place}",
        xlim=(times[0], times[-1]),
        ylim=(0, None),
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_limit(axes: Any, height: float, label: str, color: str) -> None:
    axes.axhline(height, color=color, linestyle="--", linewidth=1, label=label)
