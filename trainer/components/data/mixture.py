"""Which sequence of which source comes at each place of the run: a weighted schedule, known in closed form.

The run's sequences are numbered 0, 1, 2, ... over all ranks. They are dealt in blocks of BLOCK places. A block has a
whole number of places for each source, the places are permuted within the block, and each source fills its places with
its own sequences in its own order, epoch after epoch. Nothing is drawn at random, so after any number of blocks each
source has had its share to within one sequence, and any place can be looked up without the ones before it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.components.data.sampling import EpochOrder, Permutation
from trainer.config.errors import UserError

BLOCK = 8192
# Shares are kept as multiples of 2**-40, so that places are counted in exact integers.
_SHARE_BITS = 40
_MIN_PLACES = 2  # in a block; below that the rounding of two borders could leave a source a negative number of places


@dataclass(frozen=True)
class MixtureSource:
    """One source: its name in logs, its number of sequences, its weight relative to the others, its identity."""

    name: str
    n_sequences: int
    weight: float
    fingerprint: str


@dataclass(frozen=True)
class SourceProgress:
    """How far a run has come in one source. Epochs are passes over its sequences, with a fraction."""

    sequences: int
    tokens: int
    epochs: float


class Mixture:
    """Maps places of the run to sequences of sources.

    Args:
        sources: at least one.
        seed: seed of the run.
        shuffle: visit the sequences of each source in a new order each epoch. The interleaving of sources is permuted
            either way.

    Raises:
        ValueError: a source has no sequence, a weight is not a positive number or too small beside the others, or two
            sources have the same name.
    """

    def __init__(self, sources: Sequence[MixtureSource], *, seed: int, shuffle: bool) -> None:
        assert sources, "a mixture needs a source"
        _check_sources(sources)
        self.sources = tuple(sources)
        self._seed = seed
        # Border s: the share of all sources before s.
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        borders = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        self._borders = [round(border * 2**_SHARE_BITS) for border in borders.tolist()]
        self._borders[-1] = 2**_SHARE_BITS
        self._check_shares()
        # Two sources may hold the same data: a tag keeps their orders apart.
        self._orders = [
            EpochOrder(source.n_sequences, seed=seed, fingerprint=f"{source.fingerprint}{tag}", shuffle=shuffle)
            for source, tag in zip(sources, _repetition_tags(sources), strict=True)
        ]
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map places of the run to (source, sequence of that source).

        Args:
            places: (k,) integers >= 0, in any order.
        Returns:
            (k,) int64 index into `sources`, and (k,) int64 sequence in [0, n_sequences).
        """
        places = np.asarray(places, dtype=np.int64)
        source, visit = self._visits(places)
        sequence = np.empty_like(places)
        for index in np.unique(source).tolist():
            chosen = source == index
            sequence[chosen] = self._orders[index](visit[chosen])
        return source, sequence

    def epochs(self, places: np.ndarray) -> np.ndarray:
        """Number of whole passes over its source before the sequence at each place (k,): (k,) int64, 0 at first."""
        source, visit = self._visits(np.asarray(places, dtype=np.int64))
        return visit // np.array([s.n_sequences for s in self.sources])[source]

    def counts(self, n: int) -> np.ndarray:
        """Sequences that the first `n` places of the run take from each source: (sources,) int64, summing to n."""
        if len(self.sources) == 1:
            return np.array([n], dtype=np.int64)
        block, within = divmod(n, BLOCK)
        source_of, _ = self._block(block)
        return self._counts_of_blocks(block) + np.bincount(source_of[:within], minlength=len(self.sources))

    def describe(self, n: int, *, seq_len: int) -> dict[str, SourceProgress]:
        """Progress in each source, by name, when the first `n` sequences of the run are trained on.

        Args:
            seq_len: tokens in a sequence (padding counts).
        """
        return {
            source.name: SourceProgress(count, count * seq_len, count / source.n_sequences)
            for source, count in zip(self.sources, self.counts(n).tolist(), strict=True)
        }

    def _visits(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map places to (source, how many sequences of that source came before)."""
        if len(self.sources) == 1:
            return np.zeros_like(places), places
        source, visit = np.empty_like(places), np.empty_like(places)
        blocks, within = np.divmod(places, BLOCK)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            source_of, visit_of = self._block(block)
            source[chosen] = source_of[within[chosen]]
            visit[chosen] = visit_of[within[chosen]]
        return source, visit

    def _counts_of_blocks(self, n_blocks: int) -> np.ndarray:
        """Places of each source in the first `n_blocks` blocks, rounded at the borders so that they sum up exactly."""
        places = [(n_blocks * BLOCK * border) >> _SHARE_BITS for border in self._borders]
        return np.diff(np.array(places, dtype=np.int64))

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source (BLOCK,) and number of the visit to it (BLOCK,) of each place of a block."""
        before = self._counts_of_blocks(block)
        counts = self._counts_of_blocks(block + 1) - before
        assert counts.min() >= 0, "a source got a negative number of places"
        dealt = np.repeat(np.arange(len(counts)), counts)
        source = dealt[Permutation(BLOCK, "mixture", self._seed, block)(np.arange(BLOCK))]
        visit = np.empty(BLOCK, dtype=np.int64)
        for index, count in enumerate(counts.tolist()):
            visit[source == index] = before[index] + np.arange(count)
        return source, visit

    def _check_shares(self) -> None:
        shares = np.diff(np.array(self._borders, dtype=np.float64)) / 2**_SHARE_BITS
        for source, share in zip(self.sources, shares.tolist(), strict=True):
            if share * BLOCK < _MIN_PLACES:
                raise UserError(
                    f"data.sources: {source.name!r} has weight {source.weight:g}, {share:.2g} of the whole. At least "
                    f"{_MIN_PLACES / BLOCK:.2g} is possible: raise its weight, join it with another source into one "
                    "data set, or remove it"
                )


def _check_sources(sources: Sequence[MixtureSource]) -> None:
    seen = set()
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise UserError(f"data.sources: {source.name!r} has weight {source.weight}: it must be a number above 0")
        if source.n_sequences < 1:
            raise UserError(
                f"data set {source.name!r} is too small: it has not one sequence of training.seq_len tokens. "
                "Shorten training.seq_len, or take more data"
            )
        if source.name in seen:
            raise UserError(
                f"data.sources: two sources are named {source.name!r}; give each its own `name` to tell their logs apart"
            )
        seen.add(source.name)


def _repetition_tags(sources: Sequence[MixtureSource]) -> list[str]:
    """'' for the first source with some data, '#1' for the next with the same data, and so on."""
    seen: dict[str, int] = {}
    tags = []
    for source in sources:
        count = seen.get(source.fingerprint, 0)
        tags.append(f"#{count}" if count else "")
        seen[source.fingerprint] = count + 1
    return tags


def measure_sources(progress: Mapping[str, SourceProgress]) -> dict[str, float]:
    """Return tokens and epochs of each source, under the names of their curves."""
    tokens = {f"source_tokens/{name}": float(source.tokens) for name, source in progress.items()}
    return tokens | {f"source_epochs/{name}": source.epochs for name, source in progress.items()}
