"""Saving a run and going on from what was saved, on top of torch.distributed.checkpoint (DCP).

A checkpoint is whole or it is not there: it is written into a hidden folder, synced, and renamed (`checkpoint_files`).
Tensors go through DCP, each rank its shards, and can be read on any mesh. States that are plain values (counters, the
data position) stand in the manifest. Rank 0 decides what happens to folders and which checkpoint is read; errors of
any rank are raised on all.
"""

import datetime
import logging
import platform
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.stateful import Stateful

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_ranks import Ranks
from trainer.components.checkpoint_read import MODEL, RNG, CheckpointReader
from trainer.components.checkpoint_staging import PinnedStager, build_stager
from trainer.components.checkpoint_state import ModelState, RngState, is_plain, merge_plain
from trainer.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SaveReport:
    """What a finished save cost."""

    step: int
    size: int
    """Bytes on disk."""
    seconds: float
    """From the call of `save` until the checkpoint was whole."""
    stall_seconds: float
    """Part of that during which training stood still on rank 0."""


@dataclass
class _Save:
    """A save that is going on."""

    step: int
    manifest: dict[str, Any]
    started: float
    """On the clock of `time.perf_counter`."""
    stall_seconds: float = 0.0
    staged: Future | None = None
    """The copy of the tensors, where it is made in the background: training may not change them before it is done."""
    finished: Future | None = None
    """Done when the checkpoint is whole on all ranks, or has failed on all."""


