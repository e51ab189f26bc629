"""Saving a run and going on from what was saved, on top of torch.distributed.checkpoint (DCP).

A checkpoint is whole or it is not there: it is written into a hidden folder, synced, and renamed (`checkpoint_files`).
Tensors go through DCP, each rank its shards, and can be read on any mesh. States that are plain values (counters, the
data position) stand in the manifest. Rank 0 decides what happens to folders and which checkpoint is read; errors of
any rank are raised on all.
"""

import contextlib
import datetime
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.stateful import Stateful

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_lock import FolderLock
from trainer.components.checkpoint_ranks import Ranks
from trainer.components.checkpoint_read import CheckpointReader
from trainer.components.checkpoint_remote import RemoteFolder
from trainer.components.checkpoint_staging import PinnedStager, build_stager
from trainer.components.checkpoint_state import MODEL, RNG, ModelState, RngState, is_plain, merge_plain
from trainer.components.checkpoint_write import CheckpointWriter, Save, SaveReport, in_thread
from trainer.components.hf_checkpoint import HuggingFaceFiles
from trainer.components.optimizer import Optimizers
from trainer.config.errors import UserError
from trainer.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and loads the named states of a run.

    states: what makes up the run, `model` among them: a module (or `ModelState` over pipeline stages) and objects with
        `state_dict` and `load_state_dict`. The order is the order of loading. A state's tensors are saved by each rank
        as its shards, or once if they are plain; values that JSON can hold are saved once, or for each rank where they
        differ. While a save with `async_with_pinned_mem` is copying, parameters and optimizer states may only change
        after `maybe_wait_for_staging`. The random number generators are added here, as `rng`.
    section: the settings.
    folder: where the checkpoints of this run are kept.
    settings: all settings of the run by dotted key, as JSON holds them (`config.changes.describe_settings`). They are kept
        in each checkpoint, and compared with those in the one that the run goes on from.
    hugging_face: what loads and saves Hugging Face files, where the settings ask for that.
    is_restart: whether a launcher has started the run again by itself. `load_step` and `exclude_from_loading` are then for a run that
        has not yet saved a checkpoint; one that has goes on from it.
    timeout_seconds: longest that ranks wait for each other: the time that writing or reading a checkpoint may take.

    Constructing, loading and saving are collective: every rank does them, in the same order.
    """

    def __init__(
        self,
        states: Mapping[str, Stateful | nn.Module],
        *,
        section: CheckpointConfig,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        hugging_face: HuggingFaceFiles | None = None,
        is_restart: bool = False,
        timeout_seconds: float = 1800.0,
    ) -> None:
        """Raises ValueError if `exclude_from_loading` names a state that there is not, or another run uses the folder."""
        assert MODEL in states, "a checkpoint needs a model"
        assert RNG not in states, f"{RNG} is handled by the manager"
        # DCP says on every call that it works without a process group.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._section = section
        self._folder = Path(folder)
        self._hugging_face = hugging_face
        self._ranks = Ranks(timeout_seconds)
        self._states: dict[str, Any] = {
            name: ModelState(state) if isinstance(state, nn.Module) else state for name, state in states.items()
        }
        self._states[RNG] = RngState(self._ranks.rank)
        self._settings = dict(settings or {})
        self._remote = RemoteFolder(section.remote_folder) if section.remote_folder else None
        self._reader = CheckpointReader(
            self._states,
            section=section,
            folder=self._folder,
            remote=self._remote,
            ranks=self._ranks,
            settings=self._settings,
            is_restart=is_restart,
        )
        # The writing thread has a group of its own: collectives of two threads on one group would mix.
        in_background = section.async_mode != "disabled" or self._remote is not None
        self._writer_ranks = Ranks(timeout_seconds) if in_background else self._ranks
        self._lock = FolderLock(self._folder)
        self._writer = CheckpointWriter(
            self._folder, section=section, lock=self._lock, remote=self._remote, rank=self._ranks.rank
        )
        self._pending: Save | None = None
        self._pinned_stager: DefaultStager | None = None
        self._failed_in_a_row = 0
        # Of the newest checkpoint of this process, loaded or saved, be it in the background.
        self._saved_step = -1
        # Of the newest that is whole: where to go back to when the one after it fails.
        self._whole_step = -1
        # Not to a checkpoint that lacks parts as this run has begun them.
        self._can_go_back = True
        if self.saves:
            self._ranks.together(f"take the folder {self._folder}", self._on_rank_0(self._take_folder))

    @property
    def saves(self) -> bool:
        """Whether checkpoints of steps are saved at all."""
        return self._section.enable and not self._section.load_only

    def load(self, step: int = -1) -> int | None:
        """Load the checkpoint of a step, or with -1 the one that the settings say, into the states.

        That is `load_step`; else the newest in the folder that this run can go on from; else `initial_load_path`, which
        `initial_load_in_hf` says to be a Hugging Face folder.
        Returns the step to go on from (0 after loading weights alone), or None if there is nothing to load.

        Raises:
            ValueError: an explicit step or path is not there, no checkpoint in the folder can be resumed, or the one
                chosen does not fit the states.
            RuntimeError: reading failed.
        """
        self.wait()
        resumed_at = self._reader.load(step)
        if resumed_at is None and self._section.initial_load_in_hf:
            assert self._hugging_face is not None, "checkpoint.initial_load_in_hf needs hugging_face"
            self._hugging_face.load(self._states[MODEL], self._ranks)
            resumed_at = 0
        if self._section.async_mode == "async_with_pinned_mem" and self.saves and self._pinned_stager is None:
            self._pin_memory()
        self._saved_step = self._whole_step = resumed_at or -1
        self._can_go_back = step >= 0 or not self._section.exclude_from_loading
        return resumed_at

    def load_newest(self) -> bool:
        """Go back to the newest checkpoint that this process saved or began from; return whether there is one. Collective.

        All parts are loaded, those of `exclude_from_loading` as well. One that it began from without these does not count.

        Raises:
            ValueError: it is gone or damaged.
            RuntimeError: reading failed.
        """
        self.wait()
        return self._saved_step > 0 and self._can_go_back and self.load(self._saved_step) is not None

    def should_save(self, step: int, last: bool = False) -> bool:
        """Return whether a checkpoint is due after optimizer step `step`, counted from 1. last: the run ends here."""
        section = self._section
        if not self.saves or step < 1:
            return False
        return last or step % section.interval == 0 or (step == 1 and section.enable_first_step_checkpoint)

    def save(self, step: int, last: bool = False) -> bool:
        """Save a checkpoint if one is due, and return whether that is so. The last one is never left to the background.

        A save that fails raises an alarm in the log, and training may go on: it is tried again when the next one is due.

        Raises:
            RuntimeError: more than `max_failed_saves` in a row have failed, or the last one.
            ValueError: what no later save will mend, such as a folder that another run took, or that hosts do not share.
        """
        if not self.should_save(step, last):
            return False
        self.wait()
        try:
            if last and self._section.last_save_in_hf:
                assert self._hugging_face is not None, "checkpoint.last_save_in_hf needs hugging_face"
                self._hugging_face.save(self._states[MODEL], step, self._ranks, prepare=self._writer.prepare)
                if self._remote is not None:
                    self._writer.upload_export(step, self._ranks, last=HuggingFaceFiles.LAST_NAME)
            elif last and self._section.last_save_model_only:
                self._save(step, model_only=True, dtype=getattr(torch, self._section.export_dtype))
            else:
                self._save(step, in_background=self._section.async_mode != "disabled" and not last)
            self._saved_step = step
        except RuntimeError as error:
            self._count_failure(error, last)
        return True

    def save_now(self, step: int) -> None:
        """Save everything after optimizer step `step` if no save has, due or not. For a run that has to stop. Collective.

        Raises:
            RuntimeError: saving failed.
        """
        self.wait()
        if self.saves and step > 0 and self._saved_step != step:
            self._save(step)

    def save_seed(self) -> None:
        """Save the weights as they are as step 0, for other runs to begin from.

        Raises:
            RuntimeError: it failed.
        """
        self.wait()
        self._save(0, model_only=True)
        self._ranks.together("copy the seed checkpoint", self._await_pending)

    def take_reports(self) -> list[SaveReport]:
        """Return, on rank 0, how each save ended that did since the last call, oldest first."""
        return self._writer.take_reports()

    @property
    def last_save(self) -> SaveReport | None:
        """On rank 0, what the last whole checkpoint cost."""
        return self._writer.last_save

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
            RuntimeError: it failed, as did too many before it.
        """
        try:
            self._ranks.together("finish a save in the background", self._await_pending)
        except RuntimeError as error:
            self._count_failure(error)

    def close(self) -> None:
        """Finish what goes on in the background. Makes no collective call of its own: other ranks may be gone.

        Raises:
            RuntimeError: a save in the background failed.
            ValueError: another run took the folder.
        """
        with contextlib.ExitStack() as afterwards:
            for end in (self._lock.release, self._free_pinned_memory, self._writer.close):  # the last one first
                afterwards.callback(end)
            self._await_pending()

    def release_folder(self) -> None:
        """Let another run have the folder, when this one ends by an error and nothing is being written any more."""
        if self._pending is None:
            self._lock.release()

    def _take_folder(self) -> None:
        try:
            if self._folder.exists():  # else it is made in the first save, beside the lock
                tempfile.TemporaryFile(dir=self._folder).close()
            self._lock.acquire()
            files.clean_leftovers(self._folder)
        except OSError as error:
            raise UserError(
                f"checkpoint.folder = {self._section.folder}: {self._folder} cannot be written ({error.strerror or error}). "
                "Name another job.dump_folder or checkpoint.folder, or let this user write there"
            ) from error

    def _count_failure(self, error: RuntimeError, last: bool = False) -> None:
        """Let training go on after a failed save, unless there were too many. All ranks count alike."""
        self._failed_in_a_row += 1
        self._saved_step = self._whole_step
        allowed = self._section.max_failed_saves
        if last or self._failed_in_a_row > allowed:
            raise RuntimeError(
                f"{error}. {self._failed_in_a_row} saves in a row have failed, and checkpoint.max_failed_saves = {allowed}"
                if not last
                else f"{error}. It was the last one of the run"
            ) from error
        if self._ranks.rank == 0:
            logger.error(
                "Training goes on without a checkpoint: %d saves in a row have failed; after more than %d the run stops "
                "(checkpoint.max_failed_saves).", self._failed_in_a_row, allowed,
            )  # fmt: skip

    # Saving, step by step.

    def _save(
        self, step: int, *, model_only: bool = False, dtype: torch.dtype | None = None, in_background: bool = False
    ) -> None:
        save = Save(step, time.perf_counter(), {})
        try:
            tensors, save.manifest = self._collect(step, model_only, dtype)
            prepare = self._on_rank_0(lambda: self._writer.prepare(step))
            self._ranks.together(f"make a folder for step-{step}", prepare)
        except (RuntimeError, ValueError) as error:
            self._writer.report_failure(save, error)
            raise
        if in_background:
            staged = self._stage(save, tensors)
            self._go_on(save, lambda: self._upload(save, self._writer.write(save, staged, self._writer_ranks)))
            save.stall_seconds += time.perf_counter() - save.started
            return
        names = self._writer.write(save, tensors, self._ranks)
        self._whole_step, self._can_go_back = step, True
        if self._remote is not None:
            self._go_on(save, lambda: self._upload(save, names))
        else:
            self._failed_in_a_row = 0

    def _go_on(self, save: Save, work: Callable[[], None]) -> None:
        """Do the rest of a save in the background."""
        self._pending = save
        save.finished = in_thread(f"checkpoint-{save.step}", work)

    def _upload(self, save: Save, names: list[str]) -> None:
        if self._remote is not None:
            self._writer.upload(save, names, self._writer_ranks)

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
            "format": files.FORMAT_VERSION,
            "step": step,
            "world_size": self._ranks.world_size,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "config": self._settings,
            "tensors": sorted(tensors),
            "plain": merge_plain([{name: plain[name] for name in plain_names} for plain in by_rank]),
        }
        return tensors, manifest

    def _stage(self, save: Save, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the tensors in host memory; with pinned memory set `save.staged`, and return nothing yet."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the copy may run on a stream of its own, and must see the last update
        if self._section.async_mode == "async_with_pinned_mem":
            save.staged = self._begin_copy(tensors)
            return {}
        stager = build_stager()
        copies: list[Any] = []
        self._ranks.together(f"copy step-{save.step} to the host", lambda: copies.append(stager.stage(tensors)))
        stager.close()
        return copies[0]

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
            self._failed_in_a_row = 0
            self._whole_step, self._can_go_back = save.step, True

    def _get_pinned_stager(self) -> DefaultStager:
        """Return what copies tensors to memory that stays pinned."""
        if self._pinned_stager is None:
            self._pinned_stager = PinnedStager(pin=torch.cuda.is_available())
        return self._pinned_stager

    def _pin_memory(self) -> None:
        """Copy the state once and throw the copy away: pinning memory takes seconds, for which the first save would stand still."""
        tensors, _ = self._collect(0, False, None)
        copying: list[Future] = []
        self._ranks.together("begin to pin memory", lambda: copying.append(self._begin_copy(tensors)))
        self._ranks.together("pin memory", lambda: copying[0].result() and None)
        for state in self._states.values():
            if isinstance(state, Optimizers):
                state.forget_guesses()

    def _free_pinned_memory(self) -> None:
        if self._pinned_stager is not None:
            self._pinned_stager.close()
            self._pinned_stager = None

    def _begin_copy(self, tensors: dict[str, Any]) -> Future:
        """Copy the tensors to pinned memory, in a thread and on a stream of its own."""
        staged = self._get_pinned_stager().stage(self._copy_buffers(tensors))
        assert isinstance(staged, Future), "this stager copies in the background"
        return staged

    def _copy_buffers(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the same with buffers copied: the next forward pass, which staging does not wait for, may change them."""
        volatile = self._states[MODEL].buffer_names() if isinstance(self._states[MODEL], ModelState) else set()
        model = {name: value.clone() if name in volatile else value for name, value in tensors[MODEL].items()}
        return {**tensors, MODEL: model}


def _cast(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the state with its floating-point tensors in a dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in state.items()
    }
