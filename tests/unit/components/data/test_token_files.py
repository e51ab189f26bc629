"""Token files: what is written is read back, and no damaged or half-written file passes for a whole one."""

import errno
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from trainer.components.data import token_files, token_shards
from trainer.components.data.token_files import INDEX_NAME, TokenDataset, finish_dataset, write_token_dataset
from trainer.components.data.token_shards import (
    OutOfSpaceError,
    ShardWriter,
    read_shard_header,
    shard_name,
    token_dtype,
)

VOCAB = {"uint16": 60_000, "uint32": 130_000}


def make_documents(vocab_size: int = 60_000, n: int = 60, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(0, 90)) for _ in range(n)]


def write(folder: Path, documents: list[np.ndarray], vocab_size: int = 60_000, **options: int) -> TokenDataset:
    return write_token_dataset(folder, documents, vocab_size=vocab_size, tokenizer_fingerprint="abc", **options)


@pytest.mark.parametrize("dtype", VOCAB)
@pytest.mark.parametrize("shard_tokens", [1, 200, 10**6])
def test_dataset_round_trip_across_shards(tmp_path: Path, dtype: str, shard_tokens: int) -> None:
    documents = make_documents(VOCAB[dtype])
    dataset = write(tmp_path, documents, VOCAB[dtype], shard_tokens=shard_tokens)
    flat = np.concatenate(documents)
    assert dataset.dtype == np.dtype(dtype)
    assert (dataset.n_tokens, dataset.n_documents) == (len(flat), len(documents))
    np.testing.assert_array_equal(dataset.read(0, len(flat)), flat)
    expected_starts = np.cumsum([0, *(len(d) for d in documents)])
    assert dataset.document_starts.dtype == np.int64
    np.testing.assert_array_equal(dataset.document_starts, expected_starts)
    generator = random.Random(shard_tokens)
    for _ in range(30):
        start = generator.randrange(len(flat) - 150)
        np.testing.assert_array_equal(dataset.read(start, 150), flat[start : start + 150])
    dataset.verify()
    assert (len(dataset.shards) > 1) == (shard_tokens < len(flat))


def test_gather_rows_cross_shards(tmp_path: Path) -> None:
    documents = make_documents()
    dataset = write(tmp_path, documents, shard_tokens=100)
    flat = np.concatenate(documents)
    starts = np.array([0, 57, len(flat) - 333, 1000, 57])
    rows = dataset.gather(starts, 333)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, np.stack([flat[s : s + 333] for s in starts]))


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 11), (10, 1)])
def test_read_outside_raises(tmp_path: Path, start: int, length: int) -> None:
    dataset = write(tmp_path, [np.arange(10)])
    with pytest.raises(IndexError, match="which has 10"):
        dataset.read(start, length)
    with pytest.raises(IndexError, match="which has 10"):
        dataset.gather(np.array([0, start]), length)


def test_many_shards_keep_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_MAX_OPEN_SHARDS", 3)
    documents = make_documents()
    dataset = write(tmp_path, documents, shard_tokens=50)
    np.testing.assert_array_equal(dataset.read(0, dataset.n_tokens), np.concatenate(documents))
    assert len(dataset._maps) == 3


def test_dataset_survives_pickling(tmp_path: Path) -> None:
    dataset = write(tmp_path, make_documents())
    dataset.read(0, 5)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.read(0, 5), dataset.read(0, 5))
    assert len(pickle.dumps(dataset)) < 5_000


def test_fingerprint_tells_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a", make_documents())
    same = write(tmp_path / "b", make_documents())
    changed = make_documents()
    changed[3] = (changed[3] + 1) % 60_000
    assert first.fingerprint == same.fingerprint
    assert write(tmp_path / "c", changed).fingerprint != first.fingerprint


