"""Settings of the schema that this version cannot honour: refused where they would change the result, else warned about.

Whoever adds a feature deletes its lines here.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trainer.config.errors import Problem
from trainer.config.fields import get_leaves, get_value, show
from trainer.config.schema import JobConfig
from trainer.config.schema_quantize import FLOAT8_CONVERTERS, FLOAT8_EXPERTS_CONVERTER


class Refusal(NamedTuple):
    """A setting, which of its values cannot be honoured, and what to do instead."""

    key: str
    applies: Callable[[Any], bool]
    reason: str


_USE_CUSTOM_IMPORT = (
    "a user's config class cannot be merged. Register code of your own with experimental.custom_import."
)

REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "model.converters",
        lambda names: bool(set(names) - FLOAT8_CONVERTERS - {FLOAT8_EXPERTS_CONVERTER}),
        "there are quantize.linear.float8 (or float8, for short) and quantize.grouped_mm.float8, for experts; MX formats are not "
        "available. Name one or both of these, or use [] to train in bfloat16.",
    ),
    Refusal("fault_tolerance.enable", bool, "TorchFT is not supported. Use checkpoint.enable, and restart."),
    Refusal(
        "memory_estimation.enable",
        bool,
        "plan with job.plan in its place: it says what memory will hold, and how fast a step should be.",
    ),
    Refusal(
        "comm.mode", lambda mode: mode != "default", "dry-run modes are not available. Use default on one process."
    ),
    Refusal(
        "optimizer.early_step_in_backward",
        bool,
        "an update inside the backward pass would turn gradient clipping off. Use false.",
    ),
    # The settings that torchtitan's module of SimpleFSDP adds are there.
    Refusal(
        "job.custom_config_module",
        lambda name: name not in ("", "torchtitan.experiments.simple_fsdp.job_config"),
        _USE_CUSTOM_IMPORT,
    ),
    Refusal("experimental.custom_args_module", bool, _USE_CUSTOM_IMPORT),
    Refusal(
        "checkpoint.initial_load_in_hf_quantized",
        bool,
        "quantized Hugging Face weights cannot be read. Convert them to bfloat16 first, and use checkpoint.initial_load_in_hf.",
    ),
)

WITHOUT_EFFECT: dict[str, str] = {
    "checkpoint.enable_ft_dataloader_checkpoints": "there are no TorchFT replicas; every checkpoint has the data position.",
    "training.dataloader.persistent_workers": "workers are threads, which live as long as the loader.",
    "validation.dataloader.persistent_workers": "workers are threads, which live as long as the loader.",
    "model.print_after_conversion": "what is converted, and what not, is always in the log.",
    "memory_estimation.disable_fake_mode": "job.plan estimates memory, on fake tensors.",
}
"""Settings that change nothing, so that a value other than the default gets a warning with this reason."""

SILENT: frozenset[str] = frozenset(
    key
    for key in get_leaves()
    if key.startswith(("quantize.linear.mx.", "quantize.grouped_mm.mx.", "fault_tolerance."))
    and key != "fault_tolerance.enable"
)
"""Settings of features that another key switches on and that is refused: alone, they change nothing anywhere."""


def find_refusals(config: JobConfig) -> Iterator[Problem]:
    """Settings that ask for what this version does not have."""
    for refusal in REFUSED:
        value = get_value(config, refusal.key)
        if refusal.applies(value):
            yield Problem(f"{refusal.key} = {show(value)}: {refusal.reason}", (refusal.key,))


def find_settings_without_effect(config: JobConfig) -> Iterator[Problem]:
    """Settings away from their default that change nothing."""
    for key, reason in WITHOUT_EFFECT.items():
        value = get_value(config, key)
        if value != get_leaves()[key].default:
            yield Problem(f"{key} = {show(value)} has no effect: {reason}", (key,))
