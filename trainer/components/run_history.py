"""What a run left in its folder, read again: metrics, events, settings, how it ended. Works beside a run that is going on."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from trainer.components.checkpoint_files import list_steps
from trainer.components.metric_writers import METRICS_FILE, read_lines, select_records
from trainer.components.run_status import STATUS_FILE
from trainer.config.fields import get_leaves
from trainer.config.saved import SAVED_NAME

# A run without a word for so many of its logged intervals, and at least so long, is taken to be dead.
_SILENT_INTERVALS = 20
_SILENT_SECONDS = 900.0


class RunReadError(ValueError):
    """A folder that holds no run."""


@dataclass(frozen=True)
class RunHistory:
    """One run. What its folder does not have is empty."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    """Logged steps, oldest first; of steps that were trained again, the last time."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """In the order in which they happened."""
    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted key, all of them: with the defaults of this program for those that the run did not write down."""
    status: dict[str, Any] = field(default_factory=dict)
    """Content of `status.json`."""
    kept_checkpoints: list[int] = field(default_factory=list)
    """Steps of the checkpoints that are there now."""

    def curve(self, key: str) -> dict[int, float]:
        """Values by step; those that were not finite, or not known, are left out."""
        return {r["step"]: r[key] for r in self.records if isinstance(r.get(key), int | float)}

    def find_keys(self, prefix: str) -> list[str]:
        """Return the keys of the records that begin with `prefix`, in order of first use."""
        return list(dict.fromkeys(key for record in self.records for key in record if key.startswith(prefix)))

    def get_events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def last_step(self) -> int:
        """Return the last step that is logged; 0 before the first."""
        return self.records[-1]["step"] if self.records else 0

    def last_word(self) -> float | None:
        """Return the Unix time of the last line, or None if no line has one."""
        return max(
            (entry["time"] for entry in (*self.records[-1:], *self.events[-1:]) if "time" in entry), default=None
        )

    def describe_state(self, now: float) -> str:
        """Return "complete", "preempted", "failed", "ended" (in good order), "going on", or "silent": killed, or hanging.

        now: Unix time.
        """
        if self.status:
            return str(self.status["status"])
        if self.events and self.events[-1]["event"] == "end":
            return "ended"
        last = self.last_word()
        if last is None:
            return "silent"
        times = [record["time"] for record in self.records[-10:] if "time" in record]
        interval = max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)
        return "going on" if now - last < max(_SILENT_SECONDS, _SILENT_INTERVALS * interval) else "silent"


def load_run(path: Path, name: str | None = None) -> RunHistory:
    """Read a run from its `job.dump_folder`, or from its `metrics.jsonl`.

    A line that is being written at this moment is left out. name: the folder's, unless it is given.

    Raises:
        RunReadError: there are no metrics, or no step is logged yet.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        raise RunReadError(f"{path}: there is no {METRICS_FILE}. Name a run's job.dump_folder")
    lines = read_lines(file)
    records = select_records(lines)
    if not records:
        raise RunReadError(f"{file}: no step is logged")
    folder = file.parent
    settings = _read_settings(folder / SAVED_NAME)
    checkpoints = folder / str(settings.get("checkpoint.folder", "checkpoint"))
    return RunHistory(
        name or folder.resolve().name,
        folder,
        records,
        [line for line in lines if "event" in line],
        settings,
        _read_status(folder / STATUS_FILE),
        list_steps(checkpoints) if checkpoints.is_dir() else [],
    )


def _read_settings(file: Path) -> dict[str, Any]:
    """Return all settings by dotted key; nothing where there is no file, or none that can be read."""
    try:
        tables = tomli.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: leaf.default for key, leaf in get_leaves().items()} | _flatten(tables)


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = get_leaves()
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in leaves:
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = (
                None if value == "none" and key in leaves and not isinstance(leaves[key].default, str) else value
            )
    return flat


def _read_status(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "status" in content else {}
