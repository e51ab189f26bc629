"""Which checkpoint a run goes on from, or begins from. Rank 0 alone decides, and tells the others."""

import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_checksums import FileSum
from trainer.components.checkpoint_remote import RemoteCheckpoint, RemoteFolder, is_url
from trainer.components.checkpoint_state import MODEL, RNG
from trainer.config.errors import UserError
from trainer.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint to read, as rank 0 decided."""

    path: Path
    """Where it is read, or where it is copied to if it is in a store."""
    step: int
    """Step to go on from."""
    names: tuple[str, ...]
    """States to read."""
    sums: dict[str, FileSum] = field(default_factory=dict)
    """Its files. Empty for one without checksums: another program's, or of the first format."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those of the run that saved it, by dotted key, if this run goes on from there."""
    replaceable: bool = False
    """It was not asked for by name: if it is damaged, an older one may take its place."""
    url: str = ""
    """Where it is in a store, if it has to be copied from there."""
    copied: tuple[str, ...] = ()
    """Names of the files to copy."""
    is_temporary: bool = False
    """The copy is deleted once it is read; else it becomes a checkpoint of the folder."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self.url or str(self.path)


class CheckpointChooser:
    """Chooses among the checkpoints of a folder, of its copy in a store, and the one that `initial_load_path` names.

    names: the states of the run, in the order of loading. is_restart: whether a launcher has started the run again by itself. What
    `load_step` and `exclude_from_loading` ask for is then done already, once the run has saved a checkpoint: to do it again after
    each restart would train the same steps, or the same data, for ever.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        section: CheckpointConfig,
        folder: Path,
        remote: RemoteFolder | None,
        world_size: int,
        is_restart: bool = False,
    ) -> None:
        self._names = names
        self._section = section
        self._is_restart = is_restart
        self._goes_back = False
        self._folder = folder
        self._remote = remote
        self._remote_steps: list[int] | None = None
        self._world_size = world_size
        self._told: set[str] = set()

    def choose(self, step: int, damaged: Mapping[str, str]) -> Source | None:
        """Return what to read, None if there is nothing.

        step: the one that is asked for, -1 for what the settings say. damaged: places found to be damaged, with the reason.

        Raises:
            ValueError: what is asked for is not there, or does not suit, or nothing in the folder does.
        """
        section = self._section
        # To what this process has saved itself.
        self._goes_back = step >= 0
        if not damaged:
            self._remote_steps = None  # there may be more by now
        if section.enable and step < 0 <= section.load_step:
            step = self._find_continuation(section.load_step)
        if section.enable and step >= 0:
            return self._choose_step(step)
        source = self._choose_newest(damaged) if section.enable else None
        if source is None:
            return self._choose_initial()
        if section.initial_load_path:
            logger.info("checkpoint.initial_load_path is not used: %s holds checkpoints of this run.", self._folder)
        return source

    def _choose_step(self, step: int) -> Source:
        local = files.list_steps(self._folder)
        steps = sorted({*local, *self._list_remote_steps()})
        if step not in steps:
            raise UserError(
                f"checkpoint.load_step = {step}: there is no whole checkpoint of that step in {self._folder}"
                f"{self._name_remote()}; {_describe_steps(steps)}"
            )
        newer = [str(other) for other in steps if other > step]
        if newer:
            logger.warning(
                "%s also holds later checkpoints (%s). Without checkpoint.load_step a later start goes on from the newest: "
                "move them away, or give this run a folder of its own.", self._folder, ", ".join(newer),
            )  # fmt: skip
        return self._describe(step, remote=None if step in local else self._remote)

    def _find_continuation(self, load_step: int) -> int:
        """Return the step to load where `load_step` is asked for: after a restart the last that this run has saved since."""
        if not self._is_restart:
            return load_step
        key = "checkpoint.load_step"
        paths = {step: files.step_path(self._folder, step) for step in files.list_steps_by_age(self._folder)}
        own = [
            step
            for step, path in paths.items()
            if step > load_step and files.read_manifest(path).get("config", {}).get(key) == load_step
        ]
        if not own:
            return load_step
        logger.warning("The run was started again by itself: it goes on from step-%d, which it saved since %s = %d.", own[-1], key, load_step)  # fmt: skip
        return own[-1]

    def _choose_newest(self, damaged: Mapping[str, str]) -> Source | None:
        """Return the newest checkpoint that has all states of the run, None if there is no checkpoint at all."""
        local, remote = files.list_named_steps(self._folder), self._list_remote_steps()
        refusals: list[str] = []
        for step in sorted({*local, *remote}, reverse=True):
            for store in [*([None] if step in local else []), *([self._remote] if step in remote else [])]:
                try:
                    source = self._describe(step, remote=store, replaceable=True)
                    if source.place not in damaged:
                        return source
                    refusals.append(f"{source.place} is damaged: {damaged[source.place]}")
                except ValueError as error:
                    refusals.append(str(error))
                    self._tell_passed_over(error)
        if refusals:
            raise UserError(
                f"no checkpoint in {self._folder}{self._name_remote()} can be resumed from; the newest: {refusals[0]}"
                + (f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else "")
                + ". To begin anew, set another job.dump_folder or move them away"
            )
        return None

    def _choose_initial(self) -> Source | None:
        name = self._section.initial_load_path
        if not name or self._section.initial_load_in_hf:
            return None
        key = f"checkpoint.initial_load_path = {name}"
        remote = RemoteCheckpoint(name) if is_url(name) else None
        path = self._folder / f".initial.{_make_name()}.fetched" if remote else Path(name)
        there = remote.list_names() if remote else [file.name for file in path.iterdir()] if path.is_dir() else []
        if files.TENSOR_INDEX_NAME not in there:
            steps = RemoteFolder(name).list_steps() if remote else files.list_steps(path)
            inside = f"; it holds the checkpoints {', '.join(f'step-{s}' for s in steps)}: name one" if steps else ""
            raise UserError(f"{key}: there is no checkpoint here (no {files.TENSOR_INDEX_NAME}){inside}")
        manifest = remote.read_manifest() if remote else files.read_manifest(path)
        copy: dict[str, Any] = {"url": name, "copied": tuple(there), "is_temporary": True} if remote else {}
        if self._section.initial_load_model_only:
            return Source(path, 0, (MODEL,), files.get_file_sums(manifest, name), **copy)
        if "step" not in manifest:
            raise UserError(
                f"{key} has no {files.MANIFEST_NAME}: another program wrote it, and only its weights can be loaded. Set "
                "checkpoint.initial_load_model_only = true"
            )
        return self._make_source(path, int(manifest["step"]), manifest, **copy)

    def _describe(self, step: int, *, remote: RemoteFolder | None, replaceable: bool = False) -> Source:
        """Return what to read of a checkpoint of this run, in its folder or in the store.

        Raises:
            ValueError: it is not whole, its manifest is damaged, or it lacks states that the run needs.
        """
        path = files.step_path(self._folder, step)
        if remote is None:
            if not files.is_whole(path):
                raise UserError(f"{path} is not a whole checkpoint of this program")
            return self._make_source(path, step, files.read_manifest(path), is_own=True, replaceable=replaceable)
        checkpoint = remote.at(step)
        manifest = checkpoint.read_manifest()
        copied = (files.MANIFEST_NAME, *files.get_file_sums(manifest, checkpoint.url))
        copy = {"url": checkpoint.url, "copied": copied, "is_temporary": self._section.load_only}
        path = self._folder / f".step-{step}.{_make_name()}.fetched"
        return self._make_source(path, step, manifest, is_own=True, replaceable=replaceable, **copy)

    def _make_source(
        self, path: Path, step: int, manifest: dict[str, Any], *, is_own: bool = False, **further: Any
    ) -> Source:
        """is_own: whether it is in the run's folder, and not what `initial_load_path` names."""
        place = further.get("url") or str(path)
        sums = files.get_file_sums(manifest, place)
        held = {*manifest.get("tensors", ()), *manifest.get("plain", ())}
        if step == 0 and held == {MODEL}:
            return Source(path, 0, (MODEL,), sums, **further)  # a seed: weights to begin from
        excluded = self._list_excluded(manifest, place) if is_own else self._section.exclude_from_loading
        wanted = [name for name in self._names if name not in excluded]
        lacking = [name for name in wanted if name not in held]
        if lacking:
            raise UserError(
                f"{place} holds {', '.join(sorted(held)) or 'nothing'}, but not {', '.join(lacking)}. A checkpoint of the weights "
                "alone (checkpoint.last_save_model_only) can be begun from with checkpoint.initial_load_path; to start "
                f"the missing parts afresh set checkpoint.exclude_from_loading = {lacking}"
            )
        if RNG in wanted and manifest.get("world_size") != self._world_size:
            logger.warning(
                "The random number generators start afresh: %s was saved by %s processes, and there are %d.",
                place, manifest.get("world_size"), self._world_size,
            )  # fmt: skip
            wanted.remove(RNG)
        return Source(path, step, tuple(wanted), sums, manifest.get("config", {}), **further)

    def _list_excluded(self, manifest: Mapping[str, Any], place: str) -> list[str]:
        """Return the parts not to load of a checkpoint of this run's folder."""
        key = "checkpoint.exclude_from_loading"
        excluded = self._section.exclude_from_loading
        begun = manifest.get("config", {}).get(key) or []
        again = [name for name in excluded if name in begun]
        if not again:
            return excluded
        if self._goes_back:
            return [name for name in excluded if name not in begun]
        if self._is_restart:
            self._tell_once(
                f"The run was started again by itself: {', '.join(again)} of {place}, begun afresh before that was saved, will be loaded."
            )
            return [name for name in excluded if name not in begun]
        self._tell_once(
            f"{key} = {excluded}: {place} was saved by a run with the same, which had begun these parts afresh. They are begun afresh "
            "again: leave the setting out if that is not meant."
        )
        return excluded

    def _list_remote_steps(self) -> list[int]:
        if self._remote_steps is None:
            self._remote_steps = self._remote.list_steps() if self._remote is not None else []
        return self._remote_steps

    def _name_remote(self) -> str:
        return f" or {self._remote.url}" if self._remote is not None else ""

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)

    def _tell_passed_over(self, error: ValueError) -> None:
        if str(error) in self._told:
            return
        self._told.add(str(error))
        if isinstance(error, files.DamagedError):
            logger.error(
                "CHECKPOINT DAMAGED: %s. Looking for an older one to go on from.", error, extra={"is_fallback": True}
            )
        else:
            logger.warning("Passing over a checkpoint: %s", error, extra={"is_fallback": True})


def _make_name() -> str:
    """Return a name that no other run gives to its copy: those that only load hold no lock."""
    return uuid.uuid4().hex[:8]


def _describe_steps(steps: Sequence[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "there is none at all"
