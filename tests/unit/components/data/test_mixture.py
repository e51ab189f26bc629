import numpy as np
import pytest

from trainer.components.data.mixture import BLOCK, Mixture, MixtureSource


def make_mixture(*weights, sizes=None, seed=0, shuffle=True):
    sizes = sizes or [1000 + 7 * i for i in range(len(weights))]
    sources = [MixtureSource(f"s{i}", n, w, f"f{i}") for i, (w, n) in enumerate(zip(weights, sizes, strict=True))]
    return Mixture(sources, seed=seed, shuffle=shuffle)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (3, 5, 7, 11), (1.0, 0.0004)])
def test_each_source_has_its_share_to_within_one_sequence(weights):
    mixture = make_mixture(*weights)
    shares = np.array(weights) / sum(weights)
    for blocks in (1, 3, 1000, 123_456):
        n = blocks * BLOCK
        assert np.abs(mixture.counts(n) - shares * n).max() < 1 + n * 2**-38
        assert mixture.counts(n).sum() == n


@pytest.mark.parametrize("n", [0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
def test_counts_equal_what_was_located(n):
    mixture = make_mixture(0.6, 0.3, 0.1)
    source, _ = mixture.locate(np.arange(n))
    assert np.array_equal(mixture.counts(n), np.bincount(source, minlength=3))


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_source_is_walked_in_its_own_order_epoch_after_epoch(shuffle):
    sizes = [300, 1000, 41]
    mixture = make_mixture(0.5, 0.3, 0.2, sizes=sizes, shuffle=shuffle)
    places = np.arange(3 * BLOCK)
    source, sequence = mixture.locate(places)
    epochs = mixture.epochs(places)
    for index, size in enumerate(sizes):
        walk = sequence[source == index]
        assert np.array_equal(epochs[source == index], np.arange(len(walk)) // size)
        for epoch in range(len(walk) // size):
            seen = walk[epoch * size : (epoch + 1) * size]
            assert np.array_equal(np.sort(seen), np.arange(size))
            assert np.array_equal(seen, np.arange(size)) != shuffle


def test_locate_does_not_depend_on_how_places_are_grouped():
    mixture = make_mixture(0.6, 0.4)
    places = np.arange(BLOCK - 50, BLOCK + 50)
    whole = mixture.locate(places)
    for fresh in (mixture, make_mixture(0.6, 0.4)):
        parts = [fresh.locate(places[i : i + 7]) for i in range(0, 100, 7)]
        assert np.array_equal(np.concatenate([p[0] for p in parts]), whole[0])
        assert np.array_equal(np.concatenate([p[1] for p in parts]), whole[1])
    backwards = mixture.locate(places[::-1])
    assert np.array_equal(backwards[1][::-1], whole[1])


def test_sources_are_interleaved_within_a_block():
    source, _ = make_mixture(0.5, 0.5).locate(np.arange(BLOCK))
    runs = np.diff(np.flatnonzero(np.diff(source)))
    assert runs.max() < 40
    assert np.abs(source.reshape(-1, 512).mean(axis=1) - 0.5).max() < 0.15


def test_interleaving_differs_by_block_and_seed():
    mixture = make_mixture(0.5, 0.5)
    first, _ = mixture.locate(np.arange(BLOCK))
    second, _ = mixture.locate(np.arange(BLOCK, 2 * BLOCK))
    other, _ = make_mixture(0.5, 0.5, seed=1).locate(np.arange(BLOCK))
    assert 0.4 < np.mean(first == second) < 0.6
    assert 0.4 < np.mean(first == other) < 0.6


def test_one_source_is_its_own_epoch_order():
    mixture = make_mixture(3.0, sizes=[10])
    source, sequence = mixture.locate(np.arange(20))
    assert not source.any()
    assert np.array_equal(np.sort(sequence[:10]), np.arange(10))
    assert not np.array_equal(sequence[:10], sequence[10:])


def test_same_data_twice_comes_in_two_orders():
    sources = [MixtureSource("a", 500, 1.0, "same"), MixtureSource("b", 500, 1.0, "same")]
    source, sequence = Mixture(sources, seed=0, shuffle=True).locate(np.arange(1000))
    size = min((source == 0).sum(), (source == 1).sum())
    assert np.mean(sequence[source == 0][:size] == sequence[source == 1][:size]) < 0.05


def test_describe_gives_tokens_and_epochs():
    progress = make_mixture(0.75, 0.25, sizes=[100, 1000]).describe(4 * BLOCK, seq_len=16)
    assert progress["s0"].sequences == 3 * BLOCK
    assert progress["s0"].tokens == 3 * BLOCK * 16
    assert progress["s0"].epochs == pytest.approx(3 * BLOCK / 100)
    assert progress["s1"].epochs == pytest.approx(BLOCK / 1000)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ValueError, match=r"data.sources: 's1' has weight"):
        make_mixture(1.0, weight)


def test_weight_too_small_for_a_block_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'s1' has weight 0.0001.*raise its weight"):
        make_mixture(1.0, 0.0001)


def test_empty_source_is_refused():
    with pytest.raises(ValueError, match=r"'s1' is too small.*training.seq_len"):
        make_mixture(1.0, 1.0, sizes=[5, 0])


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"named 'a'"):
        Mixture([MixtureSource("a", 5, 1.0, "x"), MixtureSource("a", 5, 1.0, "y")], seed=0, shuffle=True)
