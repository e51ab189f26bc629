"""Folders of checkpoints on disk: which are whole, how one becomes whole, how it goes away.

    <folder>/step-500/                  a whole checkpoint
    <folder>/.step-1000.staging/        being written
    <folder>/.step-500.replaced/        moved aside while a new step-500 takes its place
    <folder>/.step-100.deleted/         being deleted

A name without a dot in front is only ever given to a checkpoint that is complete and on stable storage, by renaming.
Other names in the folder are not ours and are left alone. Nothing here talks to other ranks: rank 0 alone calls it.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
"""What a checkpoint says about itself: step, processes, versions, and the states that are plain values."""
TENSOR_INDEX_NAME = ".metadata"
"""The index of torch.distributed.checkpoint, which it writes last."""

_STEP_NAME = re.compile(r"step-(0|[1-9]\d*)")
_HIDDEN_NAME = re.compile(r"\.step-(0|[1-9]\d*)\.(staging|replaced|deleted)")


def step_path(folder: Path, step: int) -> Path:
    """Return the place of a whole checkpoint."""
    return folder / f"step-{step}"


def staging_path(folder: Path, step: int) -> Path:
    """Return the place where a checkpoint is written."""
    return folder / f".step-{step}.staging"


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint of ours stands at this path."""
    return (path / MANIFEST_NAME).is_file() and (path / TENSOR_INDEX_NAME).is_file()


def list_steps(folder: Path) -> list[int]:
    """Return the steps of the whole checkpoints in a folder, oldest first. A folder that is not there has none."""
    if not folder.is_dir():
        return []
    matches = [(_STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(int(match[1]) for match, path in matches if match and is_whole(path))


def list_steps_by_age(folder: Path) -> list[int]:
    """Return the steps of the whole checkpoints in a folder, first written first: not by step if a run went back in time."""
    return sorted(list_steps(folder), key=lambda step: (step_path(folder, step) / MANIFEST_NAME).stat().st_mtime_ns)


def clean_leftovers(folder: Path) -> None:
    """Remove what a crash left half written or half deleted, put back what was moved aside, and name what is not ours."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _STEP_NAME.fullmatch(path.name) and not is_whole(path):
            logger.warning(
                "%s is not a whole checkpoint of this program: it is neither resumed from nor deleted. To begin from "
                "another program's, name it in checkpoint.initial_load_path.",
                path,
            )
        match = _HIDDEN_NAME.fullmatch(path.name)
        if not match:
            continue
        final = step_path(folder, int(match[1]))
        if match[2] == "replaced" and not final.exists():
            logger.warning("Putting back %s: a crash came while a new one was to take its place.", final)
            path.rename(final)
        else:
            logger.warning("Removing %s, left over from a run that ended while it was %s.", path, _OCCUPATION[match[2]])
            shutil.rmtree(path)


_OCCUPATION = {"staging": "saving", "replaced": "replacing a checkpoint", "deleted": "deleting a checkpoint"}


def prepare_staging(folder: Path, step: int) -> Path:
    """Make an empty folder to write a checkpoint into."""
    path = staging_path(folder, step)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def check_complete(path: Path, names: Iterable[str]) -> None:
    """Check that all files of a checkpoint are in its folder.

    Raises:
        ValueError: some are not: other hosts wrote theirs to a disk of their own.
    """
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise ValueError(
            f"{len(missing)} files that other ranks wrote are not in {path} (such as {missing[0]}): all hosts must see the "
            "same folder. Set job.dump_folder to one on a file system that they share"
        )


def discard_staging(folder: Path, step: int) -> None:
    """Remove what a failed save wrote, so that a full disk has room again. Failing to is only logged."""
    try:
        shutil.rmtree(staging_path(folder, step))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("Could not remove %s: %s", staging_path(folder, step), error)


def commit(folder: Path, step: int) -> Path:
    """Give a completely written checkpoint its name, in place of one that has it. Killed at any point, one stays whole.

    The writers have synced their files; the folders are synced here.
    """
    staging, final = staging_path(folder, step), step_path(folder, step)
    assert is_whole(staging), f"{staging} is not complete"
    _sync_folder(staging)
    aside = folder / f".step-{step}.replaced"
    if final.exists() and not is_whole(final):
        kept = folder / f"step-{step}.not-ours-{time.time_ns()}"
        logger.warning("%s is not a whole checkpoint of this program; it is moved to %s.", final, kept)
        final.rename(kept)
    elif final.exists():
        logger.warning("%s exists and is replaced.", final)
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    staging.rename(final)
    _sync_folder(folder)
    if aside.exists():
        shutil.rmtree(aside)
    return final


def delete(folder: Path, step: int) -> None:
    """Delete a checkpoint. It stops being one at once, and its files go after that."""
    doomed = folder / f".step-{step}.deleted"
    if doomed.exists():
        shutil.rmtree(doomed)
    step_path(folder, step).rename(doomed)
    shutil.rmtree(doomed)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the checkpoint in a folder, through to stable storage."""
    with open(path / MANIFEST_NAME, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint. One that another program wrote has none: the result is empty.

    Raises:
        ValueError: the manifest is damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST_NAME} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path / MANIFEST_NAME} is damaged: it holds no table")
    return manifest


def size_in_bytes(path: Path) -> int:
    """Return the size of all files in a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
