"""The work of tokenizing: how a source is divided into tasks, and the processes that run them, in order."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from trainer.components.data.document_files import Document, DocumentFile
from trainer.components.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_TASK_BYTES = 2 * 2**20
_POOL_BYTES = 16 * 2**20  # starting processes costs more than tokenizing less than this
_MAX_WORKERS = 8


@dataclass(frozen=True)
class Task:
    """Work for one process: spans to read, or documents that the main process has read (`documents`) from `file`."""

    spans: tuple[tuple[int, DocumentFile, int, int | None], ...] = ()
    file: int = 0
    documents: tuple[Document, ...] = ()
    n_bytes: int = 0
    """Share of the input, for progress."""


@dataclass
class Chunk:
    """Tokenized documents in order. The arrays have one entry a document; `bad` holds (documents before it, where, why)."""

    tokens: list[np.ndarray] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    next_positions: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    bad: list[tuple[int, int, int, str]] = field(default_factory=list)


def plan_tasks(files: Sequence[DocumentFile], first_file: int, first_position: int) -> Iterator[Task]:
    """Yields the work from a position in a file on, in order. Small files are bundled, large ones divided."""
    spans: list[tuple[int, DocumentFile, int, int | None]] = []
    n_bytes = 0
    for number, file in enumerate(files[first_file:], start=first_file):
        start = first_position if number == first_file else 0
        if not file.seekable:
            if spans:
                yield Task(spans=tuple(spans), n_bytes=n_bytes)
                spans, n_bytes = [], 0
            yield from _read_tasks(number, file, start)
            continue
        for span in file.split(_TASK_BYTES):
            n_bytes += span.n_bytes
            if span.stop is None or span.stop > start:
                spans.append((number, file, max(span.start, start), span.stop))
            if n_bytes >= _TASK_BYTES and spans:
                yield Task(spans=tuple(spans), n_bytes=n_bytes)
                spans, n_bytes = [], 0
    if spans:
        yield Task(spans=tuple(spans), n_bytes=n_bytes)


def _read_tasks(number: int, file: DocumentFile, start: int) -> Iterator[Task]:
    """Reads a file here, because it can only be read from front to back, and yields its documents as tasks."""
    documents: list[Document] = []
    n_chars = 0
    for document in file.read(start):
        documents.append(document)
        n_chars += len(document.text)
        if n_chars >= _TASK_BYTES:
            yield Task(file=number, documents=tuple(documents))
            documents, n_chars = [], 0
    yield Task(file=number, documents=tuple(documents), n_bytes=file.n_bytes)


def _tokenize(task: Task, tokenizer: Tokenizer) -> Chunk:
    chunk = Chunk()
    for number, document in _documents_of(task):
        if document.problem:
            chunk.bad.append((len(chunk.tokens), number, document.position, document.problem))
        elif document.text:
            chunk.tokens.append(tokenizer.encode_document(document.text))
            chunk.files.append(number)
            chunk.next_positions.append(document.next_position)
            chunk.text_bytes.append(len(document.text.encode("utf-8", "replace")))
    return chunk


def _documents_of(task: Task) -> Iterator[tuple[int, Document]]:
    for document in task.documents:
        yield task.file, document
    for number, file, start, stop in task.spans:
        for document in file.read(start, stop):
            yield number, document


def count_workers(workers: int, total_bytes: int) -> int:
    """Returns how many processes to start; 1 means none, the work is done here."""
    small = 0 < total_bytes < _POOL_BYTES
    if workers == 1 or (workers == 0 and small) or not _can_spawn():
        return 1
    return workers or min(
        _MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def _can_spawn() -> bool:
    """Whether processes can be spawned: not from a daemon, and only where the main module is a file they can import."""
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    return not multiprocessing.current_process().daemon and (main_file is None or os.path.exists(main_file))


def run_tasks(tasks: Iterable[Task], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Task, Chunk]]:
    """Yields each task with its result, in order, keeping a bounded number of them in memory.

    Raises: what reading raised; RuntimeError where a process has died.
    """
    if workers == 1:
        for task in tasks:
            yield task, _tokenize(task, tokenizer)
        return
    # Spawned, as a fork of a process with threads (torch, the tokenizers library) can hang.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
    )
    waiting: deque[tuple[Task, Future[Chunk]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(_run_in_worker, task)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that tokenizes has died (messages above, if any, say why; it may have run out of memory). Whole shards were kept: run again, with fewer "
            "workers, to go on from there"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    for number in (signal.SIGINT, signal.SIGUSR1):  # Ctrl-C and SLURM's signal go to all processes; the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(task: Task) -> Chunk:
    assert _worker_tokenizer is not None, "the worker was not started"
    return _tokenize(task, _worker_tokenizer)