class CheckpointManager:
    """Saves and loads the named states of a run.

    states: what makes up the run, `model` among them: a module (or `ModelState` over pipeline stages) and objects with
        `state_dict` and `load_state_dict`. The order is the order of loading. A state's tensors are saved by each rank
        as its shards, or once if they are plain; values that JSON can hold are saved once, or for each rank where they
        differ. While a save with `async_with_pinned_mem` is copying, parameters and optimizer states may only change
        after `maybe_wait_for_staging`. The random number generators are added here, as `rng`.
    section: the settings.
    folder: where the checkpoints of this run are kept.
    timeout_seconds: longest that ranks wait for each other: the time that writing or reading a checkpoint may take.

    Constructing, loading and saving are collective: every rank does them, in the same order.
    """

    def __init__(
        self,
        states: Mapping[str, Stateful | nn.Module],
        *,
        section: CheckpointConfig,
        folder: Path,
        timeout_seconds: float = 1800.0,
    ) -> None:
        """Raises ValueError if `exclude_from_loading` names a state that there is not."""
        assert MODEL in states, "a checkpoint needs a model"
        assert RNG not in states, f"{RNG} is handled by the manager"
        # DCP says on every call that it works without a process group.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._section = section
        self._folder = Path(folder)
        self._ranks = Ranks(timeout_seconds)
        self._states: dict[str, Any] = {
            name: ModelState(state) if isinstance(state, nn.Module) else state for name, state in states.items()
        }
        self._states[RNG] = RngState(self._ranks.rank)
        self._reader = CheckpointReader(self._states, section=section, folder=self._folder, ranks=self._ranks)
        # The writing thread has a group of its own: collectives of two threads on one group would mix.
        self._writer_ranks = self._ranks if section.async_mode == "disabled" else Ranks(timeout_seconds)
        self._pending: _Save | None = None
        self._pinned_stager: DefaultStager | None = None
        self._deletion_lock = threading.Lock()
        self._deletions: list[Future] = []
        self.last_save: SaveReport | None = None
        """On rank 0, what the last finished save cost."""
        if section.enable and not section.load_only:
            clean = self._on_rank_0(lambda: files.clean_leftovers(self._folder))
            self._ranks.together(f"clean up in {self._folder}", clean)

    def load(self, step: int = -1) -> int | None:
        """Load the checkpoint of a step, or with -1 the one that the settings say, into the states.

        That is `load_step`; else the newest in the folder that this run can go on from; else `initial_load_path`.
        Returns the step to go on from (0 after loading weights alone), or None if there is nothing to load.

        Raises:
            ValueError: an explicit step or path is not there, no checkpoint in the folder can be resumed, or the one
                chosen does not fit the states.
            RuntimeError: reading failed.
        """
        self.wait()
        return self._reader.load(step if step >= 0 else self._section.load_step)

    def should_save(self, step: int, last: bool = False) -> bool:
        """Return whether a checkpoint is due after optimizer step `step`, counted from 1. last: the run ends here."""
        section = self._section
        if not section.enable or section.load_only or step < 1:
            return False
        return last or step % section.interval == 0 or (step == 1 and section.enable_first_step_checkpoint)

    def save(self, step: int, last: bool = False) -> bool:
        """Save a checkpoint if one is due, and return whether that is so. The last one is never left to the background.

        Raises:
            RuntimeError: saving failed, or the save before this one failed in the background.
        """
        if not self.should_save(step, last):
            return False
        if last and self._section.last_save_model_only:
            self._save(step, model_only=True, dtype=getattr(torch, self._section.export_dtype))
        else:
            self._save(step, in_background=self._section.async_mode != "disabled" and not last)
        return True

    def save_seed(self) -> None:
        """Save the weights as they are as step 0, for other runs to begin from."""
        self._save(0, model_only=True)

    def maybe_wait_for_staging(self) -> None:
        """Wait until a save in the background has its copy of the tensors. Call it before every optimizer step."""
        save = self._pending
        if save is None or save.staged is None or save.staged.done():
            return
        started = time.perf_counter()
        save.staged.exception()  # waits; an error makes the whole save fail, and that is reported
        save.stall_seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the save in the background, if there is one. Collective.

        Raises:
            RuntimeError: it failed.
        """
        self._ranks.together("finish a save in the background", self._await_pending)

    def close(self) -> None:
        """Finish what goes on in the background. Makes no collective call of its own: other ranks may be gone.

        Raises:
            RuntimeError: a save in the background failed.
        """
        try:
            self._await_pending()
        finally:
            for deletion in self._deletions:
                deletion.result()
            self._deletions.clear()
            if self._pinned_stager is not None:
                self._pinned_stager.close()
                self._pinned_stager = None

    # Saving, step by step.

    def _save(
        self, step: int, *, model_only: bool = False, dtype: torch.dtype | None = None, in_background: bool = False
    ) -> None:
        started = time.perf_counter()
        self.wait()
        tensors, manifest = self._collect(step, model_only, dtype)
        save = _Save(step, manifest, started)
        prepare = self._on_rank_0(lambda: files.prepare_staging(self._folder, step))
        self._ranks.together(f"make a folder for step-{step}", prepare)
        if not in_background:
            self._finish(save, tensors, self._ranks)
            return
        staged = self._stage(save, tensors)
        self._pending = save
        save.finished = _in_thread(f"checkpoint-{step}", lambda: self._finish(save, staged, self._writer_ranks))
        save.stall_seconds += time.perf_counter() - started

    def _finish(self, save: _Save, tensors: dict[str, Any], ranks: Ranks) -> None:
        """Write the tensors (those of `save.staged`, if that is set) and make the checkpoint whole. Collective.

        It succeeds or fails on all ranks, and leaves nothing behind if it fails.
        """
        try:
            if save.staged is not None:
                ranks.together(f"copy step-{save.step} to the host", partial(_raise_error_of, save.staged))
            content = tensors if save.staged is None else save.staged.result()
            ranks.together(f"write step-{save.step}", lambda: self._write(save.step, content, ranks))
            ranks.together(f"finish step-{save.step}", self._on_rank_0(lambda: self._commit(save)))
        except (RuntimeError, ValueError) as error:
            if ranks.rank == 0:
                logger.error("CHECKPOINT NOT SAVED: %s", error)
                files.discard_staging(self._folder, save.step)
            raise

    def _collect(
        self, step: int, model_only: bool, dtype: torch.dtype | None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return what DCP is to write, by state, and the manifest with the plain states of all ranks. Collective."""
        states: dict[str, dict[str, Any]] = {}

        def take() -> dict[str, Any]:
            names = [MODEL] if model_only else list(self._states)
            states.update({name: self._states[name].state_dict() for name in names})
            if dtype is not None:
                states[MODEL] = _cast(states[MODEL], dtype)
            return {name: state for name, state in states.items() if is_plain(state)}

        by_rank = self._ranks.together(f"collect the state of step-{step}", take)
        plain_names = [name for name in by_rank[0] if all(name in plain for plain in by_rank)]
        tensors = {name: state for name, state in states.items() if name not in plain_names}
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "world_size": self._ranks.world_size,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "tensors": sorted(tensors),
            "plain": merge_plain([{name: plain[name] for name in plain_names} for plain in by_rank]),
        }
        return tensors, manifest

    def _stage(self, save: _Save, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the tensors in host memory; with pinned memory set `save.staged`, and return nothing yet."""
        stager = self._make_stager()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the copy may run on a stream of its own, and must see the last update
        if self._section.async_mode == "async_with_pinned_mem":
            staged = stager.stage(self._copy_buffers(tensors))
            assert isinstance(staged, Future), "this stager copies in the background"
            save.staged = staged
            return {}
        copies: list[Any] = []
        self._ranks.together(f"copy step-{save.step} to the host", lambda: copies.append(stager.stage(tensors)))
        stager.close()
        return copies[0]

    def _write(self, step: int, tensors: dict[str, Any], ranks: Ranks) -> None:
        staging = files.staging_path(self._folder, step)
        writer = dcp.FileSystemWriter(staging, sync_files=True)
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
        if ranks.rank == 0:
            # What `save` returns lacks the files' names in torch 2.11.
            written = dcp.FileSystemReader(staging).read_metadata().storage_data
            files.check_complete(staging, {stored.relative_path for stored in written.values()})

    def _commit(self, save: _Save) -> None:
        """Make the checkpoint whole, report it, and let old ones go. On rank 0."""
        staging = files.staging_path(self._folder, save.step)
        files.write_manifest(staging, save.manifest)
        path = files.commit(self._folder, save.step)
        seconds = time.perf_counter() - save.started
        # 0 where `save` has not returned yet: then training has stood still all the time.
        stall = save.stall_seconds or seconds
        self.last_save = SaveReport(save.step, files.size_in_bytes(path), seconds, stall)
        logger.info(
            "Saved %s: %.2f GiB in %.1f s; training stood still for %.2f s.",
            path, self.last_save.size / 2**30, seconds, stall,
        )  # fmt: skip
        if self._section.keep_latest_k > 0 and save.step > 0:
            self._deletions = [deletion for deletion in self._deletions if not deletion.done()]
            self._deletions.append(_in_thread("checkpoint-delete", lambda: self._delete_old(save.step)))

    def _delete_old(self, newest: int) -> None:
        """Delete all but the whole checkpoints that were written last. The one just saved always stays."""
        with self._deletion_lock:
            for step in files.list_steps_by_age(self._folder)[: -self._section.keep_latest_k]:
                if step == newest:
                    continue
                try:
                    files.delete(self._folder, step)
                except OSError as error:
                    logger.warning("Could not delete the old checkpoint of step %d: %s", step, error)

    def _on_rank_0(self, work: Callable[[], Any]) -> Callable[[], None] | None:
        """Return the work without its result on rank 0, None elsewhere."""
        if self._ranks.rank != 0:
            return None

        def run() -> None:
            work()

        return run

    def _await_pending(self) -> None:
        save, self._pending = self._pending, None
        if save is not None:
            assert save.finished is not None, "a pending save has a thread"
            if not save.finished.done() and self._ranks.rank == 0:
                logger.info("Waiting for the checkpoint of step %d, which is still being written.", save.step)
            save.finished.result()

    def _make_stager(self) -> DefaultStager:
        """Return what copies tensors to the host: for `async` one for each save, whose memory is freed after it."""
        if self._section.async_mode == "async":
            return build_stager()
        if self._pinned_stager is None:
            self._pinned_stager = PinnedStager(pin=torch.cuda.is_available())
        return self._pinned_stager

    def _copy_buffers(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the same with buffers copied: the next forward pass, which staging does not wait for, may change them."""
        volatile = self._states[MODEL].buffer_names() if isinstance(self._states[MODEL], ModelState) else set()
        model = {name: value.clone() if name in volatile else value for name, value in tensors[MODEL].items()}
        return {**tensors, MODEL: model}


def _raise_error_of(future: Future) -> None:
    """Wait for a future, and raise what it raised. Its result may be large and is left where it is."""
    error = future.exception()
    if error is not None:
        raise error


def _in_thread(name: str, work: Callable[[], None]) -> Future:
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


def _cast(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the state with its floating-point tensors in a dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in state.items()
    }
