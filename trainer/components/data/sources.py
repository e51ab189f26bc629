"""The table of data sets: one line each, from a name to the files that hold its documents."""

import glob
import hashlib
import json
import logging
import platform
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.components.data.document_files import (
    COMPRESSIONS,
    DocumentFile,
    HuggingFaceShard,
    JsonlFile,
    LocalFile,
    ParquetFile,
    TextFile,
    load_hugging_face,
)
from trainer.config.errors import UserError
from trainer.config.fields import suggest

logger = logging.getLogger(__name__)

PREPARED = "prepared"
HUGGING_FACE_PREFIX = "hf:"

_JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_STDLIB_HELD_OUT = 20  # one file in so many is for validation

OpenFiles = Callable[[str | None, str, str], Sequence[DocumentFile]]
"""(path, text_key, split) -> files, in a fixed order. Raises ValueError where there are none."""


@dataclass(frozen=True)
class SourceSpec:
    """One data set of the table.

    Attributes:
        open_files: finds its files; None for token files, which are not read as documents.
        path: whether `dataset_path` is "required", "optional" or "none".
        on_hub: its name for the `datasets` library, where it is taken from there when no path is given.
    """

    name: str
    description: str
    open_files: OpenFiles | None
    path: str = "required"
    on_hub: str = ""


class BadRows:
    """Counts rows that cannot be used, names each in the log, and raises ValueError past the limit."""

    def __init__(self, limit: int, count: int = 0) -> None:
        self.limit = limit
        self.count = count

    def add(self, where: str, problem: str) -> None:
        """Counts one row; `where` names file and row."""
        self.count += 1
        logger.warning("bad row, left out: %s: %s", where, problem)
        if self.count > self.limit:
            raise UserError(
                f"{self.count} rows cannot be used, more than data.max_bad_rows = {self.limit}; the last one: {where}: {problem}"
            )


def get_source_spec(name: str) -> SourceSpec:
    """Returns the table's line for `training.dataset`. Raises: ValueError with the known names for an unknown one."""
    if name.startswith(HUGGING_FACE_PREFIX) and len(name) > len(HUGGING_FACE_PREFIX):
        return _hugging_face_spec(name)
    if name in SOURCES:
        return SOURCES[name]
    known = [*SOURCES, HUGGING_FACE_PREFIX + "NAME"]
    raise UserError(f"unknown data set {name!r}.{suggest(name, known)} Known: {', '.join(known)}")


def register_source(spec: SourceSpec) -> None:
    """Adds a data set to the table, from a module named by `experimental.custom_import`. Raises: ValueError for a name in use."""
    if spec.name in SOURCES or spec.name.startswith(HUGGING_FACE_PREFIX):
        raise ValueError(f"the data set {spec.name!r} is registered already")
    SOURCES[spec.name] = spec


def check_source_path(spec: SourceSpec, path: str | None) -> None:
    """Checks, without reading anything, that `path` is given where the data set needs one and exists.

    Raises: ValueError naming the data set and the remedy.
    """
    if spec.path == "required" and not path:
        raise UserError(f"data set {spec.name!r} needs a path ({spec.description}): set training.dataset_path")
    if spec.path == "none" and path:
        raise UserError(f"data set {spec.name!r} takes no path, but {path!r} is given: remove training.dataset_path")
    if not path or Path(path).expanduser().exists():
        return
    if not glob.has_magic(path):
        raise UserError(f"data set {spec.name!r}: {path} does not exist")
    if next(glob.iglob(str(Path(path).expanduser()), recursive=True), None) is None:
        raise UserError(f"data set {spec.name!r}: no file matches {path}")


def open_documents(spec: SourceSpec, path: str | None, *, text_key: str, split: str) -> list[DocumentFile]:
    """Returns the files of a data set, in a fixed order. Reads names and sizes only (a hub data set: its list of files).

    Args:
        path: file, glob or folder, as the data set takes it.
        text_key: field or column with the text.
        split: split of a Hugging Face data set.

    Raises: ValueError where nothing is found.
    """
    check_source_path(spec, path)
    if spec.open_files is None:
        raise UserError(f"data set {spec.name!r} holds token ids, not text; it cannot be read as documents")
    files = list(spec.open_files(path, text_key, split))
    if not files:
        raise UserError(f"data set {spec.name!r}: no files with documents" + (f" in {path}" if path else ""))
    return files


def get_inputs_fingerprint(spec: SourceSpec, path: str | None, *, text_key: str, split: str) -> str:
    """Returns a hash of what the data set is read from: paths, sizes and times of change; the key of its cache.

    A data set from the hub is told by its name alone, so that a prepared one is found again without a network.
    """
    check_source_path(spec, path)
    if spec.on_hub and not path:
        inputs: list = [spec.on_hub]
    elif spec.name.startswith(HUGGING_FACE_PREFIX):
        folder = Path(path or _split_hugging_face_name(spec.name)[0]).expanduser()
        inputs = [TextFile(file).identity() for file in _files_in(folder, None)]
    elif spec.path == "none" and spec.name.startswith("stdlib"):
        inputs = [
            platform.python_version(),
            [[f.name, f.n_bytes] for f in open_documents(spec, path, text_key=text_key, split=split)],
        ]
    else:
        inputs = [file.identity() for file in open_documents(spec, path, text_key=text_key, split=split)]
    return hashlib.sha256(json.dumps([spec.name, text_key, split, inputs]).encode()).hexdigest()


