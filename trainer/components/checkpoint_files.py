"""Folders of checkpoints on disk: which are whole, how one becomes whole, how it goes away.

    <folder>/step-500/                  a whole checkpoint
    <folder>/.step-1000.staging/        being written
    <folder>/.step-500.replaced/        moved aside while a new step-500 takes its place
    <folder>/.step-100.deleted/         being deleted
    <folder>/.step-500.1a2b3c4d.fetched/ being copied from a store, as is .initial.1a2b3c4d.fetched

A name without a dot in front is only ever given to a checkpoint that is complete and on stable storage, by renaming.
Other names in the folder are not ours and are left alone. Nothing here talks to other ranks: rank 0 alone calls it.
"""

import json
import logging
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.components.checkpoint_checksums import MISSING, FileSum, find_damage
from trainer.components.checkpoint_unpickle import INDEX_NAME, check_names
from trainer.components.durable_files import sync_folder, write_text
from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
"""What a checkpoint says about itself: step, processes, versions, its files, and the states that are plain values."""
TENSOR_INDEX_NAME = INDEX_NAME
"""The index of torch.distributed.checkpoint, which it writes last."""
FORMAT_VERSION = 2
"""1 had no checksums."""


class DamagedError(UserError):
    """What a checkpoint says about itself is not what was written."""


_STEP_NAME = re.compile(r"step-(0|[1-9]\d*)")
_HIDDEN_NAME = re.compile(r"\.(?:step-(0|[1-9]\d*)|initial)(?:\.[0-9a-f]{8})?\.(staging|replaced|deleted|fetched)")


def step_path(folder: Path, step: int) -> Path:
    """Return the place of a whole checkpoint."""
    return folder / f"step-{step}"


def staging_path(folder: Path, step: int) -> Path:
    """Return the place where a checkpoint is written."""
    return folder / f".step-{step}.staging"


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint of ours stands at this path, as far as its names tell."""
    return (path / MANIFEST_NAME).is_file() and (path / TENSOR_INDEX_NAME).is_file()


def list_named_steps(folder: Path) -> list[int]:
    """Return the steps that have a folder, oldest first, whatever is in it. A folder that is not there has none."""
    if not folder.is_dir():
        return []
    matches = [_STEP_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def list_steps(folder: Path) -> list[int]:
    """Return the steps of the whole checkpoints in a folder, as far as names tell, oldest first."""
    return [step for step in list_named_steps(folder) if is_whole(step_path(folder, step))]


def list_steps_by_age(folder: Path) -> list[int]:
    """Return the steps whose checkpoint has all its files in full length, first written first: not by step if a run went back."""
    whole = [step for step in list_steps(folder) if _has_all_bytes(step_path(folder, step))]
    return sorted(whole, key=lambda step: (step_path(folder, step) / MANIFEST_NAME).stat().st_mtime_ns)


def _has_all_bytes(path: Path) -> bool:
    try:
        return not find_damage(path, get_file_sums(read_manifest(path), path), shallow=True)
    except ValueError:
        return False


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
        if match[2] == "replaced" and not (final := step_path(folder, int(match[1]))).exists():
            logger.warning("Putting back %s: a crash came while a new one was to take its place.", final)
            path.rename(final)
        else:
            logger.warning("Removing %s, left over from a run that ended while it was %s.", path, _OCCUPATION[match[2]])
            shutil.rmtree(path)


_OCCUPATION = {
    "staging": "saving",
    "replaced": "replacing a checkpoint",
    "deleted": "deleting a checkpoint",
    "fetched": "copying a checkpoint from a store",
}


def prepare_staging(folder: Path, step: int) -> Path:
    """Make an empty folder to write a checkpoint into."""
    return make_empty(staging_path(folder, step))


def make_empty(path: Path) -> Path:
    """Make an empty folder, in place of what stands there, and return it."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def check_complete(path: Path, written: Mapping[str, FileSum]) -> None:
    """Check that all files of a checkpoint are in its folder, in full length.

    Raises:
        ValueError: some are not there: other hosts wrote theirs to a disk of their own.
        OSError: some are shorter than what was written.
    """
    damage = find_damage(path, written, shallow=True)
    missing = sorted(name for name, reason in damage.items() if reason == MISSING)
    if missing:
        raise UserError(
            f"{len(missing)} files that other ranks wrote are not in {path} (such as {missing[0]}): all hosts must see the "
            "same folder. Set job.dump_folder to one on a file system that they share"
        )
    if damage:
        raise OSError(f"in {path}, {describe_damage(damage)}")


