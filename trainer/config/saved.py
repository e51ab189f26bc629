"""What a run's saved settings say of its model: enough to read its checkpoints elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.config.fields import get_leaves, get_value
from trainer.config.manager import load_config
from trainer.config.schema_training import ModelConfig

SAVED_NAME = "config.toml"
_MODEL, _ARGS = "model.", "model_args."
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
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Args of the network that the run set itself, in place of its flavor's."""
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


def _get_model(settings: Mapping[str, Any]) -> ModelConfig:
    values = {key.removeprefix(_MODEL): value for key, value in settings.items() if key.startswith(_MODEL)}
    known = {leaf.name for leaf in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in values.items() if name in known})


def from_settings(settings: Mapping[str, Any]) -> SavedModel:
    """Return what all settings of a run, by dotted key, say of its model. Checkpoints have them in their manifest."""
    validation_len = settings["validation.seq_len"] if settings["validation.enable"] else 0
    model = _get_model(settings)
    return SavedModel(
        name=model.name,
        flavor=model.flavor,
        seq_len=max(settings["training.seq_len"], validation_len),
        attn_mask_type=model.attn_mask_type,
        hf_assets_path=model.hf_assets_path,
        custom_import=settings["experimental.custom_import"],
        changes=model.get_changes(),
        args={key.removeprefix(_ARGS): value for key, value in settings.items() if key.startswith(_ARGS)},
    )
