import numpy as np
import pytest

from trainer.components.data import packing_plan
from trainer.components.data.packing_plan import best_fit_decreasing, build_plan, load_or_build_plan

LENGTHS = [5, 1, 9, 23, 2, 3, 40, 1, 7, 8, 11, 4, 6, 17]


def naive_best_fit(sizes, capacity):
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting)[1]] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [2, 3, 17, 64, 70_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_fit_decreasing_equals_the_textbook(capacity, seed):
    rng = np.random.default_rng(seed)
    sizes = np.clip((rng.exponential(capacity / 4, 400)).astype(np.int64), 2, capacity)
    bin_of, n_bins = best_fit_decreasing(sizes, capacity)
    used = np.bincount(bin_of, weights=sizes, minlength=n_bins).astype(int)
    assert used.max() <= capacity
    assert used.min() > 0
    assert sorted((capacity - used).tolist()) == naive_best_fit(sizes.tolist(), capacity)


def test_best_fit_decreasing_of_nothing():
    assert best_fit_decreasing(np.empty(0, np.int64), 9)[1] == 0


def same_plan(a, b):
    return a.n_sequences == b.n_sequences and all(a.pieces(i) == b.pieces(i) for i in range(a.n_sequences))


def test_plan_is_cached_and_keyed(tmp_path, monkeypatch):
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    plan = load_or_build_plan(starts, fingerprint="f", seq_len=8, cache_dir=tmp_path)
    assert same_plan(plan, build_plan(starts, seq_len=8))
    monkeypatch.setattr(packing_plan, "write_plan", lambda *_, **__: pytest.fail("the cached plan was not used"))
    assert same_plan(load_or_build_plan(starts, fingerprint="f", seq_len=8, cache_dir=tmp_path), plan)
    for key in ({"fingerprint": "g", "seq_len": 8}, {"fingerprint": "f", "seq_len": 9}):
        with pytest.raises(pytest.fail.Exception):
            load_or_build_plan(starts, **key, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "piece_start.bin", "sequence_first_piece.bin"])
def test_damaged_plan_is_made_again(tmp_path, name, caplog):
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    plan = load_or_build_plan(starts, fingerprint="f", seq_len=8, cache_dir=tmp_path)
    expected = build_plan(starts, seq_len=8)
    del plan
    (victim,) = tmp_path.rglob(name)
    victim.write_bytes(victim.read_bytes()[:-3])
    assert same_plan(load_or_build_plan(starts, fingerprint="f", seq_len=8, cache_dir=tmp_path), expected)
    assert "damaged" in caplog.text
    assert not list(tmp_path.rglob(".plan-*"))


def test_plan_without_a_writable_cache_is_made_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    plan = load_or_build_plan(starts, fingerprint="f", seq_len=8, cache_dir=tmp_path / "file")
    assert same_plan(plan, build_plan(starts, seq_len=8))
    assert "data.cache_dir" in caplog.text


def test_plan_in_groups_covers_all_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(packing_plan, "GROUP_DOCUMENTS", 4)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    plan = load_or_build_plan(starts, fingerprint="f", seq_len=8, cache_dir=tmp_path)
    assert same_plan(plan, build_plan(starts, seq_len=8))
    labels = sum(length - 1 for i in range(plan.n_sequences) for _, length in plan.pieces(i))
    assert labels == sum(length - 1 for length in LENGTHS)
    assert all(sum(length for _, length in plan.pieces(i)) <= 9 for i in range(plan.n_sequences))


def test_plan_of_documents_without_labels_is_empty(tmp_path):
    plan = load_or_build_plan(np.arange(5), fingerprint="f", seq_len=8, cache_dir=tmp_path)
    assert plan.n_sequences == 0
    assert plan.n_dropped_tokens == 4
