"""Make one page of what happened in a run, or in several side by side.

    python scripts/report.py outputs/llama3_8b                                  # writes outputs/llama3_8b/report.html
    python scripts/report.py outputs/bf16 outputs/float8 --out compare.html --png compare.png
    python scripts/report.py outputs/llama3_8b --watch 60                       # again each minute, while it goes on

A run is its `job.dump_folder`, or its `metrics.jsonl`; it may be going on. The page is one HTML file with everything inside: it can
be mailed, and opened years later without a network. It has main figures, what stands out, curves (loss, gradient norm, speed, MFU,
memory, data wait, expert load, float8), settings and their differences, checkpoints, events, and versions.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.components.run_history import RunHistory, RunReadError, load_run  # noqa: E402 the root is on the path from here


def write_report(runs: Sequence[RunHistory], out: Path, *, png: Path | None, refresh: int | None) -> None:
    """Write the page, and all pictures as one PNG. What is there is replaced as a whole, so that a reader never sees half a page."""
    # Late: they need matplotlib, which is optional.
    from scripts.run_report.drawing import write_png
    from scripts.run_report.page import build_page, get_last_step
    from scripts.run_report.panels import build_panels

    panels = build_panels(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_text(build_page(runs, panels, now=time.time(), refresh=refresh), encoding="utf-8")
    draft.replace(out)
    if png is not None:
        write_png(panels, png, title=", ".join(run.name for run in runs), end=get_last_step(runs))


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 if a run cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--names", nargs="+", help="what to call them; default: the folders' names")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the folder of the first run")
    parser.add_argument("--png", type=Path, help="all curves in one picture")
    parser.add_argument(
        "--watch", type=int, metavar="SECONDS", help="write again every so often, until all runs have ended"
    )
    args = parser.parse_args(argv)
    if args.names and len(args.names) != len(args.runs):
        parser.error("give as many --names as runs")
    if args.watch is not None and args.watch < 1:
        parser.error("--watch takes seconds, at least 1")
    names = args.names or [None] * len(args.runs)
    out = args.out or (args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent) / "report.html"
    try:
        while True:
            runs = [load_run(path, name) for path, name in zip(args.runs, names, strict=True)]
            goes_on = args.watch is not None and any(run.describe_state(time.time()) == "going on" for run in runs)
            write_report(runs, out, png=args.png, refresh=args.watch if goes_on else None)
            print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", flush=True)
            if not goes_on:
                return 0
            time.sleep(args.watch)
    except RunReadError as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("the report needs matplotlib: pip install matplotlib", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