def _open_stdlib(path: str | None, text_key: str, split: str) -> list[DocumentFile]:
    return [file for number, file in _stdlib_files() if number]


def _open_stdlib_validation(path: str | None, text_key: str, split: str) -> list[DocumentFile]:
    return [file for number, file in _stdlib_files() if not number]


def _stdlib_files() -> list[tuple[int, DocumentFile]]:
    """Returns the library's source files in the order of their names, each with a number from its name, 0 being held out."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py") if file.is_file())
    wanted = [name for name in relative if not _TESTS.intersection(name.split("/"))]
    if not wanted:
        raise UserError(
            f"data set 'stdlib': this Python has no source files in {root}; give text of your own (training.dataset = 'text')"
        )
    return [
        (zlib.crc32(name.encode()) % _STDLIB_HELD_OUT, TextFile(root / name, python_source=True)) for name in wanted
    ]


def _open_text(path: str | None, text_key: str, split: str) -> list[DocumentFile]:
    return [TextFile(file) for file in _find(path, None)]


def _open_jsonl(path: str | None, text_key: str, split: str) -> list[DocumentFile]:
    return [JsonlFile(file, text_key) for file in _find(path, _JSONL_SUFFIXES)]


def _open_parquet(path: str | None, text_key: str, split: str) -> list[DocumentFile]:
    return [ParquetFile(file, text_key) for file in _find(path, _PARQUET_SUFFIXES)]


def _open_c4(part: str) -> OpenFiles:
    """Returns the opener of one part of C4: from the hub, or from a folder that holds the hub's files (or a sample of them)."""

    def open_files(path: str | None, text_key: str, split: str) -> Sequence[DocumentFile]:
        if path is None:
            return _open_hub("allenai/c4", "en", part, text_key)
        files = _find(path, (*_JSONL_SUFFIXES, *_PARQUET_SUFFIXES))
        named = [file for file in files if f"c4-{part}." in file.name]
        others = [file for file in files if not file.name.startswith("c4-")]
        return [_local_rows(file, text_key) for file in named or others]

    return open_files


def _hugging_face_spec(name: str) -> SourceSpec:
    """Returns the spec of `hf:NAME` or `hf:NAME:CONFIG`, where NAME may be a local folder."""
    dataset, config = _split_hugging_face_name(name)

    def open_files(path: str | None, text_key: str, split: str) -> Sequence[DocumentFile]:
        return _open_hub(path or dataset, config or None, split, text_key)

    # As `datasets` itself has it, a folder goes before a name on the hub.
    on_hub = "" if Path(dataset).expanduser().is_dir() else name
    return SourceSpec(name, "a data set of the `datasets` library", open_files, path="optional", on_hub=on_hub)


def _split_hugging_face_name(name: str) -> tuple[str, str]:
    """Returns NAME and CONFIG of `hf:NAME:CONFIG`; CONFIG may be empty."""
    dataset, _, config = name[len(HUGGING_FACE_PREFIX) :].partition(":")
    return dataset, config


def _open_hub(path: str, config: str | None, split: str, text_key: str) -> list[DocumentFile]:
    n_shards = load_hugging_face(path, config, split).num_shards
    return [HuggingFaceShard(path, config, split, text_key, shard, n_shards) for shard in range(n_shards)]


def _local_rows(file: Path, text_key: str) -> LocalFile:
    return ParquetFile(file, text_key) if file.suffix in _PARQUET_SUFFIXES else JsonlFile(file, text_key)


def _find(path: str | None, suffixes: tuple[str, ...] | None) -> list[Path]:
    """Returns the files of a path, a folder (searched to any depth) or a glob, sorted by name."""
    assert path is not None, "check_source_path has refused a missing path"
    found = Path(path).expanduser()
    if found.is_dir():
        return _files_in(found, suffixes)
    if found.is_file():
        return [found]
    return sorted(Path(file) for file in glob.glob(str(found), recursive=True) if Path(file).is_file())


def _files_in(folder: Path, suffixes: tuple[str, ...] | None) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return sorted(file for file in visible if suffixes is None or _kind_suffix(file) in suffixes)


def _kind_suffix(file: Path) -> str:
    """Returns the suffix that tells the kind of a file, under a compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


SOURCES: dict[str, SourceSpec] = {
    spec.name: spec
    for spec in (
        SourceSpec("stdlib", "source and documentation strings of Python's standard library", _open_stdlib, "none"),
        SourceSpec(
            "stdlib_validation", "the files that `stdlib` leaves out, one in 20", _open_stdlib_validation, "none"
        ),
        SourceSpec("text", "text files, one document a file: a file, glob or folder", _open_text),
        SourceSpec("jsonl", "JSON objects, one a line, plain or compressed: a file, glob or folder", _open_jsonl),
        SourceSpec("parquet", "Parquet files with a column of text: a file, glob or folder", _open_parquet),
        SourceSpec(PREPARED, "a folder of token files, made by scripts/prepare_data.py", None),
        SourceSpec("c4", "C4, English, training part", _open_c4("train"), "optional", "allenai/c4:train"),
        SourceSpec(
            "c4_validation", "C4, English, validation part", _open_c4("validation"), "optional", "allenai/c4:val"
        ),
        SourceSpec("c4_test", "a local sample of C4", _open_c4("train")),
    )
}
