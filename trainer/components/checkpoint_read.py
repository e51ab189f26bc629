"""Choosing a checkpoint and reading it into the states of a run. All reading of checkpoints is here."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_ranks import Ranks
from trainer.components.checkpoint_state import select_plain
from trainer.config.fields import suggest
from trainer.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)

MODEL = "model"
RNG = "rng"


@dataclass(frozen=True)
class Source:
    """A checkpoint to read, as rank 0 decided."""

    path: Path
    step: int
    """Step to go on from."""
    names: tuple[str, ...]
    """States to read."""


class CheckpointReader:
    """Reads checkpoints into `states` (name -> object with `state_dict` and `load_state_dict`, in the order of loading)."""

    def __init__(self, states: Mapping[str, Any], *, section: CheckpointConfig, folder: Path, ranks: Ranks) -> None:
        """Raises ValueError if `exclude_from_loading` names a state that there is not."""
        self._states = states
        self._section = section
        self._folder = folder
        self._ranks = ranks
        for name in section.exclude_from_loading:
            if name not in states:
                raise ValueError(
                    f"checkpoint.exclude_from_loading: there is no state {name!r}.{suggest(name, states)} There are "
                    f"{', '.join(states)}"
                )

    def load(self, step: int) -> int | None:
        """Load as `CheckpointManager.load` says; step -1 takes the newest. Collective."""
        started = time.perf_counter()
        choose = (lambda: self._choose(step)) if self._ranks.rank == 0 else None
        source: Source | None = self._ranks.together("choose a checkpoint", choose)[0]
        if source is None:
            return None
        plans: list[_Plan] = []
        self._ranks.together(f"read {source.path}", lambda: plans.append(self._plan(source)))
        self._check_surplus(source, plans[0])
        self._ranks.together(f"read {source.path}", lambda: self._fill(plans[0]))
        if self._ranks.rank == 0:
            logger.info(
                "Loaded %s of %s in %.1f s; the run goes on from step %d.",
                ", ".join(source.names), source.path, time.perf_counter() - started, source.step,
            )  # fmt: skip
        return source.step

    # What to read: on rank 0 alone.

    def _choose(self, step: int) -> Source | None:
        section = self._section
        steps = files.list_steps(self._folder) if section.enable else []
        if section.enable and step >= 0:
            if step not in steps:
                raise ValueError(
                    f"checkpoint.load_step = {step}: there is no whole checkpoint of that step in {self._folder}; "
                    f"{_describe_steps(steps)}"
                )
            newer = [str(other) for other in steps if other > step]
            if newer:
                logger.warning(
                    "%s also holds later checkpoints (%s). Without checkpoint.load_step a later start goes on from the newest: "
                    "move them away, or give this run a folder of its own.", self._folder, ", ".join(newer),
                )  # fmt: skip
            return self._source(files.step_path(self._folder, step), step)
        source = self._choose_newest(steps)
        if source is None:
            return self._choose_initial()
        if section.initial_load_path:
            logger.info("checkpoint.initial_load_path is not used: %s holds checkpoints of this run.", self._folder)
        return source

    def _choose_newest(self, steps: Sequence[int]) -> Source | None:
        """Return the newest checkpoint that has all states of the run, None if the folder holds no checkpoint at all."""
        refusal: ValueError | None = None
        for step in reversed(steps):
            try:
                return self._source(files.step_path(self._folder, step), step)
            except ValueError as error:
                logger.warning("Passing over %s: %s", files.step_path(self._folder, step), error)
                refusal = refusal or error
        if refusal is not None:
            raise ValueError(f"no checkpoint in {self._folder} can be resumed from; the newest: {refusal}")
        return None

    def _choose_initial(self) -> Source | None:
        path_name = self._section.initial_load_path
        if not path_name:
            return None
        path = Path(path_name)
        if not (path / files.TENSOR_INDEX_NAME).is_file():
            steps = files.list_steps(path)
            inside = f"; it holds the checkpoints {', '.join(f'step-{s}' for s in steps)}: name one" if steps else ""
            raise ValueError(
                f"checkpoint.initial_load_path = {path_name}: there is no checkpoint here (no "
                f"{files.TENSOR_INDEX_NAME}){inside}"
            )
        if self._section.initial_load_model_only:
            return Source(path, 0, (MODEL,))
        manifest = files.read_manifest(path)
        if "step" not in manifest:
            raise ValueError(
                f"checkpoint.initial_load_path = {path_name} has no {files.MANIFEST_NAME}: another program wrote it, and only "
                "its weights can be loaded. Set checkpoint.initial_load_model_only = true"
            )
        return self._source(path, int(manifest["step"]))

    def _source(self, path: Path, step: int) -> Source:
        """Return what to read of a checkpoint of ours.

        Raises:
            ValueError: it lacks states that the run needs.
        """
        manifest = files.read_manifest(path)
        held = {*manifest.get("tensors", ()), *manifest.get("plain", ())}
        if step == 0 and held == {MODEL}:
            return Source(path, 0, (MODEL,))  # a seed: weights to begin from
        wanted = [name for name in self._states if name not in self._section.exclude_from_loading]
        lacking = [name for name in wanted if name not in held]
        if lacking:
            raise ValueError(
                f"{path} holds {', '.join(sorted(held)) or 'nothing'}, but not {', '.join(lacking)}. A checkpoint of the weights "
                "alone (checkpoint.last_save_model_only) can be begun from with checkpoint.initial_load_path; to start "
                f"the missing parts afresh set checkpoint.exclude_from_loading = {lacking}"
            )
        if RNG in wanted and manifest.get("world_size") != self._ranks.world_size:
            logger.warning(
                "The random number generators start afresh: %s was saved by %s processes, and there are %d.",
                path, manifest.get("world_size"), self._ranks.world_size,
            )  # fmt: skip
            wanted.remove(RNG)
        return Source(path, step, tuple(wanted))

    # Reading: on all ranks.

    def _plan(self, source: Source) -> "_Plan":
        """Lay out where each tensor goes, and check that the checkpoint has it in the right shape.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        manifest = files.read_manifest(source.path)
        metadata = dcp.FileSystemReader(source.path).read_metadata()
        stored = metadata.state_dict_metadata
        plain = {
            name: select_plain(manifest["plain"][name], name, self._ranks.rank, self._ranks.world_size)
            for name in source.names
            if name in manifest.get("plain", {})
        }
        tensors = {name: self._states[name].state_dict() for name in source.names if name not in plain}
        # Generators that the saving process had not, such as that of a GPU, cannot be restored.
        tensors = {
            name: {key: value for key, value in state.items() if name != RNG or f"{RNG}.{key}" in stored}
            for name, state in tensors.items()
        }
        # torchtitan's checkpoints hold the weights without a prefix.
        prefixed = any(key.startswith(f"{MODEL}.") for key in stored)
        content = tensors if prefixed or tuple(tensors) != (MODEL,) else dict(tensors[MODEL])
        keys = flatten_state_dict(content)[0]
        _check_fit(source.path, keys, metadata)
        return _Plan(source.path, content, tensors, plain, frozenset(keys), metadata)

    def _check_surplus(self, source: Source, plan: "_Plan") -> None:
        """Refuse weights that no rank has a place for: they would be dropped without a word. Collective.

        Raises:
            ValueError: there are some.
        """
        stored = sorted(plan.metadata.state_dict_metadata)
        taken = torch.tensor([key in plan.keys for key in stored], dtype=torch.uint8)
        if self._ranks.group is not None:
            dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self._ranks.group)
        left = [key for key, used in zip(stored, taken.tolist(), strict=True) if not used]
        prefixes = tuple(f"{name}." for name in source.names if name != RNG)
        weights = [key for key in left if key.startswith(f"{MODEL}.")] if MODEL in source.names else []
        if weights:
            raise ValueError(f"{source.path} does not fit the model: it holds {_count(weights)} that the model has not")
        others = [key for key in left if key.startswith(prefixes)]
        if others and self._ranks.rank == 0:
            logger.warning("Not used of %s, because this run has no place for it: %s", source.path, _count(others))

    def _fill(self, plan: "_Plan") -> None:
        """Read the tensors into their places and hand every state its part, the generators last."""
        if plan.content:
            reader = dcp.FileSystemReader(plan.path)
            dcp.load(plan.content, storage_reader=reader, process_group=self._ranks.group)
        if plan.content is not plan.tensors and MODEL in plan.tensors:
            plan.tensors[MODEL] = plan.content  # values that are not tensors were replaced in it
        for name in self._states:
            if name in plan.tensors:
                self._states[name].load_state_dict(plan.tensors[name])
            elif name in plan.plain:
                self._states[name].load_state_dict(plan.plain[name])


