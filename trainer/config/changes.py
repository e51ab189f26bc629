"""What differs between the settings of a run and those of the checkpoint that it goes on from, and what that means.

A setting that is not listed here changes the result: so does one that somebody adds and forgets.
"""

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.fields import get_leaves, get_value, show
from trainer.config.schema import JobConfig

HARMLESS = (
    "job.*", "profiling.*", "metrics.*", "checkpoint.*", "comm.*", "memory_estimation.*", "plan.*", "fault_tolerance.*", "validation.*",
    "data.cache_dir", "data.prepare_workers", "data.max_bad_rows", "data.read_retries", "data.read_timeout_seconds",
    "model.print_after_conversion", "training.steps", "training.gc_*", "training.dataloader.*", "training.nonfinite_*",
    "training.spike_*", "quantize.linear.float8.write_scales_file", "quantize.linear.float8.fp8_opt_level",
    "quantize.grouped_mm.float8.measure_freq",
)  # fmt: skip
"""Globs of what leaves the weights alone. The number of steps counts by the schedule that it sets, and a level by its settings."""

ROUNDING = (
    "parallelism.*", "activation_checkpoint.*", "compile.*", "debug.deterministic*", "optimizer.implementation",
    "training.local_batch_size", "training.loss_chunk_size", "training.enable_cpu_offload",
    "quantize.linear.float8.fused_cast", "quantize.linear.float8.force_recompute_fp8_weight_in_bwd",
    "quantize.linear.float8.pad_inner_dim", "quantize.linear.float8.measure_freq",
)  # fmt: skip
"""Globs of what gives the same result up to rounding. (A batch is compared by all its sequences.)"""

CHECKED_ELSEWHERE = (
    "data.*", "training.dataset", "training.dataset_path", "debug.seed", "model.hf_assets_path", "model.tokenizer_path",
)  # fmt: skip
"""Globs of what the data's fingerprint tells better: a path may change, what stands there may not."""

RESULT = "changes the result"
_MEANINGS = (
    (HARMLESS, "harmless"),
    (ROUNDING, "the same up to rounding"),
    (CHECKED_ELSEWHERE, "the fingerprint of the data decides"),
)

MODEL_ARGS = "model_args."
"""Prefix of the sizes of the network, which are kept beside the settings: the table of flavors may change."""
_DERIVED_ARGS = ("max_seq_len", "attn_mask_type")

OF_A_HOST = (
    "job.*", "profiling.*", "*_path", "data.sources", "data.cache_dir", "data.prepare_workers", "checkpoint.folder", "comm.save_traces_*",
    "metrics.enable_*", "metrics.save_*", "metrics.disable_*", "metrics.progress_bar", "training.gc_debug",
)  # fmt: skip
"""Globs of what may differ from host to host in one run: places, and what is shown. (The data are compared by their fingerprint.)"""

# A part that is not loaded begins afresh: what was set for it before means nothing then.
_KEYS_OF_PART = {
    "optimizer": ("optimizer.*",),
    "lr_scheduler": ("lr_scheduler.*",),
    "model": ("model.*", "model_args.*"),
    "float8": ("model.converters", "quantize.linear.float8.*"),
}


@dataclass(frozen=True)
class Change:
    """A setting with another value than in the checkpoint."""

    key: str
    before: Any
    now: Any
    meaning: str
    """What it does to the run; `RESULT` if the result is another."""

    def __str__(self) -> str:
        return f"{self.key}: {show(self.before)} -> {show(self.now)} ({self.meaning})"


def describe_settings(config: JobConfig, model_args: Any, *, global_batch_size: int) -> dict[str, Any]:
    """Return all settings by dotted key, as JSON holds them, with the sizes of the network beside them.

    model_args: of the network; a dataclass, or nothing is known of it. global_batch_size: sequences of a step, as resolved.
    """
    settings = {key: _to_plain(get_value(config, key)) for key in get_leaves()}
    settings["training.global_batch_size"] = global_batch_size
    if dataclasses.is_dataclass(model_args) and not isinstance(model_args, type):
        args = {name: value for name, value in dataclasses.asdict(model_args).items() if name not in _DERIVED_ARGS}
        settings |= {MODEL_ARGS + name: _to_plain(value) for name, value in args.items()}
    return settings


def describe_sections(config: JobConfig) -> dict[str, str]:
    """Return what all ranks of a run must have alike, as text, by `[section]`: one that clips or decays in another way than the others
    would spoil the weights in silence, one that logs or validates at other steps would leave them waiting.
    """
    sections: dict[str, list[str]] = {}
    for key in get_leaves():
        if not _matches(key, OF_A_HOST):
            sections.setdefault(f"[{key.partition('.')[0]}]", []).append(f"{key} = {get_value(config, key)!r}")
    return {name: "\n".join(lines) for name, lines in sections.items()}


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what differs, in the order of the schema. A setting that the older program did not have had its default."""
    leaves = get_leaves()
    changes = []
    for key, value in now.items():
        default = _to_plain(leaves[key].default) if key in leaves else None
        old = before.get(key, default)
        if old != value and key != _SPAN:
            changes.append(Change(key, old, value, _get_meaning(key)))
    return changes + _find_change_of_span(before, now)


def find_refused(changes: Sequence[Change], *, allowed: Collection[str], excluded: Collection[str]) -> list[Change]:
    """Return the changes of the result that nobody said were meant.

    allowed: globs of keys (`checkpoint.allow_config_change`). excluded: parts of the checkpoint that are not loaded.
    """
    meant = [*allowed, *(glob for part in excluded for glob in _KEYS_OF_PART.get(part, ()))]
    return [change for change in changes if change.meaning == RESULT and not _matches(change.key, meant)]


_SPAN = "lr_scheduler.total_steps"


def _find_change_of_span(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The schedule spans `lr_scheduler.total_steps`, or else `training.steps`."""
    old, new = (int(settings.get(_SPAN) or settings.get("training.steps") or 0) for settings in (before, now))
    if old == new or not old:
        return []
    if before.get(_SPAN) is None and now.get(_SPAN) is None and new > old:
        return [Change(_SPAN, None, None, f"unset: the schedule is laid out anew, over {new} steps and not {old}")]
    return [Change(_SPAN, old, new, RESULT)]


def _get_meaning(key: str) -> str:
    return next((meaning for globs, meaning in _MEANINGS if _matches(key, globs)), RESULT)


def _matches(key: str, globs: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, glob) for glob in globs)


def _to_plain(value: Any) -> Any:
    """Return a value of the schema as JSON gives it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
