"""Readers of documents: text files, JSONL, Parquet, Hugging Face data sets, and functions that yield text.

A `DocumentFile` is the unit of reading. A *position* in it is an integer that grows along the file and from which
reading can go on: a byte for JSONL, a row for Parquet and Hugging Face data sets, a piece for text.
"""

import bz2
import functools
import gzip
import importlib
import itertools
import json
import lzma
import sys
import tokenize
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from trainer.config.errors import UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_TEXT_PIECE_BYTES = 16 * 2**20
_LINE_COUNT_BYTES = 2**28  # further into a file, a bad line is named by its byte: counting lines would take too long
_PARQUET_BATCH_ROWS = 256


class Document(NamedTuple):
    """One document, or, where `problem` is not empty, a row that cannot be used."""

    text: str
    position: int
    next_position: int
    """Where reading goes on after this document."""
    problem: str = ""


class Span(NamedTuple):
    """Part of a file: the documents that begin at a position in [start, stop); `n_bytes` of the file, for progress."""

    start: int
    stop: int | None
    n_bytes: int


class DocumentFile(ABC):
    """A file, or a part of a data set, that is read as documents. Small and picklable: workers open it themselves."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Path or other name, for messages."""

    @property
    def n_bytes(self) -> int:
        """Size on disk; 0 where unknown."""
        return 0

    @property
    def seekable(self) -> bool:
        """Whether reading from any position is cheap, so that several processes can share the file."""
        return True

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Yields the documents that begin at a position in [start, stop), in order; to the end where `stop` is None.

        Raises: ValueError naming the file where all of it is unusable; OSError where reading fails.
        """

    @abstractmethod
    def identity(self) -> list[Any]:
        """Returns what changes when the content does (path, size, time of change), for the key of a cache."""

    def split(self, target_bytes: int) -> Iterator[Span]:
        """Yields consecutive spans of about `target_bytes` that cover the file."""
        yield Span(0, None, self.n_bytes)

    def locate(self, position: int) -> str:
        """Returns file and row of a position, for a person."""
        return f"{self.name}, row {position}"


class LocalFile(DocumentFile):
    """Base of what is one file on disk."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def n_bytes(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> list[Any]:
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class TextFile(LocalFile):
    """Plain text, one document a file; past 32 MiB it is cut into documents of about 16 MiB at ends of lines.

    A position is the number of the piece.
    """

    path: Path
    python_source: bool = False
    """Heed the encoding that a Python file declares."""

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        with _open_binary(self.path) as file:
            pieces = self._n_pieces()
            for piece in range(start, pieces if stop is None else min(stop, pieces)):
                content = file.read() if pieces == 1 else _read_piece(file, piece, last=piece == pieces - 1)
                try:
                    text, problem = self._decode(content), ""
                except (UnicodeDecodeError, SyntaxError, LookupError) as error:
                    text, problem = "", f"not valid text: {error}"
                if "\0" in text:
                    text, problem = "", "it holds NUL bytes, so it is no text"
                yield Document(text, piece, piece + 1, problem)

    def split(self, target_bytes: int) -> Iterator[Span]:
        pieces = self._n_pieces()
        for piece in range(pieces):
            yield Span(piece, piece + 1, self.n_bytes // pieces)

    def locate(self, position: int) -> str:
        return self.name if self._n_pieces() == 1 else f"{self.name}, byte {position * _TEXT_PIECE_BYTES}"

    def _n_pieces(self) -> int:
        if self.path.suffix in COMPRESSIONS or self.python_source:
            return 1
        return max(1, self.n_bytes // _TEXT_PIECE_BYTES)

    def _decode(self, content: bytes) -> str:
        if not self.python_source:
            return content.decode("utf-8-sig")
        encoding, _ = tokenize.detect_encoding(iter(content.splitlines(keepends=True)).__next__)
        return content.decode(encoding)


@dataclass(frozen=True)
class JsonlFile(LocalFile):
    """One JSON object a line, plain or compressed. A position is the byte (uncompressed) where a line begins."""

    path: Path
    text_key: str = "text"

    @property
    def seekable(self) -> bool:
        return self.path.suffix not in COMPRESSIONS

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        with _open_binary(self.path) as file:
            position = _seek_line(file, start)
            while stop is None or position < stop:
                line = file.readline()
                if not line:
                    return
                end = position + len(line)
                if line.strip():
                    text, problem = self._parse(line)
                    yield Document(text, position, end, problem)
                position = end

    def split(self, target_bytes: int) -> Iterator[Span]:
        if not self.seekable:
            yield Span(0, None, self.n_bytes)
            return
        size = self.n_bytes
        for start in range(0, max(size, 1), target_bytes):
            yield Span(start, start + target_bytes, min(target_bytes, size - start))

    def locate(self, position: int) -> str:
        if position > _LINE_COUNT_BYTES:
            return f"{self.name}, byte {position}"
        with _open_binary(self.path) as file:
            lines_before = file.read(position).count(b"\n")
        return f"{self.name}, line {lines_before + 1}"

    def _parse(self, line: bytes) -> tuple[str, str]:
        try:
            row = json.loads(line.rstrip())
        except UnicodeDecodeError as error:
            return "", f"not valid UTF-8: {error}"
        except (ValueError, RecursionError) as error:
            return "", f"not valid JSON: {error}"
        if not isinstance(row, dict):
            return "", f"a JSON {type(row).__name__} where an object is expected"
        return _text_of(row, self.text_key)


@dataclass(frozen=True)
class ParquetFile(LocalFile):
    """A Parquet file with a column of strings. A position is a row."""

    path: Path
    text_key: str = "text"

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        with self._open() as parquet:
            groups = self._row_groups(parquet)
            wanted = [g for g, (a, b, _) in enumerate(groups) if b > start and (stop is None or a < stop)]
            if not wanted:
                return
            row = groups[wanted[0]][0]
            for batch in parquet.iter_batches(_PARQUET_BATCH_ROWS, row_groups=wanted, columns=[self.text_key]):
                for value in self._values(batch.column(0)):
                    if stop is not None and row >= stop:
                        return
                    if row >= start:
                        yield _decoded(value, row, self.text_key)
                    row += 1

    def split(self, target_bytes: int) -> Iterator[Span]:
        with self._open() as parquet:
            start, n_bytes = 0, 0
            for _, stop, size in self._row_groups(parquet):
                n_bytes += size
                if n_bytes >= target_bytes:
                    yield Span(start, stop, n_bytes)
                    start, n_bytes = stop, 0
            if n_bytes:
                yield Span(start, None, n_bytes)

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{self.path}: not a whole Parquet file ({error})") from error

    def _row_groups(self, parquet: Any) -> list[tuple[int, int, int]]:
        """Returns first row, end and bytes of each group; checks the column first."""
        import pyarrow

        schema = parquet.schema_arrow
        if self.text_key not in schema.names:
            raise UserError(
                f"{self.path} has no column {self.text_key!r}, it has {', '.join(schema.names)}: set data.text_key"
            )
        kind = schema.field(self.text_key).type
        if not any(check(kind) for check in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
            raise UserError(f"{self.path}: column {self.text_key!r} is {kind}, not string: set data.text_key")
        metadata = parquet.metadata
        column = parquet.schema.names.index(self.text_key) if self.text_key in parquet.schema.names else 0
        groups, row = [], 0
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            size = group.column(column).total_uncompressed_size
            groups.append((row, row + group.num_rows, size))
            row += group.num_rows
        return groups

    @staticmethod
    def _values(column: Any) -> list[bytes | None]:
        import pyarrow

        # As bytes, so that one broken string does not spoil the rows around it.
        kind = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
        return column.cast(kind).to_pylist()


@dataclass(frozen=True)
class HuggingFaceShard(DocumentFile):
    """One of the files behind a data set of the `datasets` library. A position is a row of that file."""

    path: str
    config: str | None
    split_name: str
    text_key: str
    shard: int
    n_shards: int

    @property
    def name(self) -> str:
        part = f", part {self.shard} of {self.n_shards}" if self.n_shards > 1 else ""
        return f"{self.path}{f' ({self.config})' if self.config else ''}, split {self.split_name}{part}"

    @property
    def seekable(self) -> bool:
        return False

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        rows = load_hugging_face(self.path, self.config, self.split_name)
        if self.n_shards > 1:
            rows = rows.shard(num_shards=self.n_shards, index=self.shard)
        if start:
            rows = rows.skip(start)
        for number, row in enumerate(rows, start=start):
            if stop is not None and number >= stop:
                return
            text, problem = _text_of(row, self.text_key)
            yield Document(text, number, number + 1, problem)

    def identity(self) -> list[Any]:
        return [self.path, self.config, self.split_name, self.text_key, self.shard, self.n_shards]


@dataclass(frozen=True)
class GeneratedFile(DocumentFile):
    """Documents from a function of a module of yours, called as `function(*arguments)`: strings, the same each time.

    Attributes:
        version: change it when the function yields other documents, so that they are tokenized anew.
    """

    function: Callable[..., Iterable[str]]
    arguments: tuple[Any, ...] = ()
    version: str = "1"

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}{self.arguments}"

    @property
    def seekable(self) -> bool:
        return False

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        for number, text in enumerate(itertools.islice(self.function(*self.arguments), start, stop), start=start):
            problem = "" if isinstance(text, str) else f"{type(text).__name__} where a string is expected"
            yield Document("" if problem else text, number, number + 1, problem)

    def identity(self) -> list[Any]:
        return [self.function.__module__, self.function.__qualname__, repr(self.arguments), self.version]


@functools.lru_cache(maxsize=8)
def load_hugging_face(path: str, config: str | None, split: str) -> Any:
    """Returns the rows of a data set as a `datasets.IterableDataset`; once in each process.

    Raises: ValueError naming the data set, with the library's reason.
    """
    import datasets

    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(path)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return rows.to_iterable_dataset()
        return datasets.load_dataset(path, config, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds, its own and those of the network
        where = path if config is None else f"{path} ({config})"
        raise UserError(
            f"data set {where}, split {split!r}, cannot be opened: {type(error).__name__}: {error}"
        ) from error


def _text_of(row: dict[str, Any], key: str) -> tuple[str, str]:
    """Returns the text of a row, or why there is none."""
    if key not in row:
        return "", f"no field {key!r}, it has {', '.join(map(str, row)) or 'none'} (data.text_key names the field)"
    if not isinstance(row[key], str):
        return "", f"field {key!r} is {type(row[key]).__name__}, not a string"
    return row[key], ""


def _decoded(value: bytes | None, row: int, key: str) -> Document:
    if value is None:
        return Document("", row, row + 1, f"column {key!r} is null")
    try:
        return Document(value.decode(), row, row + 1)
    except UnicodeDecodeError as error:
        return Document("", row, row + 1, f"column {key!r} is not valid UTF-8: {error}")


class _Decompressed:
    """A compressed file whose damage is told by its name."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file

    def __enter__(self) -> "_Decompressed":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._file, name)

        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise UserError(f"{self._path}: damaged or cut short ({error})") from error

        return call


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix not in COMPRESSIONS:
        return open(path, "rb")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
    return cast(BinaryIO, _Decompressed(path, openers[path.suffix](path, "rb")))


def _open_zst(path: Path, mode: str) -> Any:
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").open(path, mode)
    try:
        return importlib.import_module("zstandard").open(path, mode)
    except ImportError as error:
        raise UserError(
            f"{path}: reading .zst needs Python 3.14 or the package zstandard (pip install zstandard)"
        ) from error


def _seek_line(file: BinaryIO, start: int) -> int:
    """Goes to the first line that begins at `start` or later; returns its byte."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _read_piece(file: BinaryIO, piece: int, *, last: bool) -> bytes:
    """Returns the lines that begin in a piece of a long text."""
    start = _seek_line(file, piece * _TEXT_PIECE_BYTES)
    if last:
        return file.read()
    content = file.read(max(0, (piece + 1) * _TEXT_PIECE_BYTES - start))
    return content + (file.readline() if content and not content.endswith(b"\n") else b"")
