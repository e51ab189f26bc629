"""Reading a checkpoint into the states of a run, once its files have been verified. All reading of checkpoints is here."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_checksums import MISSING, find_damage, share_files
from trainer.components.checkpoint_choice import CheckpointChooser, Source
from trainer.components.checkpoint_ranks import Ranks
from trainer.components.checkpoint_remote import RemoteCheckpoint, RemoteFolder
from trainer.components.checkpoint_state import MODEL, RNG, select_plain
from trainer.components.checkpoint_unpickle import SafeLoadPlanner, SafeReader
from trainer.config.changes import find_changes, find_refused
from trainer.config.errors import UserError
from trainer.config.fields import suggest
from trainer.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)


class CheckpointReader:
    """Reads checkpoints into `states` (name -> object with `state_dict` and `load_state_dict`, in the order of loading)."""

    def __init__(
        self,
        states: Mapping[str, Any],
        *,
        section: CheckpointConfig,
        folder: Path,
        remote: RemoteFolder | None,
        ranks: Ranks,
        settings: Mapping[str, Any],
        is_restart: bool = False,
    ) -> None:
        """Raises ValueError if `exclude_from_loading` names a state that there is not. settings: of the run, by dotted key."""
        self._settings = settings
        self._states = states
        self._section = section
        self._folder = folder
        self._ranks = ranks
        self._chooser = CheckpointChooser(
            states,
            section=section,
            folder=folder,
            remote=remote,
            world_size=ranks.world_size,
            is_restart=is_restart,
        )
        for name in section.exclude_from_loading:
            if name not in states:
                raise UserError(
                    f"checkpoint.exclude_from_loading: there is no state {name!r}.{suggest(name, states)} There are "
                    f"{', '.join(states)}"
                )

    def load(self, step: int) -> int | None:
        """Load as `CheckpointManager.load` says; step -1 takes what the settings say. Collective."""
        started = time.perf_counter()
        source = self._choose_undamaged(step)
        if source is None:
            return None
        verified = time.perf_counter() - started
        plans: list[_Plan] = []
        self._ranks.together(f"read {source.path}", lambda: plans.append(self._plan(source)))
        self._check_surplus(source, plans[0])
        self._ranks.together(f"read {source.path}", lambda: self._fill(plans[0]))
        if self._ranks.rank == 0:
            if source.is_temporary:
                files.discard(source.path)
            logger.info(
                "Loaded %s of %s in %.1f s (%.1f s of it to verify its files); the run goes on from step %d.",
                ", ".join(source.names), source.place, time.perf_counter() - started, verified, source.step,
            )  # fmt: skip
        return source.step

    # What to read.

    def _choose_undamaged(self, step: int) -> Source | None:
        """Return the checkpoint that rank 0 chooses once its files have been found to be in order. Collective.

        Raises:
            ValueError: what was asked for is damaged, or everything is.
        """
        damaged: dict[str, str] = {}
        while True:
            choose = (lambda: self._chooser.choose(step, damaged)) if self._ranks.rank == 0 else None
            source: Source | None = self._ranks.together("choose a checkpoint", choose)[0]
            if source is None:
                return None
            compare = partial(self._compare_settings, source) if self._ranks.rank == 0 else None
            self._ranks.together("compare settings", compare)
            if source.url:
                self._copy(source)
            damage = self._find_damage(source)
            if not damage:
                accept = partial(self._accept, source, damaged) if self._ranks.rank == 0 else None
                return self._ranks.together("accept a checkpoint", accept)[0]
            text = files.describe_damage(damage)
            if source.url and self._ranks.rank == 0:
                files.discard(source.path)
            if not source.replaceable:
                raise UserError(f"{source.place} is damaged: {text}")
            if self._ranks.rank == 0:
                logger.error("CHECKPOINT DAMAGED: %s: %s. Looking for another one to go on from.", source.place, text)
            damaged[source.place] = text

    def _copy(self, source: Source) -> None:
        """Copy a checkpoint from a store to the local folder, each rank its share. Collective.

        Raises:
            RuntimeError: a file could not be copied; one that is not there is left for the verification.
        """
        remote = RemoteCheckpoint(source.url)
        make = (lambda: files.make_empty(source.path) and None) if self._ranks.rank == 0 else None
        self._ranks.together(f"make {source.path}", make)
        if self._ranks.rank == 0:
            logger.info("Copying %s to %s.", source.url, source.path)

        def copy_share() -> None:
            for name in share_files(source.copied, self._ranks.rank, self._ranks.world_size):
                with contextlib.suppress(FileNotFoundError):
                    remote.download([name], source.path)

        self._ranks.together(f"copy {source.url}", copy_share)

    def _accept(self, source: Source, damaged: Mapping[str, str]) -> Source:
        """Give a checkpoint that was copied its place in the folder, and damaged ones another name. On rank 0."""
        if not self._section.load_only:
            for step in files.list_named_steps(self._folder):
                path = files.step_path(self._folder, step)
                if str(path) in damaged:  # it must neither count nor be taken for good later
                    kept = files.set_aside(path, "damaged")
                    logger.warning("%s is kept as %s. Delete it when you have looked at it.", path, kept)
        if not source.url or source.is_temporary:
            return source
        return replace(source, path=files.commit(self._folder, source.step, source.path))

    def _compare_settings(self, source: Source) -> None:
        """Show what differs from the settings of the run that saved a checkpoint. On rank 0.

        Raises:
            ValueError: a difference changes the result, and `allow_config_change` does not name it.
        """
        if not source.settings or not self._settings:
            return
        changes = find_changes(source.settings, self._settings)
        if changes:
            logger.info("Settings that differ from those of %s:\n  %s", source.place, "\n  ".join(map(str, changes)))
        section = self._section
        refused = find_refused(changes, allowed=section.allow_config_change, excluded=section.exclude_from_loading)
        if refused:
            keys = [change.key for change in refused]
            raise UserError(
                f"{source.place} was saved with other settings, and the run would not go on as it was:\n  "
                + "\n  ".join(map(str, refused))
                + f"\nPut them back, or say that it is meant: --checkpoint.allow_config_change {' '.join(keys)}"
            )

    def _find_damage(self, source: Source) -> dict[str, str]:
        """Return what is wrong with the files of a checkpoint, by name. Each file is read by one rank. Collective.

        Raises:
            ValueError: a rank does not see files that the first one sees.
        """
        if not source.sums:
            if self._ranks.rank == 0:
                logger.warning("%s has no checksums: whether its files are damaged is not known.", source.place)
            return {}
        mine = share_files(source.sums, self._ranks.rank, self._ranks.world_size)

        def verify() -> dict[str, str]:
            return find_damage(source.path, {name: source.sums[name] for name in mine})

        by_rank = self._ranks.together(f"verify {source.path}", verify)
        damage = {name: reason for found in by_rank for name, reason in found.items()}
        self._ranks.together(
            f"verify {source.path}", (lambda: _look_twice(source, damage)) if not self._ranks.rank else None
        )
        return damage

    # Reading: on all ranks.

    def _plan(self, source: Source) -> "_Plan":
        """Lay out where each tensor goes, and check that the checkpoint has it in the right shape.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        manifest = files.read_manifest(source.path)
        reader = SafeReader(source.path)
        stored = reader.index.state_dict_metadata
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
        _check_fit(source.path, keys, reader.index)
        return _Plan(reader, content, tensors, plain, frozenset(keys))

    def _check_surplus(self, source: Source, plan: "_Plan") -> None:
        """Refuse weights that no rank has a place for: they would be dropped without a word. Collective.

        Raises:
            ValueError: there are some.
        """
        stored = sorted(plan.reader.index.state_dict_metadata)
        taken = torch.tensor([key in plan.keys for key in stored], dtype=torch.uint8)
        if self._ranks.group is not None:
            dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self._ranks.group)
        left = [key for key, used in zip(stored, taken.tolist(), strict=True) if not used]
        prefixes = tuple(f"{name}." for name in source.names if name != RNG)
        weights = [key for key in left if key.startswith(f"{MODEL}.")] if MODEL in source.names else []
        if weights:
            raise UserError(f"{source.path} does not fit the model: it holds {_count(weights)} that the model has not")
        others = [key for key in left if key.startswith(prefixes)]
        if others and self._ranks.rank == 0:
            logger.warning("Not used of %s, because this run has no place for it: %s", source.path, _count(others))

    def _fill(self, plan: "_Plan") -> None:
        """Read the tensors into their places and hand every state its part, the generators last."""
        if plan.content:
            dcp.load(
                plan.content, storage_reader=plan.reader, planner=SafeLoadPlanner(), process_group=self._ranks.group
            )
        if plan.content is not plan.tensors and MODEL in plan.tensors:
            plan.tensors[MODEL] = plan.content  # values that are not tensors were replaced in it
        for name in self._states:
            if name in plan.tensors:
                self._states[name].load_state_dict(plan.tensors[name])
            elif name in plan.plain:
                self._states[name].load_state_dict(plan.plain[name])


