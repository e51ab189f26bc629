"""What a run's saved settings say of its model: enough to read its checkpoints elsewhere."""

from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import ConfigError
from trainer.config.manager import load_config

SAVED_NAME = "config.toml"
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
    config = loaded.config
    validation_len = config.validation.seq_len if config.validation.enable else 0
    return SavedModel(
        name=config.model.name,
        flavor=config.model.flavor,
        seq_len=max(config.training.seq_len, validation_len),
        attn_mask_type=config.model.attn_mask_type,
        hf_assets_path=config.model.hf_assets_path,
        custom_import=config.experimental.custom_import,
    )