@pytest.mark.parametrize(("vocab_size", "expected"), [(259, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_dtype_by_vocabulary(vocab_size: int, expected: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(expected)


def test_id_outside_vocabulary_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary of 259"):
        write(tmp_path, [np.array([5, 300])], vocab_size=259)


def test_header_page_leaves_tokens_aligned(tmp_path: Path) -> None:
    write(tmp_path, [np.array([7, 8, 9])])
    raw = (tmp_path / shard_name(0)).read_bytes()
    np.testing.assert_array_equal(np.frombuffer(raw, "<u2", 3, offset=4096), [7, 8, 9])
    assert len(raw) == read_shard_header(tmp_path / shard_name(0)).file_size


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-n_bytes])


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: flip(f / shard_name(1), 4096), "shard-00001.tokens: the checksum of its tokens is wrong"),
        (lambda f: flip(f / shard_name(1), -1), "shard-00001.tokens: the checksum of its documents is wrong"),
        (lambda f: flip(f / shard_name(2), 30), "shard-00002.tokens: the checksum of its header is wrong"),
        (lambda f: flip(f / shard_name(0), 0), "shard-00000.tokens: not a whole token file"),
        (lambda f: flip(f / token_files.DOCUMENTS_NAME, -1), "documents.offsets: its checksum is wrong"),
    ],
)
def test_verify_names_damaged_file(tmp_path: Path, damage, cause: str) -> None:
    dataset = write(tmp_path, make_documents(), shard_tokens=500)
    damage(tmp_path)
    with pytest.raises(ValueError, match=cause) as caught:
        dataset.verify()
    assert str(caught.value).count("\n  ") == 1


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: cut(f / shard_name(1), 8), "shard-00001.tokens: .* bytes where .* are expected"),
        (lambda f: (f / shard_name(1)).unlink(), "shard-00001.tokens: cannot be read"),
        (lambda f: (f / INDEX_NAME).unlink(), "it has shards but no index.json"),
        (lambda f: (f / INDEX_NAME).write_text("{]"), "index.json: not an index"),
        (lambda f: (f / INDEX_NAME).write_text('{"version": 99}'), "format version 99"),
        (lambda f: (f / INDEX_NAME).write_text('{"version": 1}'), "not an index of a prepared data set"),
        (lambda f: edit_index(f, n_tokens=3), "its fingerprint does not fit"),
        (lambda f: cut(f / token_files.DOCUMENTS_NAME, 8), "documents.offsets: .* bytes where"),
    ],
)
def test_open_refuses_damaged_folder(tmp_path: Path, damage, cause: str) -> None:
    write(tmp_path, make_documents(), shard_tokens=500)
    damage(tmp_path)
    with pytest.raises(ValueError, match=cause):
        TokenDataset.open(tmp_path)


def edit_index(folder: Path, **values: int) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps({**index, **values}))


def test_read_refuses_replaced_shard(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a", [np.arange(100)])
    write(tmp_path / "b", [np.arange(1, 101)])
    (tmp_path / "b" / shard_name(0)).replace(tmp_path / "a" / shard_name(0))
    with pytest.raises(ValueError, match=r"not the shard that index\.json lists"):
        dataset.read(0, 5)


def test_open_missing_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is not a prepared data set: there is no such folder"):
        TokenDataset.open(tmp_path / "absent")


def test_finish_refuses_gap_and_mixture(tmp_path: Path) -> None:
    write(tmp_path, make_documents(), shard_tokens=500)
    (tmp_path / shard_name(1)).unlink()
    with pytest.raises(ValueError, match="shards are missing"):
        finish_dataset(tmp_path)
    writer = ShardWriter(tmp_path / shard_name(1), vocab_size=60_000, tokenizer_fingerprint="other")
    writer.append(np.array([1]), np.array([1]))
    writer.commit()
    with pytest.raises(ValueError, match="different tokenizers"):
        finish_dataset(tmp_path)


def test_finish_refuses_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no tokens"):
        write(tmp_path, [])


class FullDisk:
    """A file on a disk that holds `room` more bytes."""

    def __init__(self, file, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, payload: bytes) -> int:
        self._room -= len(payload)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(payload)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [100, 5_000, 4096 + 2 * 1000 + 10])
def test_full_disk_leaves_whole_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    writer = ShardWriter(tmp_path / shard_name(0), vocab_size=259, tokenizer_fingerprint="abc")
    writer.append(np.arange(100), np.array([100]))
    writer.commit()
    monkeypatch.setattr(token_shards, "open_for_writing", lambda path: FullDisk(path.open("wb"), room))
    with pytest.raises(OutOfSpaceError, match=r"no space left for shard-00001.tokens: it needs at least .* MiB free"):
        write_full_shard(tmp_path / shard_name(1))
    assert [path.name for path in tmp_path.iterdir()] == [shard_name(0)]
    read_shard_header(tmp_path / shard_name(0))


def write_full_shard(path: Path) -> None:
    writer = ShardWriter(path, vocab_size=259, tokenizer_fingerprint="abc")
    for _ in range(10):
        writer.append(np.arange(100), np.array([100]))
    writer.commit()


def test_aborted_shard_is_removed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / shard_name(0), vocab_size=259, tokenizer_fingerprint="abc")
    writer.append(np.arange(100), np.array([100]))
    assert (tmp_path / (shard_name(0) + ".tmp")).is_file()
    writer.abort()
    assert not list(tmp_path.iterdir())
