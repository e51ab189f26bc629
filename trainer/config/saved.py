"""What a run's saved settings say of its model: enough to read its checkpoints elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.config.fields import get_leaves, get_value
from trainer.config.manager import load_config

SAVED_NAME = "config.toml"
_ARGS = "model_args."
# From a checkpoint up: its folder, that of all checkpoints, the run's.
_FOLDERS_ABOVE = 3


@dataclass(frozen=True)
class SavedModel:
    """Settings of a run about its model."""

    name: str
    flavor: str
    seq_len: int
    """Longest sequence of the run, in tokens."""
    attn_mask_type: str
    hf_assets_path: str
    """Tokenizer, as in `model.hf_assets_path`."""
    custom_import: str
    """Module of the user's that registers the model, or empty."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Args of the network that are known apart from its flavor, whose table may have changed since."""


def find_saved_config(checkpoint: Path) -> Path | None:
    """Return the file with the settings that belong to a checkpoint: in its folder, or in that of its run."""
    absolute = checkpoint.absolute()
    folders = [absolute, *absolute.parents][: _FOLDERS_ABOVE + 1]
    return next((folder / SAVED_NAME for folder in folders if (folder / SAVED_NAME).is_file()), None)


def read_saved_model(file: str | Path) -> SavedModel:
    """Read the settings of a run, as it saved them or as it is started with.

    Raises:
        ConfigError: the file cannot be read, or says what is no setting.
    """
    loaded = load_config(["--job.config_file", str(file)])
    if loaded.problems:
        raise ConfigError(loaded.problems)
    return from_settings({key: get_value(loaded.config, key) for key in get_leaves()})


def from_settings(settings: Mapping[str, Any]) -> SavedModel:
    """Return what all settings of a run, by dotted key, say of its model. Checkpoints have them in their manifest."""
    validation_len = settings["validation.seq_len"] if settings["validation.enable"] else 0
    return SavedModel(
        name=settings["model.name"],
        flavor=settings["model.flavor"],
        seq_len=max(settings["training.seq_len"], validation_len),
        attn_mask_type=settings["model.attn_mask_type"],
        hf_assets_path=settings["model.hf_assets_path"],
        custom_import=settings["experimental.custom_import"],
        args={key.removeprefix(_ARGS): value for key, value in settings.items() if key.startswith(_ARGS)},
    )
