"""The answers of `--job.plan` and `--job.plan_search`: on the terminal, and in files."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.config.schema import JobConfig
from trainer.planner.chart import draw_memory
from trainer.planner.plan import make_plan
from trainer.planner.report import format_plan, to_json
from trainer.planner.search import Result, Search, format_result, format_results

logger = logging.getLogger(__name__)


def answer(config: JobConfig, world_size: int) -> int:
    """Print what the settings ask for. Return the exit code: 0, or 1 where nothing fits.

    Writes `plan/plan.json` and `plan/memory.png` to the dump folder.

    Raises:
        ValueError: settings that cannot be planned.
    """
    if config.job.plan_search:
        with _quiet():
            begin = time.monotonic()
            search = Search(config, world_size, show=lambda result: _show_progress(result, time.monotonic() - begin))
            results = search.run()
        print(format_results(results))
        return 0 if any(result.fits for result in results) else 1
    with _quiet():
        plan = make_plan(config, world_size)
    folder = Path(config.job.dump_folder) / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(to_json(plan), indent=1) + "\n", encoding="utf-8")
    print(format_plan(plan))
    written = f"{folder}/plan.json"
    try:
        draw_memory(plan, folder / "memory.png")
        written += f" and {folder}/memory.png"
    except ImportError:
        logger.warning("no picture of the memory: matplotlib is not installed (the extra `plots`)")
    print(f"\nwritten: {written}")
    return 0 if plan.fits else 1


def _show_progress(result: Result, seconds: float) -> None:
    """Where the answer does not go, so that that can be piped."""
    print(f"{seconds:.0f} s: {format_result(result)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the parts of a run log for runs."""
    noisy = ("trainer", "torch.distributed", "torch._dynamo", "torch._higher_order_ops", "py.warnings")
    levels = dict.fromkeys(noisy, logging.ERROR) | {"trainer.planner": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