@dataclass(frozen=True)
class _Plan:
    reader: SafeReader
    content: dict[str, Any]
    """What DCP reads into: the live tensors, under the names that the checkpoint uses."""
    tensors: dict[str, dict[str, Any]]
    """The same, by state."""
    plain: dict[str, Any]
    """Plain values, by state."""
    keys: frozenset[str]
    """Flat names of all that DCP reads on this rank."""


def _look_twice(source: Source, damage: Mapping[str, str]) -> None:
    """Tell files that are not there from those that another host does not see, and name those that should not be there."""
    hidden = [name for name, reason in damage.items() if reason == MISSING and (source.path / name).exists()]
    if hidden:
        raise UserError(
            f"{source.path}: not every host sees its files (such as {hidden[0]}): all hosts must see the same folder. Set "
            "job.dump_folder to one on a file system that they share"
        )
    surplus = files.find_surplus(source.path, source.sums)
    if surplus:
        logger.warning("%s holds files that are no part of it, and are not read: %s", source.path, _count(surplus))


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
        raise UserError(
            f"{path} does not fit this run: {'; '.join(problems)}. Use the model and optimizer that it was saved with, or leave "
            "parts out with checkpoint.exclude_from_loading"
        )
    if recast:
        logger.warning("%s: dtypes are converted: %s", path, _count(recast), extra={"same_on_all_ranks": True})


def _count(items: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
