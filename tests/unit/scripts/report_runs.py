"""Folders of made-up runs, for tests of what reads them."""

import json
import math
import time

from trainer.config.manager import load_config
from trainer.config.render import write_config

ENVIRONMENT = {"versions": {"torch": "2.11.0"}, "hardware": {"device": "NVIDIA H200", "devices": 8}, "program": {"commit": "c0ffee"}}  # fmt: skip


def make_record(step, **values):
    """What a logged step has. The loss is a function of the step, which tests know."""
    return {
        "step": step,
        "loss": 2 + 6 * math.exp(-step / 20),
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_second": 10_000.0,
        "mfu": 45.0,
        "memory_gib": 100.0,
        "memory_active_gib": 90.0,
        "memory_percent": 70.0,
        "memory_retries": 0,
        "data_wait": 0.001,
        "tokens_seen": 1000 * step,
        "elapsed_seconds": float(step),
        "time": time.time() - 200 + step,
        **values,
    }


def make_event(kind, step, **values):
    return {"event": kind, "step": step, "time": time.time() - 200 + step, **values}


def write_run(folder, lines, *, settings=(), status=None, tail=""):
    """Write the files of a run: its lines between a start and what else is given. tail: the beginning of one more line."""
    folder.mkdir(parents=True)
    lines = [make_event("start", 0, tokens_seen=0), make_event("environment", 0, **ENVIRONMENT), *lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    write_config(load_config(["--job.description", "a test", *settings]).config, folder / "config.toml")
    if status is not None:
        content = {"status": status, "step": 100, "reason": "for a test", "time": time.time()}
        (folder / "status.json").write_text(json.dumps(content))
    return folder
