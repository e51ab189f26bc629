"""Hugging Face files at both ends of a run: weights to begin from, and the last save. For any mesh, by all ranks together."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from models.registry import get_model_spec
from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_ranks import Ranks
from trainer.components.checkpoint_state import MODEL
from trainer.components.durable_files import sync_folder
from trainer.components.hf_export import Export, describe_network, write_description, write_weights
from trainer.components.hf_files import CONFIG_NAME, HFFolder
from trainer.components.hf_load import load_hf_weights
from trainer.components.native_weights import NativeWeights
from trainer.components.network import Network
from trainer.components.tokenizer import Tokenizer
from trainer.config.schema import CheckpointConfig
from trainer.config.schema_training import ModelConfig

logger = logging.getLogger(__name__)

# Shards as the ranks have them, inside of the folder that is being written. Gone when it is whole.
_SHARDS_NAME = "shards"


class HuggingFaceFiles:
    """Loads a run's model from a Hugging Face folder, and saves it as one.

    folder: where the checkpoints of the run are kept. initial_path: the folder to begin from. dtype: of the weights that are saved.
    """

    LAST_NAME = CONFIG_NAME
    """Of a copy this file comes last: without it nothing can be loaded."""

    def __init__(self, network: Network, *, folder: Path, initial_path: Path, dtype: str, tokenizer: Tokenizer) -> None:
        self._network = network
        self._folder = folder
        self._initial_path = initial_path
        self._dtype = dtype
        self._tokenizer = tokenizer

    def load(self, state: Any, ranks: Ranks) -> None:
        """Fill the model, each rank its part. Collective.

        state: the model's, whose `state_dict` holds the live tensors

        Raises:
            ValueError: the folder does not fit the model.
            RuntimeError: reading failed.
        """
        started = time.perf_counter()

        def read() -> None:
            network = self._network
            load_hf_weights(
                HFFolder(self._initial_path), state.state_dict(), adapter=network.adapter, args=network.args
            )

        ranks.together(f"read {self._initial_path}", read)
        if ranks.rank == 0:
            seconds = time.perf_counter() - started
            logger.info("Loaded the weights of %s in %.1f s; the run begins at step 0.", self._initial_path, seconds)

    def save(self, state: Any, step: int, ranks: Ranks, *, prepare: Callable[[int], object]) -> None:
        """Write the model as `step-<step>`, whole or not at all. Collective.

        prepare: makes, on rank 0, the folder to write a step into.

        Ranks first write the shards that they hold, which on a GPU takes a copy of them in host memory, then share the files of the
        export among them, a tensor at a time. No weight passes between ranks. For a while both stand on the disk.

        Raises:
            ValueError, RuntimeError: it failed, on all ranks, and nothing is left of it.
        """
        started = time.perf_counter()
        folder = self._folder
        staging, final = files.staging_path(folder, step), files.step_path(folder, step)
        shards = staging / _SHARDS_NAME
        export = Export(self._network, self._dtype)

        def write_shards() -> None:
            writer = dcp.FileSystemWriter(shards, sync_files=False)
            dcp.save({MODEL: state.state_dict()}, storage_writer=writer, process_group=ranks.group)

        def write_files() -> int:
            return write_weights(export, NativeWeights(shards), staging, rank=ranks.rank, world_size=ranks.world_size)

        def finish() -> None:
            shutil.rmtree(shards)
            write_description(export, staging, dtype=self._dtype, tokenizer=self._tokenizer)
            _commit(staging, final)

        try:
            ranks.together(f"make a folder for step-{step}", _on_rank_0(ranks, lambda: prepare(step)))
            ranks.together(f"write the shards of step-{step}", write_shards)
            size = ranks.together(f"write step-{step} as Hugging Face files", write_files)[0]
            ranks.together(f"finish step-{step}", _on_rank_0(ranks, finish))
        except (RuntimeError, ValueError) as error:
            if ranks.rank == 0:
                logger.error("CHECKPOINT NOT SAVED: %s", error)
                files.discard_staging(folder, step)
            raise
        if ranks.rank == 0:
            seconds = time.perf_counter() - started
            logger.info(
                "Saved %s as Hugging Face files (%s): %.2f GiB in %.1f s.", final, self._dtype, size / 2**30, seconds
            )


def build_hugging_face(
    section: CheckpointConfig, *, model: ModelConfig, args: Any, folder: Path, tokenizer: Tokenizer
) -> HuggingFaceFiles | None:
    """Return what the settings ask for, None if nothing.

    Weights are looked for in `model.hf_assets_path` where no `initial_load_path` names them, as torchtitan does. args: of the
    network. folder: where the checkpoints of the run are kept

    Raises:
        ValueError: the family has no way to Hugging Face, or transformers no such network.
    """
    if not (section.initial_load_in_hf or section.last_save_in_hf):
        return None
    network, dtype = Network(get_model_spec(model.name), args), section.export_dtype
    if section.last_save_in_hf:
        describe_network(network, dtype=dtype, tokenizer=tokenizer)  # better now than at the end
    initial_path = Path(section.initial_load_path or model.hf_assets_path)
    assert network.adapter is not None, "an adapter is there or an error is raised"
    return HuggingFaceFiles(network, folder=folder, initial_path=initial_path, dtype=dtype, tokenizer=tokenizer)


def _commit(staging: Path, final: Path) -> None:
    """Give a complete folder its name, in place of one that has it. Killed at any point, one stays whole."""
    sync_folder(staging)
    aside = final.with_name(f".{final.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        logger.warning("%s exists and is replaced.", final)
        final.rename(aside)
    staging.rename(final)
    sync_folder(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _on_rank_0(ranks: Ranks, work: Callable[[], object]) -> Callable[[], None] | None:
    """Return the work without its result on rank 0, None elsewhere."""

    def run() -> None:
        work()

    return run if ranks.rank == 0 else None
