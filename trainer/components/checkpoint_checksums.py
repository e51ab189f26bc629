"""Checksums of a checkpoint's files: taken from the bytes on their way to the disk, and compared when they are read.

The checksum is CRC-32 as zlib, gzip and `cksum -a crc32b` have it. Blocks of a file are summed in several threads (zlib
works outside of the interpreter's lock) and their sums combined, so that it is no slower than the disk.
"""

import functools
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

BLOCK_BYTES = 8 * 2**20
"""What one thread sums at a time."""


@dataclass(frozen=True)
class FileSum:
    """What a manifest says of a file."""

    bytes: int
    """Its size."""
    crc32: str
    """Eight hexadecimal digits."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Any) -> "FileSum":
        """Raises ValueError if the entry is not one that `to_json` makes."""
        try:
            return cls(int(entry["bytes"]), str(entry["crc32"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{entry!r} is no size and checksum of a file") from error


# --- the sum ---


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two blocks together from that of each, as zlib's `crc32_combine` does (Mark Adler, zlib 1.2.12)."""
    return _multiply(_power_of_x(8 * second_bytes), first) ^ second


_POLYNOMIAL = 0xEDB88320  # of CRC-32, lowest power in the highest bit


def _multiply(a: int, b: int) -> int:
    """Return a * b modulo the polynomial."""
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return product


@functools.lru_cache(maxsize=256)
def _power_of_x(exponent: int) -> int:
    """Return x^exponent modulo the polynomial."""
    power, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _combine_all(blocks: Iterable[tuple[int, int]]) -> int:
    """Return the sum of blocks in a row, from (sum, bytes) of each."""
    total = 0
    for crc, length in blocks:
        total = combine_crc32(total, crc, length)
    return total


def make_pool() -> ThreadPoolExecutor:
    """Return threads to sum with: enough to keep up with a disk, and few enough for eight ranks of a host to train beside them."""
    return ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="checksum")


def sum_file(path: Path, pool: ThreadPoolExecutor) -> FileSum:
    """Return size and checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size

        def sum_block(start: int) -> tuple[int, int]:
            block = os.pread(descriptor, BLOCK_BYTES, start)
            return zlib.crc32(block), len(block)

        blocks = list(pool.map(sum_block, range(0, size, BLOCK_BYTES)))
    finally:
        os.close(descriptor)
    return FileSum(sum(length for _, length in blocks), f"{_combine_all(blocks):08x}")


# --- on the way to the disk ---


class ChecksumWriter(dcp.FileSystemWriter):
    """Writes the tensors of one rank as DCP does, synced to stable storage, and sums each file while it is written."""

    def __init__(self, path: Path, *, reads_ahead: bool = True) -> None:
        """reads_ahead: where there is a GPU, copy the next tensors from it while one is written."""
        super().__init__(path, sync_files=True, per_thread_copy_ahead=10_000_000 if reads_ahead else 0)
        self._summing = _SummingFileSystem()
        self.fs = self._summing

    @property
    def file_sums(self) -> dict[str, FileSum]:
        """What this rank wrote, by file name."""
        return self._summing.file_sums


class _SummingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.file_sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream, make_pool() as pool:
            if mode != "wb":
                yield stream
                return
            summing = _SummingStream(cast(io.BufferedWriter, stream), pool)
            yield summing
            self.file_sums[Path(path).name] = FileSum(summing.bytes, f"{summing.crc32:08x}")

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.file_sums[Path(new_path).name] = self.file_sums.pop(Path(path).name)


class _SummingStream(io.RawIOBase):
    """Passes bytes on to a file, one after the other, and sums them."""

    def __init__(self, file: io.BufferedWriter, pool: ThreadPoolExecutor) -> None:
        self._file = file
        self._pool = pool
        self.crc32 = 0
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) > BLOCK_BYTES:
            # Summed while it is written.
            summing = [(self._pool.submit(zlib.crc32, block), len(block)) for block in _split(view)]
            self._write(view)
            crc = _combine_all((future.result(), length) for future, length in summing)
        else:
            self._write(view)
            crc = zlib.crc32(view)
        self.crc32 = combine_crc32(self.crc32, crc, len(view))
        self.bytes += len(view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        written = self._file.write(view)
        assert written == len(view), "a buffered file takes all it is given"

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        if not self.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()


def _split(view: memoryview) -> list[memoryview]:
    return [view[start : start + BLOCK_BYTES] for start in range(0, len(view), BLOCK_BYTES)]


# --- when it is read ---

_RANK_OF_FILE = re.compile(r"__(\d+)_")


def share_files(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """Return the files that one of several ranks answers for: those of the rank that wrote them, which it will read too.

    Each file falls to one rank, whatever number of ranks wrote it.
    """
    owners = {name: int(match[1]) if (match := _RANK_OF_FILE.match(name)) else 0 for name in names}
    return sorted(name for name, owner in owners.items() if owner % world_size == rank)


def find_damage(folder: Path, wanted: Mapping[str, FileSum], *, shallow: bool = False) -> dict[str, str]:
    """Return what is wrong with files of a folder, by name: missing, of another size, or of another content.

    shallow: compare the sizes alone.
    """
    damage: dict[str, str] = {}
    with make_pool() as pool:
        for name, expected in wanted.items():
            try:
                size = (folder / name).stat().st_size
                if size != expected.bytes:
                    damage[name] = f"has {size} of {expected.bytes} bytes"
                elif not shallow and (found := sum_file(folder / name, pool)) != expected:
                    damage[name] = f"is damaged: CRC-32 {found.crc32}, written was {expected.crc32}"
            except FileNotFoundError:
                damage[name] = MISSING
            except OSError as error:
                damage[name] = f"cannot be read: {error}"
    return damage


MISSING = "is missing"
