"""A network that is not built: its family, its args, and what follows for its tensors."""

import dataclasses
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from models.hf_config import find_family
from models.hf_layout import HuggingFaceAdapter
from models.registry import ModelSpec, get_model_spec
from trainer.components.checkpoint_files import read_manifest
from trainer.components.checkpoint_state import ModelState
from trainer.components.hf_files import CONFIG_NAME, HFFolder, read_json
from trainer.components.native_weights import NativeWeights
from trainer.config.saved import SavedModel, find_saved_config, from_settings, read_saved_model


@dataclasses.dataclass(frozen=True)
class Network:
    """One size of a family."""

    spec: ModelSpec
    args: Any

    @classmethod
    def from_hf(cls, folder: HFFolder, *, with_predictions: bool = True) -> "Network":
        """Return the network that a folder's config.json describes.

        with_predictions: with the blocks of multi-token prediction that the files hold.

        Raises:
            ValueError: there is no config.json, or it describes none of the networks here.
        """
        if not folder.config:
            raise ValueError(f"{folder.path} has no config.json, so that nothing tells the network")
        return cls._from_hf_config(folder.config, folder.path, folder.tensors.keys() if with_predictions else ())

    @classmethod
    def _from_hf_config(cls, config: Mapping[str, Any], path: Path, names: Collection[str]) -> "Network":
        spec = find_family(config)
        try:
            return cls(spec, spec.load_adapter_class().args_from_hf(config, names))
        except KeyError as error:
            raise ValueError(f"{path / CONFIG_NAME} lacks {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_native(cls, weights: NativeWeights, config_file: str | None = None) -> "Network":
        """Return the network of a checkpoint of this program; see `find_saved_model`.

        Raises:
            ValueError: nothing tells the network.
        """
        saved = find_saved_model(weights.path, config_file)
        if saved is not None:
            return cls.from_saved(saved)
        beside = weights.path / CONFIG_NAME
        if beside.is_file():
            return cls._from_hf_config(read_json(beside), weights.path, weights.shapes.keys())
        raise ValueError(
            f"{weights.path}: nothing here tells the network. Name the settings of its run with --config (config.toml in its "
            "job.dump_folder, or the file that it was started with)"
        )

    @classmethod
    def from_saved(cls, saved: SavedModel) -> "Network":
        """Return the network of a run. What its `custom_import` registers must be registered already.

        Raises:
            ValueError: no such model or flavor.
        """
        try:
            spec = get_model_spec(saved.name)
            args = spec.get_args(saved.flavor)
        except ValueError as error:
            if not saved.custom_import:
                raise
            raise ValueError(
                f"{error}. The run's own module was {saved.custom_import}: give --import {saved.custom_import}"
            ) from error
        # A key that the family's args do not have was refused when the run began.
        args = dataclasses.replace(
            args, max_seq_len=saved.seq_len, attn_mask_type=saved.attn_mask_type, **saved.changes
        )
        here = dataclasses.asdict(args)
        for name, value in saved.args.items():
            if name in here and here[name] != value:
                raise ValueError(
                    f"model.flavor = {saved.flavor} of {saved.name} has {name} = {here[name]} now, but the checkpoint was made "
                    f"with {value}"
                )
        return cls(spec, args)

    @cached_property
    def adapter(self) -> HuggingFaceAdapter:
        """The way to and from Hugging Face.

        Raises:
            ValueError: the family has none.
        """
        if not self.spec.adapter_class:
            raise ValueError(
                f"model.name = {self.spec.name}: this family has no way to and from Hugging Face files. Name an adapter in "
                "ModelSpec.adapter_class (docs/extending.md)"
            )
        return self.spec.load_adapter_class()(self.args)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of a checkpoint, by name, a shared one once."""
        return {name: tuple(x.shape) for name, x in ModelState(self.build_meta()).state_dict().items()}

    def build_meta(self) -> torch.nn.Module:
        """Build the network without memory."""
        with torch.device("meta"):
            return self.spec.load_model_class()(self.args)


def find_saved_model(checkpoint: Path, config_file: str | None = None) -> SavedModel | None:
    """Return what is known of a checkpoint's model from its run, None if it was converted from Hugging Face or nothing is known.

    config_file: settings of the run, in place of those that the checkpoint itself has, or the folder of its run

    Raises:
        ValueError: the settings cannot be read.
    """
    if config_file is not None:
        return read_saved_model(config_file)
    settings = read_manifest(checkpoint).get("config")
    if settings:
        return from_settings(settings)
    if (checkpoint / CONFIG_NAME).is_file():
        return None
    file = find_saved_config(checkpoint)
    return None if file is None else read_saved_model(file)
