"""The loader of streams: documents read, tokenized and packed while the run goes on, without preparing them first.

Second class beside `loader`: the order is that of the files, each rank reads a share of its own, and a resume needs the
same number of data-parallel ranks. It is exact all the same. The state is the place of the first token not yet handed
out (file, place in the file, tokens of that document already used), so there is no buffer to save, and nothing depends
on how a library counts.
"""

import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.components.data.batch_loader import BatchLoader
from trainer.components.data.document_files import Document, DocumentFile
from trainer.components.data.mixture import SourceProgress
from trainer.components.data.packing import Batch, build_batch
from trainer.components.data.prefetch import DEFAULT_PREFETCH_FACTOR, BackgroundIterator, to_tensors
from trainer.components.data.sampling import Permutation
from trainer.components.data.sources import BadRows
from trainer.components.loss import IGNORE_INDEX
from trainer.config.errors import ResourceError, UserError

logger = logging.getLogger(__name__)

Encode = Callable[[str], np.ndarray]
"""Text of a document -> (n,) token ids, with the tokens that begin and end it."""

STREAM_VERSION = 1
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
# Packages whose errors mean that a remote read failed, where they are no OSError.
_NETWORK_PACKAGES = ("aiohttp", "httpx", "httpcore", "urllib3", "requests", "fsspec", "huggingface_hub")


@dataclass(frozen=True)
class StreamPosition:
    """A place in one rank's share.

    Attributes:
        epoch: passes over the share before this one.
        file: index into the share of this epoch.
        position: place in the file where the document begins, as the file counts.
        row: documents and bad rows of the file before it.
        skip: tokens of the document that were handed out.
        bad_rows: bad rows met before it in this epoch.
    """

    epoch: int = 0
    file: int = 0
    position: int = 0
    row: int = 0
    skip: int = 0
    bad_rows: int = 0


Item = tuple[dict[str, torch.Tensor], StreamPosition]
"""A batch, and the place after it."""


