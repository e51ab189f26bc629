"""The plan of best-fit packing: which piece of which document goes into which sequence. Made once, kept on disk.

A sequence has room for `seq_len + 1` tokens, the last of which is only a label. A document of L tokens holds L - 1
labels. One that fits stays whole. A longer one is cut into pieces that begin `seq_len` tokens apart and share one token
with their neighbour (the last label of the one, the first token of the other): each of its labels is trained on once.
Documents of fewer than two tokens hold no label and are left out.

Pieces are placed by best-fit decreasing (Johnson et al. 1974; for language models Ding et al., "Fewer Truncations
Improve Language Modeling", 2024): the longest first, each into the sequence with the least room that is enough.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

PLAN_VERSION = 1
MIN_PIECE = 2  # a token and its label
# Documents packed at a time. It bounds memory; over so many, packing more of them together gains nothing.
GROUP_DOCUMENTS = 4_000_000

_ARRAYS = {"piece_start": "<i8", "piece_length": "<i4", "sequence_first_piece": "<i8"}


@dataclass(frozen=True)
class _Totals:
    n_pieces: int = 0
    n_sequences: int = 0
    n_dropped_tokens: int = 0
    n_padded_places: int = 0
    n_cut_documents: int = 0


class PackingPlan:
    """Pieces of documents in each sequence.

    Args:
        arrays: `piece_start` (n_pieces,) int64, first token in the data set; `piece_length` (n_pieces,) int32;
            `sequence_first_piece` (n_sequences + 1,) int64.
        totals: counts; places and tokens as `PackingReport` has them.
    """

    def __init__(self, arrays: dict[str, np.ndarray], totals: _Totals) -> None:
        self._arrays = arrays
        self.n_sequences = totals.n_sequences
        self.n_dropped_tokens = totals.n_dropped_tokens
        self.n_padded_places = totals.n_padded_places
        self.n_cut_documents = totals.n_cut_documents

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        """List the (first token, length) of each piece of a sequence, in order of place."""
        low, high = self._arrays["sequence_first_piece"][sequence : sequence + 2].tolist()
        starts = self._arrays["piece_start"][low:high].tolist()
        return list(zip(starts, self._arrays["piece_length"][low:high].tolist(), strict=True))


class _Rooms:
    """Open bins by the room they have left."""

    def __init__(self) -> None:
        self._bins: dict[int, list[np.ndarray]] = {}
        self._bits = 0  # bit r is set where there are bins with room r

    def add(self, room: int, bins: np.ndarray) -> None:
        if len(bins) and room >= MIN_PIECE:
            self._bins.setdefault(room, []).append(bins)
            self._bits |= 1 << room

    def take_tightest(self, size: int) -> tuple[int, np.ndarray]:
        """Take out all bins with the least room that is enough for `size`; room 0 where there are none."""
        fitting = self._bits >> size
        if not fitting:
            return 0, np.empty(0, np.int64)
        room = size + (fitting & -fitting).bit_length() - 1  # the lowest bit
        self._bits &= ~(1 << room)
        return room, np.concatenate(self._bins.pop(room))


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Pack items into bins, largest first, each into the open bin with the least room that is enough.

    Bins with the same room are handled together, so the cost grows with the number of distinct sizes rather than with the
    number of items times the number of bins.

    Args:
        sizes: (n,) integers, MIN_PIECE <= size <= capacity.
        capacity: size of a bin.
    Returns:
        (n,) int64 bin of each item, and the number of bins.
    """
    assert sizes.size == 0 or (int(sizes.min()) >= MIN_PIECE and int(sizes.max()) <= capacity), "item size out of range"
    small = sizes.astype(np.uint16) if capacity < 2**16 else sizes  # 16 bits are sorted by radix
    order = np.argsort(small, kind="stable")[::-1]
    counts = np.bincount(sizes, minlength=capacity + 1)
    bin_of = np.empty(len(sizes), dtype=np.int64)  # in the order of `order`
    rooms = _Rooms()
    done = n_bins = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            room, bins = rooms.take_tightest(size)
            if room == 0:
                room, n_new = capacity, -(-left // (capacity // size))
                bins = np.arange(n_bins, n_bins + n_new)
                n_bins += n_new
            # After an item the same bin has the least room, so it takes items until no more fit.
            each = room // size
            n_full = min(left // each, len(bins))
            rest = left - n_full * each if n_full < len(bins) else 0
            placed = n_full * each + rest
            bin_of[done : done + n_full * each] = np.repeat(bins[:n_full], each)
            if rest:
                bin_of[done + n_full * each : done + placed] = bins[n_full]
            touched = n_full + (rest > 0)
            rooms.add(room - each * size, bins[:n_full])
            rooms.add(room - rest * size, bins[n_full:touched])
            rooms.add(room, bins[touched:])
            done += placed
            left -= placed
    result = np.empty_like(bin_of)
    result[order] = bin_of
    return result, n_bins


def cut_documents(starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `seq_len + 1` tokens.

    Args:
        starts: (n + 1,) int64 first token of each document, and the end of the last.
    Returns:
        (pieces,) int64 first token and (pieces,) int64 length of each piece, in order of the data.
    """
    lengths = np.diff(starts)
    n_pieces = np.where(lengths >= MIN_PIECE, -(-(lengths - 1) // seq_len), 0)
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    offset = number * seq_len
    return starts[:-1][document] + offset, np.minimum(lengths[document] - offset, seq_len + 1)


def _plan_groups(document_starts: np.ndarray, seq_len: int, write: Callable[[str, np.ndarray], object]) -> _Totals:
    """Plan GROUP_DOCUMENTS documents at a time, hand each part of the arrays to `write(name, values)`, and add up."""
    sums = _Totals()
    write("sequence_first_piece", np.zeros(1, np.int64))
    for low in range(0, len(document_starts) - 1, GROUP_DOCUMENTS):
        starts = np.asarray(document_starts[low : low + GROUP_DOCUMENTS + 1], dtype=np.int64)
        piece_start, piece_length = cut_documents(starts, seq_len)
        bin_of, n_bins = best_fit_decreasing(piece_length, seq_len + 1)
        by_bin = np.argsort(bin_of, kind="stable")
        used = np.bincount(bin_of, weights=piece_length, minlength=n_bins).astype(np.int64)
        write("piece_start", piece_start[by_bin])
        write("piece_length", piece_length[by_bin])
        write("sequence_first_piece", sums.n_pieces + np.cumsum(np.bincount(bin_of, minlength=n_bins)))
        lengths = np.diff(starts)
        sums = _Totals(
            n_pieces=sums.n_pieces + len(piece_start),
            n_sequences=sums.n_sequences + n_bins,
            n_dropped_tokens=sums.n_dropped_tokens + int(lengths[lengths < MIN_PIECE].sum()),
            n_padded_places=sums.n_padded_places + int(np.maximum(seq_len - used, 0).sum()),
            n_cut_documents=sums.n_cut_documents + int((lengths > seq_len + 1).sum()),
        )
    return sums


def build_plan(document_starts: np.ndarray, *, seq_len: int) -> PackingPlan:
    """Plan a data set, in memory.

    Args:
        document_starts: (n_documents + 1,) int64.
    """
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in _ARRAYS.items()}
    totals = _plan_groups(document_starts, seq_len, lambda name, values: parts[name].append(values))
    return PackingPlan({name: np.concatenate(parts[name]).astype(dtype) for name, dtype in _ARRAYS.items()}, totals)


def write_plan(document_starts: np.ndarray, *, seq_len: int, folder: Path) -> None:
    """Plan a data set into the empty `folder`.

    Args:
        document_starts: (n_documents + 1,) int64.
    Raises:
        OSError: the files cannot be written.
    """
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in _ARRAYS}
        totals = _plan_groups(
            document_starts, seq_len, lambda name, values: files[name].write(values.astype(_ARRAYS[name]).tobytes())
        )
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    with open(folder / "plan.json", "w", encoding="utf-8") as index:
        json.dump({"version": PLAN_VERSION, **asdict(totals)}, index)
        index.flush()
        os.fsync(index.fileno())


def open_plan(folder: Path) -> PackingPlan:
    """Open a plan through memory maps.

    Raises:
        ValueError: it is not whole, or of another version.
    """
    try:
        stored = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        version = stored.pop("version")
        totals = _Totals(**stored)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}: not a packing plan ({error})") from error
    if version != PLAN_VERSION:
        raise ValueError(f"{folder}: packing plan of version {version}, this program reads {PLAN_VERSION}")
    counts = {
        "piece_start": totals.n_pieces,
        "piece_length": totals.n_pieces,
        "sequence_first_piece": totals.n_sequences + 1,
    }
    arrays = {}
    for name, dtype in _ARRAYS.items():
        path = folder / f"{name}.bin"
        expected = counts[name] * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected:
            raise ValueError(f"{path}: {expected} bytes expected; the packing plan is not whole")
        # memmap refuses an empty file.
        arrays[name] = np.memmap(path, dtype=dtype, mode="r") if expected else np.empty(0, dtype)
    return PackingPlan(arrays, totals)


def load_or_build_plan(document_starts: np.ndarray, *, fingerprint: str, seq_len: int, cache_dir: Path) -> PackingPlan:
    """Open the plan of a data set from the cache, or make it there; one process of a host makes it, the others wait.

    Args:
        document_starts: (n_documents + 1,) int64.
        fingerprint: identity of the data set.
        cache_dir: folder of the cache. Where it cannot be written, the plan is made in a temporary folder, with a warning.
    """
    key = hashlib.sha256(f"{PLAN_VERSION}/{seq_len}/{fingerprint}".encode()).hexdigest()[:20]
    folder = cache_dir / "packing" / key
    with contextlib.suppress(ValueError):
        return open_plan(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if folder.exists():
                with contextlib.suppress(ValueError):
                    return open_plan(folder)  # made while this process waited
                logger.warning("%s is damaged and is made again", folder)
                shutil.rmtree(folder)
            return _build_into(folder, document_starts, seq_len)
    except OSError as error:
        logger.warning(
            "the packing plan cannot be kept in data.cache_dir (%s): it is made for this run alone, in memory", error
        )
        return build_plan(document_starts, seq_len=seq_len)


def _build_into(folder: Path, document_starts: np.ndarray, seq_len: int) -> PackingPlan:
    began = time.monotonic()
    logger.info("packing %s documents into sequences of %s tokens", f"{len(document_starts) - 1:,}", f"{seq_len:,}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".plan-", ignore_cleanup_errors=True) as temporary:
        whole = Path(temporary) / "plan"
        whole.mkdir()
        write_plan(document_starts, seq_len=seq_len, folder=whole)
        try:
            os.rename(whole, folder)
        except OSError:
            if not folder.exists():  # else another host was faster: its plan is the same
                raise
    logger.info("packing planned in %.1f s: %s", time.monotonic() - began, folder)
    return open_plan(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock. Where the file system has none, go on without: the rename keeps the result whole."""
    with open(path, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
