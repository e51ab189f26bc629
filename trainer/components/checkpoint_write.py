"""Making a checkpoint whole: its files written and synced, then renamed, then copied to a store; old ones deleted.

Everything here may run in the background, on a group of ranks that is used for nothing else.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_checksums import ChecksumWriter, FileSum
from trainer.components.checkpoint_lock import FolderLock
from trainer.components.checkpoint_ranks import Ranks
from trainer.components.checkpoint_remote import RemoteFolder
from trainer.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveReport:
    """How a save ended, and what it cost."""

    step: int
    seconds: float
    """From the call of `save` until the checkpoint was whole, or the save had failed."""
    stall_seconds: float
    """Part of that during which training stood still on rank 0."""
    size: int = 0
    """Bytes on disk."""
    error: str = ""
    """Why it failed. Empty for a checkpoint that is whole."""


@dataclass
class Save:
    """A save that is going on."""

    step: int
    started: float
    """On the clock of `time.perf_counter`."""
    manifest: dict[str, Any]
    """All but the list of files."""
    stall_seconds: float = 0.0
    staged: Future | None = None
    """The copy of the tensors, where it is made in the background: training may not change them before it is done."""
    finished: Future | None = None
    """Done when all that happens in the background has succeeded on all ranks, or has failed on all."""


class CheckpointWriter:
    """Writes checkpoints into a folder, and their copies into a store. Its methods are collective unless they say otherwise."""

    def __init__(
        self, folder: Path, *, section: CheckpointConfig, lock: FolderLock, remote: RemoteFolder | None, rank: int
    ) -> None:
        self._folder = folder
        self._section = section
        self._lock = lock
        self._remote = remote
        self._rank = rank
        self._deletion_lock = threading.Lock()
        self._deletions: list[Future] = []
        self._reports: list[SaveReport] = []
        self.last_save: SaveReport | None = None
        """On rank 0, what the last whole checkpoint cost."""

    def take_reports(self) -> list[SaveReport]:
        """Return, on rank 0, how each save ended that did since the last call. Not collective."""
        reports, self._reports = self._reports, []
        return reports

    def close(self) -> None:
        """Wait for what is being deleted. Not collective.

        Raises:
            FolderTakenError: another run took the folder, and nothing more was deleted.
        """
        for deletion in self._deletions:
            deletion.result()
        self._deletions.clear()

    def prepare(self, step: int) -> None:
        """Make a folder to write into. On rank 0."""
        self._lock.check()
        files.prepare_staging(self._folder, step)

    def write(self, save: Save, tensors: dict[str, Any], ranks: Ranks) -> list[str]:
        """Write the tensors (those of `save.staged`, if that is set) and make the checkpoint whole.

        It succeeds or fails on all ranks, and leaves nothing behind if it fails. Returns the files of this rank.
        """
        try:
            if save.staged is not None:
                ranks.together(f"copy step-{save.step} to the host", partial(_raise_error_of, save.staged))
            content = tensors if save.staged is None else save.staged.result()
            by_rank = ranks.together(f"write step-{save.step}", lambda: self._write_share(save.step, content, ranks))
            written = {name: file_sum for sums in by_rank for name, file_sum in sums.items()}
            commit = (lambda: self._commit(save, written)) if ranks.rank == 0 else None
            ranks.together(f"finish step-{save.step}", commit)
        except (RuntimeError, ValueError) as error:
            self.report_failure(save, error)
            raise
        return sorted(by_rank[ranks.rank])

    def upload(self, save: Save, names: list[str], ranks: Ranks) -> None:
        """Copy a whole checkpoint to the store, each rank the files that it wrote. The manifest comes last."""
        assert self._remote is not None, "there is no store"
        started = time.perf_counter()
        local, remote = files.step_path(self._folder, save.step), self._remote.at(save.step)
        first = ranks.rank == 0

        def begin() -> None:
            self._lock.check()
            remote.retract()

        try:
            ranks.together(f"begin {remote.url}", begin if first else None)
            ranks.together(f"copy {local} to {remote.url}", lambda: remote.upload(local, names))
            ranks.together(f"finish {remote.url}", (lambda: remote.finish(local)) if first else None)
        except (RuntimeError, ValueError) as error:
            self._report(save, f"CHECKPOINT NOT COPIED: {error}. {local} is whole.", error)
            raise
        if first:
            logger.info("Copied %s to %s in %.1f s.", local, remote.url, time.perf_counter() - started)
            self._delete_later(partial(self._delete_old_in_store, save.step))

    def upload_export(self, step: int, ranks: Ranks, *, last: str) -> None:
        """Copy a folder that is no checkpoint to the store, ranks sharing its files.

        last: the file that comes last, without which nobody takes the folder for whole

        Raises:
            RuntimeError: it failed, on all ranks; the local folder is whole.
        """
        assert self._remote is not None, "there is no store"
        started = time.perf_counter()
        local, remote = files.step_path(self._folder, step), self._remote.at(step)
        names = sorted({path.name for path in local.iterdir()} - {last})

        def begin() -> None:
            self._lock.check()
            if remote.list_names():
                remote.delete()

        first = ranks.rank == 0
        try:
            ranks.together(f"begin {remote.url}", begin if first else None)
            share = names[ranks.rank :: ranks.world_size]
            ranks.together(f"copy {local} to {remote.url}", lambda: remote.upload(local, share))
            ranks.together(f"finish {remote.url}", (lambda: remote.upload(local, [last])) if first else None)
        except (RuntimeError, ValueError) as error:
            if first:
                logger.error("CHECKPOINT NOT COPIED: %s. %s is whole.", error, local)
            raise
        if first:
            logger.info("Copied %s to %s in %.1f s.", local, remote.url, time.perf_counter() - started)

    def report_failure(self, save: Save, error: Exception) -> None:
        """Raise an alarm and leave nothing behind. Not collective: does nothing but on rank 0."""
        room = ""
        if self._rank == 0:
            files.discard_staging(self._folder, save.step)
            room = f" ({self._describe_room()})"
        self._report(save, f"CHECKPOINT NOT SAVED: {error}{room}", error)

    def _describe_room(self) -> str:
        """Say how much room the disk has: a full one may show itself as any error of the library that writes."""
        folder = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        last = f", the last checkpoint took {self.last_save.size / 2**30:.2f} GiB" if self.last_save else ""
        return f"its disk has {shutil.disk_usage(folder).free / 2**30:.2f} GiB free{last}"

    def _report(self, save: Save, alarm: str, error: Exception) -> None:
        if self._rank != 0:
            return
        logger.error(alarm)
        seconds = time.perf_counter() - save.started
        self._reports.append(SaveReport(save.step, seconds, save.stall_seconds or seconds, error=str(error)))

    def _write_share(self, step: int, tensors: dict[str, Any], ranks: Ranks) -> dict[str, FileSum]:
        """Write this rank's tensors and return the files that they are in."""
        writer = ChecksumWriter(files.staging_path(self._folder, step))
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
        return writer.file_sums

    def _commit(self, save: Save, written: dict[str, FileSum]) -> None:
        """Make the checkpoint whole, report it, and let old ones go. On rank 0."""
        staging = files.staging_path(self._folder, save.step)
        self._lock.check()
        files.check_complete(staging, written)
        listing = {name: written[name].to_json() for name in sorted(written)}
        files.write_manifest(staging, {**save.manifest, "files": listing})
        path = files.commit(self._folder, save.step)
        seconds = time.perf_counter() - save.started
        # 0 where `save` has not returned yet: then training has stood still all the time.
        stall = save.stall_seconds or seconds
        self.last_save = SaveReport(save.step, seconds, stall, files.size_in_bytes(path))
        self._reports.append(self.last_save)
        logger.info(
            "Saved %s: %.2f GiB in %.1f s; training stood still for %.2f s.",
            path, self.last_save.size / 2**30, seconds, stall,
        )  # fmt: skip
        if save.step > 0:
            self._delete_later(partial(self._delete_old, save.step))

    def _delete_later(self, work: Callable[[], None]) -> None:
        if self._section.keep_latest_k > 0:
            self._deletions = [deletion for deletion in self._deletions if not deletion.done()]
            self._deletions.append(in_thread("checkpoint-delete", partial(self._delete_safely, work)))

    def _delete_safely(self, work: Callable[[], None]) -> None:
        with self._deletion_lock:
            self._lock.check()  # what is there may be another run's by now
            work()

    def _delete_old(self, newest: int) -> None:
        """Delete all but the whole checkpoints that were written last. The one just saved always stays."""
        for step in files.list_steps_by_age(self._folder)[: -self._section.keep_latest_k]:
            if step == newest:
                continue
            try:
                files.delete(self._folder, step)
            except OSError as error:
                logger.warning("Could not delete the old checkpoint of step %d: %s", step, error)

    def _delete_old_in_store(self, newest: int) -> None:
        """Delete all but the whole checkpoints in the store that were saved last. The one just copied always stays."""
        assert self._remote is not None, "there is no store"
        try:
            for step in self._remote.list_steps_by_age()[: -self._section.keep_latest_k]:
                if step != newest:
                    self._remote.at(step).delete()
        except Exception as error:  # each store has exceptions of its own
            logger.warning("Could not delete old checkpoints in %s: %s", self._remote.url, error)


def _raise_error_of(future: Future) -> None:
    """Wait for a future, and raise what it raised. Its result may be large and is left where it is."""
    error = future.exception()
    if error is not None:
        raise error


def in_thread(name: str, work: Callable[[], None]) -> Future:
    """Start `work` in a thread that does not keep the process alive: a run that fails must not wait for it to end."""
    future: Future = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
