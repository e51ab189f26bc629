"""Tokenizes a text source into token files: in parallel, in a fixed order, and so that an interrupted run goes on.

The documents of a source have one order, and a shard ends with the first document that brings it to `shard_tokens`. So
the files are the same byte for byte for any number of workers and any interruptions. Each shard notes in its header
where in the source it ends; a run that finds whole shards goes on from there.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.components.data.document_files import DocumentFile
from trainer.components.data.sources import PREPARED, BadRows, get_inputs_fingerprint, get_source_spec, open_documents
from trainer.components.data.token_files import (
    DEFAULT_SHARD_TOKENS,
    INDEX_NAME,
    TokenDataset,
    finish_dataset,
)
from trainer.components.data.token_shards import ShardWriter, read_shard_header, shard_name
from trainer.components.data.tokenize_tasks import Chunk, count_workers, plan_tasks, run_tasks
from trainer.components.tokenizer import Tokenizer
from trainer.config.errors import UserError
from trainer.config.schema import DataConfig

logger = logging.getLogger(__name__)

PREPARE_VERSION = 1
"""Part of the key of the cache: raise it when the same text would give other tokens."""

_WAIT_SECONDS = 0.2
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class PrepareStats:
    """What one call of `prepare` did; shards of an earlier, interrupted run count in all but `seconds` and `new_tokens`."""

    n_documents: int
    n_tokens: int
    n_text_bytes: int
    n_bad_rows: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True)
class _Place:
    """Where in the source the written documents end, and what was counted up to there."""

    file: int = 0
    position: int = 0
    n_text_bytes: int = 0
    n_bad_rows: int = 0


def prepare(
    files: Callable[[], Sequence[DocumentFile]],
    out_folder: str | Path,
    tokenizer: Tokenizer,
    *,
    inputs_fingerprint: str,
    description: str = "",
    workers: int = 0,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    max_bad_rows: int = 100,
    progress: bool = True,
) -> tuple[TokenDataset, PrepareStats]:
    """Tokenizes documents into a prepared data set; each is framed by the tokenizer's bos (if it has one) and eos.

    Goes on after the last whole shard where `out_folder` holds a part of the same work, and returns at once where it
    holds all of it. Empty documents are left out.

    Args:
        files: returns the files in order, as `open_documents` does; not called where nothing is left to do.
        inputs_fingerprint: hash of the inputs; decides whether shards found in `out_folder` belong to this work.
        workers: processes; 0 for one a CPU, 8 at most.
        shard_tokens: tokens after which a shard ends (at the end of a document).
        max_bad_rows: rows that are left out before it stops.
        progress: show a progress bar (on a terminal; otherwise a line in the log now and then).

    Raises: ValueError where `out_folder` holds other data or too many rows are bad; OutOfSpaceError where the disk is
    full. Whatever stops it, whole shards stay.
    """
    folder = Path(out_folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    key = _work_key(inputs_fingerprint, tokenizer, shard_tokens)
    number, place, old_tokens = _find_whole_shards(folder, key)
    started = time.monotonic()
    if not (folder / INDEX_NAME).is_file():
        opened = files()
        writer = _SourceWriter(
            folder, tokenizer, key, shard_tokens, number, place, BadRows(max_bad_rows, place.n_bad_rows), opened
        )
        total = sum(file.n_bytes for file in opened)
        with _Progress(total, enabled=progress, description=description) as bar, contextlib.closing(writer):
            bar.update(sum(file.n_bytes for file in opened[: place.file]), 0)
            tasks = plan_tasks(opened, place.file, place.position)
            for task, chunk in run_tasks(tasks, tokenizer, count_workers(workers, total)):
                bar.update(task.n_bytes, writer.add(chunk))
            n_text_bytes, n_bad_rows = writer.finish()
        if not (folder / shard_name(0)).is_file():
            raise UserError(f"{description or 'the source'} has no text: its documents are empty or cannot be used")
        source = {"data": description, "work": key, "n_text_bytes": n_text_bytes, "n_bad_rows": n_bad_rows}
        finish_dataset(folder, source=source)
    dataset = TokenDataset.open(folder)
    return dataset, PrepareStats(
        n_documents=dataset.n_documents,
        n_tokens=dataset.n_tokens,
        n_text_bytes=dataset.source["n_text_bytes"],
        n_bad_rows=dataset.source["n_bad_rows"],
        new_tokens=dataset.n_tokens - old_tokens,
        seconds=time.monotonic() - started,
    )


def ensure_prepared(
    dataset: str, path: str | None, *, tokenizer: Tokenizer, data: DataConfig, progress: bool = True
) -> TokenDataset:
    """Returns the token files of a data set; tokenizes it on first use, into `data.cache_dir`.

    Several processes may call it at once (the ranks of a host, of all hosts that share the folder): one works, the
    others wait. Call it before a process group starts to count its timeout.

    Args:
        dataset: name in the table of data sets; `prepared` opens the folder `path`.

    Raises: ValueError where the data cannot be used, or was prepared with another tokenizer; OutOfSpaceError.
    """
    spec = get_source_spec(dataset)
    if spec.name == PREPARED:
        return _open_prepared(path, tokenizer)
    fingerprint = get_inputs_fingerprint(spec, path, text_key=data.text_key, split=data.split)
    key = _work_key(fingerprint, tokenizer, DEFAULT_SHARD_TOKENS)
    label = "".join(c if c.isalnum() or c in "-_" else "-" for c in dataset)
    folder = Path(data.cache_dir).expanduser() / "tokens" / f"{label}-{key[:16]}"
    if (folder / INDEX_NAME).is_file():
        return TokenDataset.open(folder)
    logger.info(
        "the data set %s%s is not tokenized yet; it will be, in %s", dataset, f" ({path})" if path else "", folder
    )
    return prepare_source(dataset, path, folder, tokenizer=tokenizer, data=data, progress=progress)[0]


def prepare_source(
    dataset: str,
    path: str | None,
    out_folder: str | Path,
    *,
    tokenizer: Tokenizer,
    data: DataConfig,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    progress: bool = True,
) -> tuple[TokenDataset, PrepareStats]:
    """Tokenizes a data set of the table into a folder of its own; see `prepare`. Of several processes, one works.

    Raises: what `prepare` raises; ValueError where the folder cannot be written or locked.
    """
    spec = get_source_spec(dataset)
    settings: dict[str, str] = {"text_key": data.text_key, "split": data.split}
    fingerprint = get_inputs_fingerprint(spec, path, **settings)
    folder = Path(out_folder).expanduser()
    with _locked(folder):
        return prepare(
            lambda: open_documents(spec, path, **settings),
            folder,
            tokenizer,
            inputs_fingerprint=fingerprint,
            description=dataset,
            workers=data.prepare_workers,
            shard_tokens=shard_tokens,
            max_bad_rows=data.max_bad_rows,
            progress=progress,
        )


def _open_prepared(path: str | None, tokenizer: Tokenizer) -> TokenDataset:
    if not path:
        raise UserError(
            "training.dataset = 'prepared' needs training.dataset_path, a folder made by scripts/prepare_data.py"
        )
    dataset = TokenDataset.open(path)
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path} was prepared with another tokenizer: its fingerprint is {dataset.tokenizer_fingerprint[:16]} (vocabulary "
            f"{dataset.vocab_size}), that of model.hf_assets_path is {tokenizer.fingerprint[:16]} (vocabulary "
            f"{tokenizer.vocab_size}). Use that tokenizer, or prepare the data anew"
        )
    return dataset


def _work_key(inputs_fingerprint: str, tokenizer: Tokenizer, shard_tokens: int) -> str:
    parts = [PREPARE_VERSION, inputs_fingerprint, tokenizer.fingerprint, shard_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _find_whole_shards(folder: Path, key: str) -> tuple[int, _Place, int]:
    """Returns number of the next shard, where it starts in the source, and the tokens before it; removes half files.

    Raises: ValueError where the shards are not of this work.
    """
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    place, n_tokens, number = _Place(), 0, 0
    while (path := folder / shard_name(number)).is_file():
        header = read_shard_header(path)
        resume = dict(header.resume)
        if resume.pop("work", None) != key:
            raise UserError(
                f"{folder} holds token files of other inputs, another tokenizer or another --shard-tokens; give another "
                "folder, or empty this one"
            )
        place, n_tokens, number = _Place(**resume), n_tokens + header.n_tokens, number + 1
    if number:
        logger.info("%s: found %d whole shards with %s tokens", folder, number, f"{n_tokens:,}")
    return number, place, n_tokens


class _SourceWriter:
    """Puts documents into shards, in order, and notes in each where in the source it ends."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        key: str,
        shard_tokens: int,
        number: int,
        place: _Place,
        bad_rows: BadRows,
        files: Sequence[DocumentFile],
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._key = key
        self._shard_tokens = shard_tokens
        self._number = number
        self._place = place
        self._bad_rows = bad_rows
        self._files = files
        self._writer: ShardWriter | None = None

    def add(self, chunk: Chunk) -> int:
        """Writes the documents of a chunk; returns its tokens."""
        lengths = np.array([len(tokens) for tokens in chunk.tokens], dtype=np.int64)
        ends = np.cumsum(lengths)
        done, bad = 0, deque(chunk.bad)
        while done < len(lengths):
            writer = self._open_writer()
            before = int(ends[done - 1]) if done else 0
            full_at = before + self._shard_tokens - writer.n_tokens
            stop = min(len(lengths), int(np.searchsorted(ends, full_at)) + 1)
            while bad and bad[0][0] < stop:
                self._count_bad(*bad.popleft()[1:])
            writer.append(np.concatenate(chunk.tokens[done:stop]), lengths[done:stop])
            n_text_bytes = self._place.n_text_bytes + sum(chunk.text_bytes[done:stop])
            self._place = _Place(
                chunk.files[stop - 1], chunk.next_positions[stop - 1], n_text_bytes, self._bad_rows.count
            )
            if writer.n_tokens >= self._shard_tokens:
                self._commit()
            done = stop
        for _, file, position, problem in bad:
            self._count_bad(file, position, problem)
        return int(ends[-1]) if len(ends) else 0

    def finish(self) -> tuple[int, int]:
        """Completes the last shard; returns the bytes of text and the bad rows of the whole source."""
        if self._writer is not None:
            self._commit()
        return self._place.n_text_bytes, self._bad_rows.count

    def close(self) -> None:
        """Removes a half shard, if there is one."""
        if self._writer is not None:
            self._writer.abort()

    def _count_bad(self, file: int, position: int, problem: str) -> None:
        self._bad_rows.add(self._files[file].locate(position), problem)

    def _open_writer(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(
                self._folder / shard_name(self._number),
                vocab_size=self._tokenizer.vocab_size,
                tokenizer_fingerprint=self._tokenizer.fingerprint,
            )
        return self._writer

    def _commit(self) -> None:
        assert self._writer is not None, "only an open shard is completed"
        self._writer.commit({"work": self._key, **vars(self._place)})
        self._writer = None
        self._number += 1


class _Progress:
    """A bar on a terminal, a line in the log now and then elsewhere, silence if not enabled."""

    def __init__(self, total_bytes: int, *, enabled: bool, description: str) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(
            total=total_bytes or None,
            unit="B",
            unit_scale=True,
            disable=not (enabled and terminal),
            desc=description or None,
        )
        self._log = enabled and not terminal
        self._total = total_bytes
        self._bytes = self._tokens = 0
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n_bytes: int, n_tokens: int) -> None:
        self._bytes += n_bytes
        self._tokens += n_tokens
        now = time.monotonic()
        speed = self._tokens / max(now - self._started, 1e-6)
        self._bar.set_postfix_str(f"{self._tokens / 1e6:,.1f} M tokens, {speed / 1e6:.2f} M/s", refresh=False)
        self._bar.update(n_bytes)
        if self._log and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            share = f"{self._bytes / self._total:.0%}, " if self._total else ""
            logger.info("tokenizing: %s%.1f million tokens, %.2f million/s", share, self._tokens / 1e6, speed / 1e6)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, waiting for whoever has it. A process that dies lets go of it.

    Raises: ValueError where the folder cannot be written or its file system has no locks.
    """
    path = folder.with_name(folder.name + ".lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  (closed below, which lets go of the lock)
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written ({error.strerror}); choose another data.cache_dir"
        ) from error
    with file:
        started = logged = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now - logged >= _LOG_SECONDS:
                    logged = now
                    file.seek(0)
                    holder = file.read() or "another process"
                    logger.info("waiting for %s, which tokenizes %s (%.0f s so far)", holder, folder, now - started)
                time.sleep(_WAIT_SECONDS)
            except OSError as error:
                raise UserError(f"{path} cannot be locked ({error.strerror}); choose a local data.cache_dir") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
