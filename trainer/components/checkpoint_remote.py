"""Checkpoints in an object store (s3://, gs://, az://, ... whatever fsspec knows): copies of what is whole on the local disk.

A store cannot rename a folder, so a checkpoint there is made whole by its manifest, which is written last and deleted first: a
folder without one is no checkpoint. Each rank copies the files that it wrote. What fails is tried again, with growing pauses.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from trainer.components.checkpoint_files import MANIFEST_NAME, parse_manifest
from trainer.components.checkpoint_unpickle import check_names

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0
"""Before the second attempt; each further pause is twice as long."""
# Another attempt would end in the same way.
_HOPELESS = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, TypeError, ImportError)

T = TypeVar("T")


def is_url(path: str) -> bool:
    """Return whether a path names a place in a store, and not one on a disk."""
    return "://" in path


class RemoteCheckpoint:
    """One checkpoint in a store, which may not be there yet."""

    def __init__(self, url: str) -> None:
        """Raises ImportError if the package for this kind of store is not installed, ValueError if nothing knows it."""
        self.url = url.rstrip("/")
        self._fs, root = url_to_fs(self.url)
        self._root = root.rstrip("/")

    def is_whole(self) -> bool:
        """Return whether its manifest is there."""
        return _retry(f"look for {self.url}", lambda: bool(self._fs.exists(self._place(MANIFEST_NAME))))

    def read_manifest(self) -> dict[str, Any]:
        """Return its manifest; nothing if it has none.

        Raises:
            ValueError: it is damaged.
        """
        try:
            text = _retry(f"read {self.url}", lambda: self._fs.cat_file(self._place(MANIFEST_NAME)))
        except FileNotFoundError:
            return {}
        return parse_manifest(text, f"{self.url}/{MANIFEST_NAME}")

    def list_names(self) -> list[str]:
        """Return the names of its files."""
        entries = _list_folder(self._fs, self._root, self.url)
        return sorted(_last(entry["name"]) for entry in entries if entry["type"] == "file")

    def upload(self, local: Path, names: Iterable[str]) -> None:
        """Copy files of a local checkpoint there.

        Raises:
            OSError: what arrived is not as long as what was sent.
            Exception: what the store raises, after the last attempt.
        """

        def put(name: str) -> None:
            self._fs.put_file(str(local / name), self._place(name))
            arrived, sent = self._fs.size(self._place(name)), (local / name).stat().st_size
            if arrived != sent:
                raise OSError(f"{self.url}/{name} has {arrived} of {sent} bytes")

        with contextlib.suppress(Exception):
            # Stores of objects have no folders, and some users may not make a bucket. Where it mattered, writing will tell.
            self._fs.makedirs(self._root, exist_ok=True)
        for name in names:
            _retry(f"write {self.url}/{name}", lambda name=name: put(name))  # type: ignore[misc]

    def finish(self, local: Path) -> None:
        """Make it whole, once all files are there."""
        content = (local / MANIFEST_NAME).read_bytes()
        _retry(f"write {self.url}/{MANIFEST_NAME}", lambda: self._fs.pipe_file(self._place(MANIFEST_NAME), content))

    def retract(self) -> None:
        """Take its manifest away: from now on it is no checkpoint."""

        def remove() -> None:
            if self._fs.exists(self._place(MANIFEST_NAME)):
                self._fs.rm_file(self._place(MANIFEST_NAME))

        _retry(f"delete {self.url}/{MANIFEST_NAME}", remove)

    def delete(self) -> None:
        """Delete it, the manifest first."""
        self.retract()
        _retry(f"delete {self.url}", lambda: self._fs.rm(self._root, recursive=True))

    def download(self, names: Iterable[str], local: Path) -> None:
        """Copy files from there into a local folder, through to stable storage.

        Raises:
            FileNotFoundError: one is not there.
            Exception: what the store raises, after the last attempt.
        """
        names = list(names)
        check_names(names, self.url)
        for name in names:
            _retry(
                f"read {self.url}/{name}",
                lambda name=name: self._fs.get_file(self._place(name), str(local / name)),  # type: ignore[misc]
            )
            with open(local / name, "rb+") as file:
                os.fsync(file.fileno())

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"


class RemoteFolder:
    """A run's folder in a store."""

    def __init__(self, url: str) -> None:
        """Raises as `RemoteCheckpoint` does."""
        self.url = url.rstrip("/")
        self._fs, self._root = url_to_fs(self.url)

    def at(self, step: int) -> RemoteCheckpoint:
        """Return the checkpoint of a step, which may not be there."""
        return RemoteCheckpoint(f"{self.url}/step-{step}")

    def list_steps(self) -> list[int]:
        """Return the steps of the whole checkpoints there, oldest first."""
        entries = _list_folder(self._fs, self._root, self.url)
        matches = [_STEP_NAME.fullmatch(_last(entry["name"])) for entry in entries]
        return [step for step in sorted(int(match[1]) for match in matches if match) if self.at(step).is_whole()]

    def list_steps_by_age(self) -> list[int]:
        """Return the same, first saved first: not by step if a run went back."""
        return sorted(self.list_steps(), key=lambda step: str(self.at(step).read_manifest().get("created", "")))


_STEP_NAME = re.compile(r"step-(0|[1-9]\d*)")


def _list_folder(fs: Any, root: str, url: str) -> list[dict[str, Any]]:
    """Return what a folder of a store holds right now, as fsspec describes it; nothing if it is not there."""
    fs.invalidate_cache()
    try:
        return _retry(f"list {url}", lambda: fs.ls(root, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _retry(task: str, work: Callable[[], T]) -> T:
    """Return what `work` returns, tried again where it fails for a reason that may pass."""
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except _HOPELESS:
            raise
        except Exception as error:  # each store has exceptions of its own
            logger.warning("Could not %s (%s: %s); attempt %d of %d in %.0f s.", task, type(error).__name__, error, attempt + 1, ATTEMPTS, pause)  # fmt: skip
            time.sleep(pause)
            pause *= 2
    return work()
