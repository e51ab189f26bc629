import itertools

import numpy as np
import pytest

from trainer.components.data.sampling import EpochOrder, Permutation, derive_keys


def chi_square(observed: np.ndarray) -> float:
    expected = observed.sum() / observed.size
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [*range(1, 70), 100, 127, 128, 129, 1000, 4095, 4096, 4097, 99_991])
def test_permutation_is_a_bijection(n):
    for key in range(3):
        assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [2**31 - 1, 2**40 + 17, 2**53 + 1, 2**60 + 3, 2**62 - 1])
def test_permutation_of_huge_n_stays_in_range_without_collisions(n):
    positions = np.concatenate([np.arange(5000), np.arange(n - 5000, n)])
    items = Permutation(n, "huge")(positions)
    assert items.min() >= 0
    assert items.max() < n
    assert len(np.unique(items)) == len(positions)
    assert len(np.unique(items // (n // 16))) >= 16, "items of neighbouring positions should spread over the range"


def test_permutation_does_not_depend_on_how_positions_are_grouped():
    permutation = Permutation(12_345, "k")
    whole = permutation(np.arange(12_345))
    assert permutation(np.array([7]))[0] == whole[7]
    shuffled = np.random.default_rng(0).permutation(12_345)
    assert np.array_equal(permutation(shuffled), whole[shuffled])


def test_permutation_is_stable_across_versions():
    # A change of this order would silently break every resume: bump ORDER_VERSION in loader.py with it.
    assert Permutation(10, "epoch", 0, 0, "f")(np.arange(10)).tolist() == [2, 4, 9, 7, 0, 8, 6, 3, 1, 5]


@pytest.mark.parametrize("n", [0, -1, 2**62])
def test_permutation_refuses_impossible_n(n):
    with pytest.raises(ValueError, match=r"cannot permute"):
        Permutation(n)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(n):
    orders = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    keys = 25 * len(orders)
    counts = np.zeros(len(orders))
    for key in range(keys):
        counts[orders[tuple(Permutation(n, key)(np.arange(n)).tolist())]] += 1
    degrees = len(orders) - 1
    assert chi_square(counts) < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("n", [9, 64])
def test_each_item_is_equally_likely_at_each_position(n):
    keys = 1000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, "p", key)(np.arange(n))] += 1
    degrees = (n - 1) ** 2
    assert chi_square(counts) < degrees + 5 * np.sqrt(2 * degrees)


def test_neighbours_are_not_related():
    n, bins = 100_000, 20
    items = Permutation(n, "neighbours")(np.arange(n))
    gaps = np.diff(items) % n
    counts = np.bincount(gaps * bins // n, minlength=bins)
    assert chi_square(counts) < (bins - 1) + 5 * np.sqrt(2 * (bins - 1))
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.02


def test_keys_keep_their_parts_apart():
    assert not np.array_equal(derive_keys("1", "23", count=4), derive_keys("12", "3", count=4))
    assert np.array_equal(derive_keys("a", 1, count=4), derive_keys("a", 1, count=8)[:4])


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"fingerprint": "g"}, {"positions": 500}], ids=["seed", "fingerprint", "epoch"]
)
def test_epoch_order_differs(other):
    n = 500
    base = EpochOrder(n, seed=0, fingerprint="f", shuffle=True)(np.arange(n))
    order = EpochOrder(n, seed=other.get("seed", 0), fingerprint=other.get("fingerprint", "f"), shuffle=True)
    items = order(np.arange(n) + other.get("positions", 0))
    assert np.array_equal(np.sort(items), np.arange(n))
    assert np.mean(items == base) < 0.05


def test_epoch_order_crosses_epochs_in_one_call():
    order = EpochOrder(7, seed=3, fingerprint="f", shuffle=True)
    items = order(np.arange(21))
    for epoch in range(3):
        assert np.array_equal(np.sort(items[7 * epoch : 7 * epoch + 7]), np.arange(7))
    assert np.array_equal(order(np.arange(5, 12)), items[5:12])


def test_epoch_order_without_shuffle_is_the_identity():
    assert EpochOrder(4, seed=0, fingerprint="f", shuffle=False)(np.arange(9)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
