"""Orders that can be entered at any point: a seekable permutation, and an endless walk over epochs made of it.

Nothing here has state, so the place in an epoch is an integer and a resume costs the same at any step.
"""

import hashlib

import numpy as np

_ROUNDS = 8
# Among few items every order should be about equally likely, and each round does little: more rounds.
_SMALL, _ROUNDS_WHEN_SMALL = 1024, 32
# Multipliers of the SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014; Stafford's variant 13).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF_WORD = np.uint64(32)


def derive_keys(*parts: str | int, count: int) -> np.ndarray:
    """Get `count` independent 64-bit keys from a sequence of names and numbers.

    Returns:
        (count,) uint64, the same on every machine and in every version of numpy.
    """
    # The length before each part keeps ("1", "23") and ("12", "3") apart.
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), dtype="<u8").astype(np.uint64)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _to_range(word: np.ndarray, size: np.uint64) -> np.ndarray:
    """Map 64 random bits to [0, size) for size <= 2**32 by multiply and shift: no division, bias below 2**-32 * size."""
    return ((word >> _HALF_WORD) * size) >> _HALF_WORD


class Permutation:
    """A keyed permutation of range(n) that maps any position without a table.

    An item is written as a pair (left, right) in an a x b rectangle that holds n with less than one row to spare. The
    rounds of an alternating Feistel network add a keyed hash of one half to the other, modulo its side (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); a result outside range(n) is mapped again until it is
    inside (cycle walking), which happens to about one item in sqrt(n).

    Args:
        n: number of items, 1 <= n < 2**62.
        key: names and numbers that select the permutation.

    Raises:
        ValueError: n is out of range.
    """

    def __init__(self, n: int, *key: str | int) -> None:
        if not 1 <= n < 2**62:
            raise ValueError(f"cannot permute {n} items: from 1 to 2**62 - 1 are possible")
        self.n = n
        root = int(np.sqrt(n))
        width = root if root * root >= n else root + 1
        width += width * width < n  # sqrt rounds down beyond 2**53
        self._width = np.uint64(width)
        self._height = np.uint64(-(-n // width))
        self._keys = derive_keys("permutation", n, *key, count=_ROUNDS_WHEN_SMALL if n < _SMALL else _ROUNDS)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions to items.

        Args:
            positions: (k,) integers in [0, n).
        Returns:
            (k,) int64 items in [0, n); all positions together give every item once.
        """
        value = np.asarray(positions).astype(np.uint64)
        assert value.size == 0 or int(value.max()) < self.n, "position outside the permutation"
        value = self._encrypt(value)
        outside = np.flatnonzero(value >= np.uint64(self.n))
        while outside.size:
            value[outside] = self._encrypt(value[outside])
            outside = outside[value[outside] >= np.uint64(self.n)]
        return value.astype(np.int64)

    def _encrypt(self, value: np.ndarray) -> np.ndarray:
        left, right = value % self._width, value // self._width
        for first, second in zip(self._keys[0::2], self._keys[1::2], strict=True):
            left = left + _to_range(_mix(right + first), self._width)
            left = np.where(left >= self._width, left - self._width, left)
            right = right + _to_range(_mix(left + second), self._height)
            right = np.where(right >= self._height, right - self._height, right)
        return right * self._width + left


class EpochOrder:
    """The item at each position of an endless walk over n items, epoch after epoch.

    Every epoch visits each item once; with `shuffle` in a new order, a pure function of (seed, epoch, fingerprint).

    Args:
        n: number of items.
        seed: seed of the run.
        fingerprint: identity of the data, so that other data come in an unrelated order.
        shuffle: without it, items come in their own order.
    """

    def __init__(self, n: int, *, seed: int, fingerprint: str, shuffle: bool) -> None:
        self.n = n
        self._seed = seed
        self._fingerprint = fingerprint
        self._shuffle = shuffle

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions (k,) of the walk, each >= 0 and of any epoch, to items (k,) int64 in [0, n)."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.n)
        if not self._shuffle:
            return within
        items = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            permutation = Permutation(self.n, "epoch", self._seed, epoch, self._fingerprint)
            items[chosen] = permutation(within[chosen])
        return items
