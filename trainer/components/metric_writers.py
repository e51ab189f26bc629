"""Where metrics go: a JSONL file, TensorBoard, Weights & Biases. And how the JSONL file is read again.

A writer takes flat records, `{"step": 10, "loss": 4.2, ...}`. The JSONL file has two kinds of line: a record of a logged
step, and an event, `{"event": "checkpoint", "step": 500, ...}`. A resumed run goes on in the same file after an event
"resume"; `read_metrics` then leaves out the records of steps that were trained again.
"""

import importlib.util
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.config.errors import UserError
from trainer.config.schema import MetricsConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# W&B: what a variable sets, and the argument of wandb.init() that receives it. The first variable that is set counts.
_WANDB_VARIABLES = {
    "project": ("WANDB_PROJECT",),
    "entity": ("WANDB_TEAM", "WANDB_ENTITY"),
    "name": ("WANDB_RUN_NAME", "WANDB_NAME"),
    "id": ("WANDB_RUN_ID",),
    "group": ("WANDB_RUN_GROUP",),
    "notes": ("WANDB_RUN_NOTES", "WANDB_NOTES"),
    "job_type": ("WANDB_RUN_JOB_TYPE", "WANDB_JOB_TYPE"),
}
WANDB_NAMES = tuple(name for names in _WANDB_VARIABLES.values() for name in names)
"""All variables that count here. None holds a secret."""


class MetricWriter(Protocol):
    """Takes what is logged."""

    def write_step(self, record: Mapping[str, Any]) -> None:
        """Write the record of a logged step."""

    def write_event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Write that something happened after `step`."""

    def close(self) -> None:
        """Write what is still held back."""


def to_json_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Make a record valid JSON: numbers that are not finite become null, and `nonfinite` says what they were.

    Inside lists and dicts such a number becomes its name as a string. A value that JSON does not know becomes a string.
    """
    out = {key: _to_json(value) for key, value in record.items()}
    lost = {key: out[key] for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    if lost:
        out.update(dict.fromkeys(lost))
        out["nonfinite"] = lost
    return out


def _to_json(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    return value if value is None or isinstance(value, str | int) else str(value)


class JsonlWriter:
    """One JSON object on each line, on disk as soon as it is written.

    A file that cannot be written to (a full disk) costs the run its metrics, not its life: one warning, and it goes on.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        self._lead = "\n" if _ends_within_line(self.path) else ""
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 open for as long as the run
        self._broken = False

    def write_step(self, record: Mapping[str, Any]) -> None:
        self._put(to_json_values(record))

    def write_event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        self._put(to_json_values({"event": kind, "step": step, "time": time.time(), **fields}))

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()

    def _put(self, line: Mapping[str, Any]) -> None:
        if self._broken:
            return
        try:
            self._file.write(f"{self._lead}{json.dumps(line, allow_nan=False)}\n")
            self._file.flush()
            self._lead = ""
        except OSError as error:
            self._broken = True
            logger.warning("%s: %s. The run goes on; nothing more is written to this file.", self.path, error)


def _ends_within_line(path: Path) -> bool:
    """Whether the last line lacks its end: a run was killed while it wrote."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of logged steps in `path`, oldest first, each step once.

    Records after the step from which a run was resumed are those of the resumed run. A line torn by a kill is left out.
    """
    return select_records(read_lines(path))


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return all records and events in `path` but lines that are torn, or not yet written to their end."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "step" in entry:
                lines.append(entry)
    return lines


def select_records(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records among lines in the order of a file: each step once, as it was trained last."""
    records: list[dict[str, Any]] = []
    for entry in lines:
        if "event" not in entry:
            records.append(entry)
        elif entry["event"] == "resume":
            records = [record for record in records if record["step"] <= entry["step"]]
    return records


class TensorBoardWriter:
    """Curves of all numbers: a key such as `validation/loss` keeps its group, others go to `train/`.

    Args:
        folder: where the event files go.
        step: steps already done. Points of an earlier run beyond it disappear from the curves.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "metrics.enable_tensorboard = true: the package tensorboard is not installed. "
                "Install it, or set metrics.enable_tensorboard = false"
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write_step(self, record: Mapping[str, Any]) -> None:
        self._write(record, record["step"], group="train")

    def write_event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        self._write(fields, step, group=kind)

    def _write(self, values: Mapping[str, Any], step: int, *, group: str) -> None:
        for key, value in _get_numbers(values).items():
            self._writer.add_scalar(key if "/" in key else f"{group}/{key}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases, with the names that torchtitan gives its environment variables.

    Args:
        folder: where W&B keeps its local files.
        variables: the WANDB_* variables of the environment.
        run_config: the resolved configuration, shown beside the run.
    """

    def __init__(self, folder: Path, *, variables: Mapping[str, str], run_config: Mapping[str, Any] | None) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "metrics.enable_wandb = true: the package wandb is not installed. "
                "Install it (pip install wandb), or set metrics.enable_wandb = false"
            )
        import wandb

        settings: dict[str, Any] = {"project": "bloomery"}
        for argument, names in _WANDB_VARIABLES.items():
            found = [variables[name] for name in names if variables.get(name)]
            settings.update({argument: found[0]} if found else {})
        if "id" in settings:
            settings["resume"] = "allow"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder), config=dict(run_config or {}), **settings)

    def write_step(self, record: Mapping[str, Any]) -> None:
        self._run.log(_get_numbers(record), step=record["step"])

    def write_event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        numbers = _get_numbers(fields)
        if numbers:
            self._run.log({f"{kind}/{key}": value for key, value in numbers.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _get_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "time")
    }


def build_writers(
    *,
    section: MetricsConfig,
    dump_folder: Path,
    rank: int,
    step: int,
    wandb_variables: Mapping[str, str],
    run_config: Mapping[str, Any] | None,
) -> list[MetricWriter]:
    """Return the writers of this rank: none, unless it is the first or `save_for_all_ranks` is set.

    Rank 0 writes into `dump_folder` itself, any other into `dump_folder/rank_N`. Only rank 0 has a W&B run.
    """
    if rank and not section.save_for_all_ranks:
        return []
    folder = dump_folder / f"rank_{rank}" if rank else dump_folder
    writers: list[MetricWriter] = [JsonlWriter(folder)]
    if section.enable_tensorboard:
        writers.append(TensorBoardWriter(folder / section.save_tb_folder, step=step))
    if section.enable_wandb and not rank:
        writers.append(WandbWriter(folder, variables=wandb_variables, run_config=run_config))
    return writers