class StreamShare:
    """The documents of one rank, in order, from any position on.

    With at least as many files as ranks, each rank reads files of its own, dealt anew each epoch; with fewer, every rank
    reads all files and takes every `dp_degree`-th row.

    Args:
        files: all files of the source, in a fixed order.
        encode: text to tokens.
        dp_rank, dp_degree: which share.
        seed: seed of the run.
        shuffle: visit the files in a new order each epoch. Rows keep their order.
        max_bad_rows: rows of this share that may be unusable in an epoch before `read` raises.
        read_retries: attempts after a read that failed, with growing pauses.
    """

    def __init__(
        self,
        files: Sequence[DocumentFile],
        *,
        encode: Encode,
        dp_rank: int,
        dp_degree: int,
        seed: int,
        shuffle: bool,
        max_bad_rows: int,
        read_retries: int,
    ) -> None:
        self._files = files
        self._encode = encode
        self._dp_rank = dp_rank
        self._dp_degree = dp_degree
        self._seed = seed
        self._shuffle = shuffle
        self._max_bad_rows = max_bad_rows
        self._read_retries = read_retries
        self.by_rows = len(files) < dp_degree
        self.files_of = functools.lru_cache(maxsize=2)(self._files_of)

    def _files_of(self, epoch: int) -> list[DocumentFile]:
        """List this rank's files of an epoch, in the order of reading."""
        order = np.arange(len(self._files))
        if self._shuffle:
            order = Permutation(len(self._files), "stream", self._seed, epoch)(order)
        mine = order if self.by_rows else order[self._dp_rank :: self._dp_degree]
        return [self._files[index] for index in mine.tolist()]

    def read(
        self, start: StreamPosition, stop: threading.Event, *, endless: bool = True
    ) -> Iterator[tuple[StreamPosition, np.ndarray]]:
        """Yield the position (with skip 0) and tokens, (n,) int64, of each document from `start` on.

        Args:
            start: where to begin; its `skip` is not heeded here.
            stop: ends a pause between two attempts.
            endless: begin another epoch at the end of each; otherwise end with this one.
        Raises:
            ValueError: too many bad rows in an epoch, or no usable document in a whole one.
            ResourceError: a read failed again and again.
        """
        at = start
        found = at != StreamPosition()
        while not stop.is_set():
            # Anew in each epoch, which meets the same rows again.
            bad_rows = BadRows(self._max_bad_rows, at.bad_rows)
            files = self.files_of(at.epoch)
            for index in range(at.file, len(files)):
                at = replace(at, file=index)
                for here, text in self._read_file(files[index], at, bad_rows, stop):
                    found = True
                    yield here, self._encode(text).astype(np.int64)
                at = replace(at, position=0, row=0, bad_rows=bad_rows.count)
                if stop.is_set():
                    return
            if not found:
                raise UserError(
                    f"data-parallel rank {self._dp_rank} of {self._dp_degree} finds no usable document in its share of "
                    f"{len(files)} files: take more data or fewer ranks, or prepare the data (data.streaming = false)"
                )
            if not endless:
                return
            found = False
            at = StreamPosition(epoch=at.epoch + 1)

    def _read_file(
        self, file: DocumentFile, at: StreamPosition, bad_rows: BadRows, stop: threading.Event
    ) -> Iterator[tuple[StreamPosition, str]]:
        row = at.row
        for document in self._read_with_retries(file, at.position, stop):
            mine = not self.by_rows or row % self._dp_degree == self._dp_rank
            here = replace(at, position=document.position, row=row, skip=0, bad_rows=bad_rows.count)
            row += 1
            if not mine:
                continue
            if document.problem:
                bad_rows.add(file.locate(document.position), document.problem)
            elif document.text:
                yield here, document.text

    def _read_with_retries(self, file: DocumentFile, position: int, stop: threading.Event) -> Iterator[Document]:
        failures = 0
        while True:
            try:
                for document in file.read(position):
                    if stop.is_set():
                        return
                    failures, position = 0, document.next_position
                    yield document
                return
            except Exception as error:
                if not _is_transient(error):
                    raise
                failures += 1
                where = f"{file.name}, at {position}"
                if failures > self._read_retries:
                    raise ResourceError(
                        f"reading {where} failed {failures} times, data.read_retries = {self._read_retries}; "
                        f"the last time: {type(error).__name__}: {error}"
                    ) from error
                pause = min(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
                logger.warning(
                    "reading %s failed (%s: %s); attempt %d of %d in %.0f s",
                    where, type(error).__name__, error, failures, self._read_retries, pause,
                )  # fmt: skip
                if stop.wait(pause):
                    return


class StreamingLoader(BatchLoader):
    """The loader of a stream, which goes forward only.

    Args:
        share: this rank's documents.
        name: name of the source, for logs.
        identity: what the order depends on besides the number of ranks: plain values, by name.
        document_mask: keep positions and labels inside each document.
        read_timeout: seconds that a batch may take, the first of training excepted (a source takes its time to open). 0: any.
        shape, section, device_type, epoch_steps: see `BatchLoader`; `epoch_batches` needs a number of steps.
    """

    def __init__(
        self,
        share: StreamShare,
        *,
        name: str,
        identity: dict[str, Any],
        document_mask: bool,
        read_timeout: float = 0,
        **options: Any,
    ) -> None:
        super().__init__(identity={**identity, "stream_version": STREAM_VERSION}, **options)
        self._share = share
        self._read_timeout = read_timeout
        self._name = name
        self._document_mask = document_mask
        self._position = StreamPosition()
        self._background: BackgroundIterator[Item] | None = None

    def next_batch(self) -> dict[str, torch.Tensor]:
        """Get the next microbatch of this rank.

        Raises:
            ValueError: more rows of an epoch than data.max_bad_rows are unusable. It is raised on this rank only; the others are in
                a collective by then, so the process must end for the launcher to end them.
            ResourceError: a read failed data.read_retries times, or the source gave nothing for too long.
        """
        has_begun = self._background is not None
        if self._background is None:
            self._background = self._start(self._position, endless=True)
        item = self._get(self._background, self._read_timeout if has_begun else 0)
        assert item is not None, "an endless stream has ended"
        batch, self._position = item
        self._sequences += self.shape.microbatch_size
        return batch

    def _get(self, background: BackgroundIterator[Item], timeout: float) -> Item | None:
        try:
            with self._clock:
                return background.get(timeout or None)
        except queue.Empty as error:
            raise ResourceError(
                f"data: {self._name} gave no batch for {timeout} s (data.read_timeout_seconds), after "
                f"{self.position()}. The source is slow or does not answer; prepare the data, or read it from a nearer place"
            ) from error

    def epoch_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield `epoch_steps` batches from the beginning of this rank's share; for validation.

        Ranks whose share ends before yield batches in which all labels are IGNORE_INDEX, so that all have as many.

        Raises:
            ResourceError: as `next_batch` does, and where the first batch does not come in time: other ranks have theirs.
        """
        assert self._epoch_steps >= 0, "the number of batches of a stream must be given"
        background = self._start(StreamPosition(), endless=False)
        batch: dict[str, torch.Tensor] | None = None
        try:
            for _ in range(self._epoch_steps):
                item = self._get(background, self._read_timeout)
                if item is not None:
                    batch = item[0]
                else:
                    assert batch is not None, "a share with documents gives at least one batch"
                    batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
                yield batch
        finally:
            background.close()

    def describe(self, step: int | None = None) -> dict[str, SourceProgress]:
        """Sequences and tokens over all ranks, and the epochs of this rank, by source.

        Args:
            step: after that many steps, for sequences and tokens; epochs are known only for this point of the run.
        """
        sequences = self.sequences if step is None else step * self.shape.global_batch_size
        epochs = self._position.epoch + self._position.file / max(len(self._share.files_of(self._position.epoch)), 1)
        return {self._name: SourceProgress(sequences, sequences * self.shape.seq_len, epochs)}

    def position(self) -> dict[str, Any]:
        """Say where this rank's next step begins, for the record."""
        files = self._share.files_of(self._position.epoch)
        return {**asdict(self._position), "file": files[self._position.file].name}

    def state_dict(self) -> dict[str, Any]:
        """The place of this rank after the batches handed out. Each rank has its own."""
        return {
            "position": asdict(self._position),
            "sequences": self._sequences,
            "dp_rank": self.shape.dp_rank,
            "dp_degree": self.shape.dp_degree,
            "fingerprint": self.fingerprint,
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the place of `state`.

        Raises:
            ValueError: it is of another number of ranks, of another rank, of other data or of an indexed data set.
        """
        remedy = 'or begin the data anew with checkpoint.exclude_from_loading = ["dataloader"]'
        if "position" not in state:
            raise UserError(
                "the checkpoint's data position is not one of a stream: set data.streaming as it was, " + remedy
            )
        if (state["dp_degree"], state["dp_rank"]) != (self.shape.dp_degree, self.shape.dp_rank):
            raise UserError(
                f"a stream resumes on as many data-parallel ranks as it was saved on: {state['dp_degree']} (this was rank "
                f"{state['dp_rank']}), now {self.shape.dp_degree} (rank {self.shape.dp_rank}). Use that number, prepare "
                f"the data so that any number will do (data.streaming = false begins them anew), {remedy}"
            )
        if state["fingerprint"] != self.fingerprint:
            changed = [key for key, value in self._identity.items() if state["identity"].get(key) != value]
            raise UserError(
                f"the checkpoint was made with another stream; what changed: {', '.join(changed)}. Put it back, {remedy}"
            )
        self.close()
        self._position = StreamPosition(**state["position"])
        self._sequences = int(state["sequences"])

    def close(self) -> None:
        """End the thread. A later `next_batch` starts it again."""
        if self._background is not None:
            self._background.close()
            self._background = None

    def _start(self, start: StreamPosition, *, endless: bool) -> BackgroundIterator[Item]:
        depth = max(self._section.num_workers, 1) * (self._section.prefetch_factor or DEFAULT_PREFETCH_FACTOR)
        make = functools.partial(self._pack, start, endless=endless)
        return BackgroundIterator(make, depth=depth, device_index=self._pin_device)

    def _pack(self, start: StreamPosition, stop: threading.Event, *, endless: bool) -> Iterator[Item]:
        """Yield batches and the position after each. The last one of a finite stream is padded."""
        pending: deque[tuple[StreamPosition, np.ndarray]] = deque()
        buffered, skip = 0, start.skip
        batch_tokens = self.shape.local_batch_size * self.shape.seq_len
        for position, document in self._share.read(start, stop, endless=endless):
            # Only the document that the stream was entered in has tokens to leave out.
            pending.append((replace(position, skip=skip), document[skip:]))
            buffered, skip = buffered + len(document) - skip, 0
            while buffered > batch_tokens:  # one more token than the batch has is the last label
                batch = self._assemble(pending)
                buffered -= batch_tokens
                _drop(pending, batch_tokens)
                yield to_tensors(batch, pin=self._pin_device is not None), pending[0][0]
        if not endless and buffered > 1 and not stop.is_set():
            yield to_tensors(self._assemble(pending), pin=self._pin_device is not None), start

    def _assemble(self, pending: deque[tuple[StreamPosition, np.ndarray]]) -> Batch:
        """Make a batch of the first tokens that wait, padded if there are too few."""
        rows, seq_len = self.shape.local_batch_size, self.shape.seq_len
        stream = np.zeros(rows * seq_len + 1, dtype=np.int64)
        begins = np.zeros(len(stream), dtype=bool)
        filled = 0
        for position, document in pending:
            piece = document[: len(stream) - filled]
            stream[filled : filled + len(piece)] = piece
            begins[filled] = position.skip == 0
            filled += len(piece)
            if filled == len(stream):
                break
        else:
            begins[filled] = True
        first = np.arange(rows)[:, None] * seq_len
        columns = first + np.arange(seq_len + 1)
        lengths = np.clip(filled - first[:, 0], 0, seq_len + 1) if filled < len(stream) else None
        if not self._document_mask:
            return build_batch(stream[columns], None, lengths)
        starts = begins[columns]
        starts[:, 0] = True
        return build_batch(stream[columns], starts, lengths)


def _drop(pending: deque[tuple[StreamPosition, np.ndarray]], count: int) -> None:
    """Take the first `count` tokens off; at least one token remains."""
    while count >= len(pending[0][1]):
        count -= len(pending.popleft()[1])
    position, document = pending[0]
    pending[0] = (replace(position, skip=position.skip + count), document[count:])


def _is_transient(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_PACKAGES
