"""One file of prepared data: a header page, then numbers that are memory-mapped, with checksums over both.

Files are written beside their place and renamed when they are whole and on disk, so a half file never looks whole.

All numbers are little-endian. The header page (4096 bytes) is magic (8 bytes), version, length and CRC-32 of a JSON
object (3 x uint32), then that object. A shard holds token ids, uint16 where the vocabulary allows it and uint32
otherwise, then document offsets: int64, one more than there are documents, in tokens from the start of the shard.
"""

import contextlib
import errno
import json
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.components import durable_files
from trainer.config.errors import RunError, UserError

FORMAT_VERSION = 1
PAGE = 4096
"""The payload starts on a page, so that a map of it is aligned for every dtype."""
OFFSET_DTYPE = np.dtype("<i8")

_MAGIC = b"BLMTOKEN"
_PREFIX = struct.Struct("<8sIII")  # magic, version, length and CRC-32 of the JSON header
_CRC_CHUNK = 16 * 2**20


class OutOfSpaceError(RunError, OSError):
    """The disk (or quota) is full. What was whole stays, the half-written file is removed."""

    def __str__(self) -> str:
        return str(self.strerror)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype that holds ids 0..vocab_size-1: uint16 or uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_name(number: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:05d}.tokens"


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself."""

    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    n_tokens: int
    n_documents: int
    tokens_crc32: int
    documents_crc32: int
    resume: dict[str, Any] = field(default_factory=dict)
    """Where in the source the shard ends; only `prepare` reads it."""

    @property
    def documents_offset(self) -> int:
        """Byte at which the document offsets begin."""
        return PAGE + _align(self.n_tokens * np.dtype(self.dtype).itemsize, 8)

    @property
    def file_size(self) -> int:
        """Bytes of a whole shard file."""
        return self.documents_offset + (self.n_documents + 1) * OFFSET_DTYPE.itemsize


class ShardWriter:
    """Writes one shard beside its final place (`.tmp`) and renames it when it is whole and on disk.

    Raises: OutOfSpaceError where the disk is full (the half file is removed first), ValueError for an id that the
    vocabulary does not have.
    """

    def __init__(self, path: Path, *, vocab_size: int, tokenizer_fingerprint: str) -> None:
        self.path = path
        self.n_tokens = 0
        self._vocab_size = vocab_size
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._dtype = token_dtype(vocab_size)
        self._ends: list[np.ndarray] = [np.zeros(1, dtype=OFFSET_DTYPE)]
        self._crc = 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open_for_writing(self._temporary)
        self._guarded_write(b"\0" * PAGE)  # no magic until the payload is there

    @property
    def n_documents(self) -> int:
        return sum(len(ends) for ends in self._ends) - 1

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds documents.

        Args:
            tokens: (n,) ids of all documents, one after the other.
            lengths: (documents,) tokens of each; they sum to n.
        """
        assert int(lengths.sum()) == len(tokens), "document lengths must sum to the number of tokens"
        if len(tokens) and int(tokens.max()) >= self._vocab_size:
            raise UserError(
                f"{self.path}: token id {int(tokens.max())} is outside the vocabulary of {self._vocab_size}; "
                "was the data tokenized with another tokenizer?"
            )
        payload = tokens.astype(self._dtype).tobytes()
        self._crc = zlib.crc32(payload, self._crc)
        self._guarded_write(payload)
        self._ends.append(self.n_tokens + np.cumsum(lengths, dtype=OFFSET_DTYPE))
        self.n_tokens += len(tokens)

    def commit(self, resume: Mapping[str, Any] | None = None) -> ShardHeader:
        """Completes the file, syncs it to disk and gives it its name."""
        offsets = np.concatenate(self._ends)
        header = ShardHeader(
            dtype=self._dtype.name,
            vocab_size=self._vocab_size,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            n_tokens=self.n_tokens,
            n_documents=len(offsets) - 1,
            tokens_crc32=self._crc,
            documents_crc32=zlib.crc32(offsets.tobytes()),
            resume=dict(resume or {}),
        )
        tokens_end = PAGE + self.n_tokens * self._dtype.itemsize
        self._guarded_write(b"\0" * (header.documents_offset - tokens_end))
        self._guarded_write(offsets.tobytes())
        try:
            seal_file(self._file, asdict(header), self._temporary, self.path)
        except OSError as error:
            self.abort()
            raise explain_write_error(error, self.path, header.file_size) from error
        return header

    def abort(self) -> None:
        """Removes what was written. Harmless after `commit`."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _guarded_write(self, payload: bytes) -> None:
        try:
            self._file.write(payload)
        except OSError as error:
            self.abort()
            raise explain_write_error(
                error, self.path, PAGE + self.n_tokens * self._dtype.itemsize + len(payload)
            ) from error


def read_shard_header(path: Path) -> ShardHeader:
    """Returns the header of a whole shard.

    Raises: ValueError naming the file where it is missing, foreign, of another version, damaged or cut short.
    """
    raw = read_header(path)
    try:
        header = ShardHeader(**raw)
    except TypeError as error:
        raise UserError(f"{path}: the header does not describe a token shard ({error})") from error
    check_size(path, header.file_size)
    return header


def _align(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def open_for_writing(path: Path) -> BinaryIO:
    """Opens a new file; in a place of its own so that tests can fill up the disk."""
    return open(path, "wb")


def seal_file(file: BinaryIO, header: Mapping[str, Any], temporary: Path, path: Path) -> None:
    """Writes the header page last, then syncs and renames."""
    text = json.dumps(header).encode()
    assert _PREFIX.size + len(text) <= PAGE, f"the header of {path} does not fit in one page"
    file.seek(0)
    file.write(_PREFIX.pack(_MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text)) + text)
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        durable_files.sync_folder(folder)


def explain_write_error(error: OSError, path: Path, needed: int) -> OSError:
    """Returns the error to raise: OutOfSpaceError with bytes `needed` and free where the disk is full, else the same one."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    free = shutil.disk_usage(path.parent).free
    return OutOfSpaceError(
        error.errno,
        f"no space left for {path.name}: it needs at least {needed / 2**20:,.0f} MiB and {path.parent} has "
        f"{free / 2**20:,.0f} MiB free. Whole shards were kept: free some space and run again to go on from there",
    )


def read_header(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a header page. Raises: ValueError naming the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            page = file.read(PAGE)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(page) < PAGE or page[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{path}: not a whole token file (its header is missing)")
    _, version, length, crc = _PREFIX.unpack_from(page)
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; prepare anew")
    text = page[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(text) != crc:
        raise UserError(f"{path}: the checksum of its header is wrong")
    return json.loads(text)


def check_size(path: Path, expected: int) -> None:
    """Raises: ValueError where the file is not there or has another size than `expected` bytes."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if size != expected:
        raise UserError(f"{path}: {size} bytes where {expected} are expected; the file was cut short or replaced")


def map_array(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """Returns (count,) numbers of a file from byte `offset` on, memory-mapped and read-only."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=offset)


def get_file_crc32(path: Path, offset: int, size: int) -> int:
    """Returns the CRC-32 of `size` bytes of a file from byte `offset` on."""
    crc = 0
    with open(path, "rb") as file:
        file.seek(offset)
        while size > 0:
            chunk = file.read(min(size, _CRC_CHUNK))
            if not chunk:
                break
            crc = zlib.crc32(chunk, crc)
            size -= len(chunk)
    return crc