def describe_damage(damage: Mapping[str, str], shown: int = 4) -> str:
    """Return in one line what is wrong with which files."""
    texts = [f"{name} {reason}" for name, reason in sorted(damage.items())]
    return "; ".join(texts[:shown]) + (f"; and {len(texts) - shown} files more" if len(texts) > shown else "")


def set_aside(path: Path, why: str) -> Path:
    """Give a folder that stands in the way of a checkpoint another name, `<name>.<why>-<time>`, and return it."""
    kept = path.with_name(f"{path.name}.{why}-{time.time_ns()}")
    path.rename(kept)
    return kept


def discard_staging(folder: Path, step: int) -> None:
    """Remove what a failed save wrote, so that a full disk has room again. Failing to is only logged."""
    discard(staging_path(folder, step))


def discard(path: Path) -> None:
    """Remove a folder that is of no use any more, if it is there. Failing to is only logged."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("Could not remove %s: %s", path, error)


def commit(folder: Path, step: int, staging: Path | None = None) -> Path:
    """Give a completely written checkpoint its name, in place of one that has it. Killed at any point, one stays whole.

    staging: where it was written, if not at `staging_path`. The writers have synced their files; the folders are synced here.
    """
    staging, final = staging or staging_path(folder, step), step_path(folder, step)
    assert is_whole(staging), f"{staging} is not complete"
    sync_folder(staging)
    aside = folder / f".step-{step}.replaced"
    if final.exists() and not is_whole(final):
        logger.warning(
            "%s is not a whole checkpoint of this program; it is moved to %s.", final, set_aside(final, "not-ours")
        )
    elif final.exists():
        logger.warning("%s exists and is replaced.", final)
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    staging.rename(final)
    sync_folder(folder)
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
    """Write the manifest of the checkpoint in a folder, with a checksum of its own, through to stable storage."""
    write_text(path / MANIFEST_NAME, json.dumps({**manifest, "checksum": _sum_manifest(manifest)}, indent=1))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint. One that another program wrote has none: the result is empty.

    Raises:
        DamagedError: it is not what was written.
        ValueError: a later version of this program wrote it.
    """
    place = path / MANIFEST_NAME
    try:
        return parse_manifest(place.read_bytes(), place)
    except FileNotFoundError:
        return {}


def parse_manifest(content: bytes, place: Path | str) -> dict[str, Any]:
    """Return what a manifest says. place: where it was read, for messages. Raises as `read_manifest` does."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{place} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise DamagedError(f"{place} is damaged: it holds no table")
    written = manifest.pop("checksum", None)
    # The first format had none.
    if written != _sum_manifest(manifest) and not (written is None and manifest.get("format") == 1):
        raise DamagedError(f"{place} is damaged: CRC-32 {_sum_manifest(manifest)}, written was {written}")
    if manifest.get("format", 0) > FORMAT_VERSION:
        raise UserError(f"{place} has format {manifest['format']}: a later version of this program wrote it")
    return manifest


def get_file_sums(manifest: Mapping[str, Any], path: Path | str) -> dict[str, FileSum]:
    """Return sizes and checksums of the files of the checkpoint at `path`, by name. The first format has none.

    Raises:
        ValueError: the manifest says nonsense, or names a file outside of the checkpoint.
    """
    entries = manifest.get("files", {})
    check_names(entries, f"{path}/{MANIFEST_NAME}")
    return {name: FileSum.from_json(entry) for name, entry in entries.items()}


def find_surplus(path: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """Return the names in a checkpoint's folder that its manifest does not know."""
    return sorted(file.name for file in path.iterdir() if file.name not in sums and file.name != MANIFEST_NAME)


def _sum_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the CRC-32 of what a manifest says, however it is laid out."""
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True, separators=(',', ':')).encode()):08x}"


def size_in_bytes(path: Path) -> int:
    """Return the size of all files in a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir())
