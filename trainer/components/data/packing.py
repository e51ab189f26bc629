"""From documents to sequences of `seq_len` tokens with their labels.

A sequence is made from a window of `seq_len + 1` tokens: `tokens` is all but the last, `labels` all but the first, so
label t is the token after token t. Where documents begin inside the window is known once, as a mask, and everything
about borders (positions, labels without loss, padding) follows from it in `build_batch`.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.components.data.packing_plan import PackingPlan, load_or_build_plan
from trainer.components.data.token_files import TokenDataset
from trainer.components.loss import IGNORE_INDEX

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackingReport:
    """What packing does with the tokens of a data set, in one epoch.

    `cropped` is the share of all tokens that no sequence holds, `padded` the share of all places in sequences that hold
    no token. `cut_documents` is the number of documents that do not fit in one sequence, where packing looks at them.
    """

    cropped: float
    padded: float
    cut_documents: int | None = None


class Packing(Protocol):
    """Sequences of one data set, each of which can be had by its index."""

    n_sequences: int
    report: PackingReport

    def fetch(self, indices: np.ndarray) -> Batch:
        """Make the sequences `indices` (k,), each in [0, n_sequences): tokens, labels (and positions), (k, seq_len) int64."""
        ...


def build_batch(window: np.ndarray, starts: np.ndarray | None, lengths: np.ndarray | None) -> Batch:
    """Derive tokens, labels and positions from windows of tokens.

    Args:
        window: (k, seq_len + 1) int64 tokens.
        starts: (k, seq_len + 1) bool, True where a document (or the padding) begins; None without a document mask.
        lengths: (k,) tokens that are real in each window, the rest is padding; None where there is none.
    Returns:
        `tokens` and `labels`, (k, seq_len) int64: labels are IGNORE_INDEX at padding and, with `starts`, where the next
        token belongs to another document. With `starts` also `positions`, which restart at 0 at each document and at the
        beginning of the window, before which attention cannot look.
    """
    tokens = np.ascontiguousarray(window[:, :-1])
    labels = window[:, 1:].copy()
    places = np.arange(window.shape[1] - 1)
    if lengths is not None:
        labels[places + 1 >= lengths[:, None]] = IGNORE_INDEX
    if starts is None:
        return {"tokens": tokens, "labels": labels}
    labels[starts[:, 1:]] = IGNORE_INDEX
    document_start = np.where(starts[:, :-1], places, 0)
    np.maximum.accumulate(document_start, axis=1, out=document_start)
    return {"tokens": tokens, "labels": labels, "positions": places - document_start}


class ConcatPacking:
    """All documents joined in one stream, cut every `seq_len` tokens. Consecutive windows share one token: it is the
    last label of the one and the first token of the other, so that every token is a label once.

    Args:
        dataset: prepared tokens.
        seq_len: tokens in a sequence.
        document_mask: keep positions and labels inside each document.
        keep_tail: also make a padded sequence of what remains after the last full window (for validation).
    """

    def __init__(self, dataset: TokenDataset, *, seq_len: int, document_mask: bool, keep_tail: bool = False) -> None:
        self._dataset = dataset
        self._seq_len = seq_len
        self._document_mask = document_mask
        n_labels = max(dataset.n_tokens - 1, 0)
        self.n_sequences = -(-n_labels // seq_len) if keep_tail else n_labels // seq_len
        places = self.n_sequences * seq_len
        used = min(places + 1, dataset.n_tokens) if places else 0
        self.report = PackingReport(
            cropped=1 - used / max(dataset.n_tokens, 1),
            padded=max(places - n_labels, 0) / max(places, 1),
        )

    def fetch(self, indices: np.ndarray) -> Batch:
        first = np.asarray(indices, dtype=np.int64) * self._seq_len
        size = self._seq_len + 1
        lengths = np.minimum(self._dataset.n_tokens - first, size)
        if bool((lengths == size).all()):
            window = self._dataset.gather(first, size)
            return build_batch(window, self._starts(first) if self._document_mask else None, None)
        window = np.zeros((len(first), size), dtype=np.int64)
        for row, start, length in zip(window, first.tolist(), lengths.tolist(), strict=True):
            row[:length] = self._dataset.read(start, length)
        return build_batch(window, self._starts(first) if self._document_mask else None, lengths)

    def _starts(self, first: np.ndarray) -> np.ndarray:
        """Mark the document starts in the windows that begin at `first` (k,): (k, seq_len + 1) bool."""
        borders = self._dataset.document_starts
        low = np.searchsorted(borders, first, side="left")
        # The last border is the end of the data: in a padded window it marks where the padding begins.
        counts = np.searchsorted(borders, first + self._seq_len + 1, side="left") - low
        rows = np.repeat(np.arange(len(first)), counts)
        skipped = np.repeat(np.cumsum(counts) - counts, counts)
        inside = borders[np.repeat(low, counts) + np.arange(len(rows)) - skipped]
        starts = np.zeros((len(first), self._seq_len + 1), dtype=bool)
        starts[:, 0] = True
        starts[rows, inside - first[rows]] = True
        return starts


class BestFitPacking:
    """Whole documents side by side, each in the sequence where it leaves the least room; the rest is padding.

    Only documents longer than a window are cut. See `packing_plan` for how, and why no label is lost.

    Args:
        dataset: prepared tokens.
        seq_len: tokens in a sequence.
        document_mask: keep positions and labels inside each document.
        cache_dir: folder for the plan, which is made once for each data set and length.
    """

    def __init__(self, dataset: TokenDataset, *, seq_len: int, document_mask: bool, cache_dir: Path) -> None:
        self._dataset = dataset
        self._seq_len = seq_len
        self._document_mask = document_mask
        self._plan: PackingPlan = load_or_build_plan(
            dataset.document_starts, fingerprint=dataset.fingerprint, seq_len=seq_len, cache_dir=cache_dir
        )
        self.n_sequences = self._plan.n_sequences
        places = self.n_sequences * seq_len
        self.report = PackingReport(
            cropped=self._plan.n_dropped_tokens / max(dataset.n_tokens, 1),
            padded=self._plan.n_padded_places / max(places, 1),
            cut_documents=self._plan.n_cut_documents,
        )

    def fetch(self, indices: np.ndarray) -> Batch:
        window = np.zeros((len(indices), self._seq_len + 1), dtype=np.int64)
        lengths = np.zeros(len(indices), dtype=np.int64)
        starts = np.zeros(window.shape, dtype=bool) if self._document_mask else None
        read = self._dataset.read
        for row, index in enumerate(np.asarray(indices).tolist()):
            at, tokens = 0, window[row]
            begins = []
            for first, length in self._plan.pieces(index):
                begins.append(at)
                tokens[at : at + length] = read(first, length)
                at += length
            lengths[row] = at
            if starts is not None:
                if at <= self._seq_len:
                    begins.append(at)  # the padding
                starts[row, begins] = True
        return build_batch(window, starts, lengths)