@dataclass(frozen=True)
class _Plan:
    path: Path
    content: dict[str, Any]
    """What DCP reads into: the live tensors, under the names that the checkpoint uses."""
    tensors: dict[str, dict[str, Any]]
    """The same, by state."""
    plain: dict[str, Any]
    """Plain values, by state."""
    keys: frozenset[str]
    """Flat names of all that DCP reads on this rank."""
    metadata: Metadata


def _check_fit(path: Path, wanted: Mapping[str, Any], metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata
    missing = sorted(key for key in wanted if key not in stored)
    misshapen, recast = [], []
    for key, value in wanted.items():
        entry = stored.get(key)
        if isinstance(value, Tensor) and isinstance(entry, TensorStorageMetadata):
            if tuple(entry.size) != tuple(value.shape):
                misshapen.append(f"{key} ({tuple(entry.size)} there, {tuple(value.shape)} here)")
            elif entry.properties.dtype != value.dtype:
                recast.append(f"{key} ({entry.properties.dtype} to {value.dtype})")
    problems = []
    if missing:
        problems.append(f"it lacks {_count(missing)}")
    if misshapen:
        problems.append(f"shapes differ: {_count(misshapen)}")
    if problems:
        raise ValueError(
            f"{path} does not fit this run: {'; '.join(problems)}. Use the model and optimizer that it was saved with, or leave "
            "parts out with checkpoint.exclude_from_loading"
        )
    if recast:
        logger.warning("%s: dtypes are converted: %s", path, _count(recast), extra={"same_on_all_ranks": True})


def _count(items: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def _describe_steps(steps: Sequence[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "there is none at all"
