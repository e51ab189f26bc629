import numpy as np
import pytest

from trainer.components.data.packing import BestFitPacking, ConcatPacking, build_batch
from trainer.components.data.packing_plan import build_plan
from trainer.components.data.token_files import write_token_dataset

IGNORE = -100


def make_documents(lengths, vocab=50_000):
    """Documents in which every token is unique, so that a label tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) + 1 for length, end in zip(lengths, ends, strict=True)]


@pytest.fixture
def make_dataset(tmp_path):
    def make(lengths, name="data", shard_tokens=40):
        return write_token_dataset(
            tmp_path / name,
            make_documents(lengths),
            vocab_size=50_001,
            tokenizer_fingerprint="t",
            shard_tokens=shard_tokens,
        )

    return make


def document_of(lengths):
    """Document number of each token value (values begin at 1)."""
    return np.concatenate([[-1], np.repeat(np.arange(len(lengths)), lengths)])


LENGTHS = [5, 1, 9, 23, 2, 3, 40, 1, 7, 8, 11, 4, 6, 17]


@pytest.mark.parametrize("seq_len", [1, 4, 8, 16])
@pytest.mark.parametrize("document_mask", [False, True])
def test_concat_equals_brute_force(make_dataset, seq_len, document_mask):
    packing = ConcatPacking(make_dataset(LENGTHS), seq_len=seq_len, document_mask=document_mask)
    stream = np.concatenate(make_documents(LENGTHS))
    document = document_of(LENGTHS)
    assert packing.n_sequences == (len(stream) - 1) // seq_len
    order = np.random.default_rng(0).permutation(packing.n_sequences)
    batch = packing.fetch(order)
    for row, index in enumerate(order.tolist()):
        for t in range(seq_len):
            token, label = stream[index * seq_len + t], stream[index * seq_len + t + 1]
            assert batch["tokens"][row, t] == token
            crosses = document[token] != document[label]
            assert batch["labels"][row, t] == (IGNORE if document_mask and crosses else label)
            if document_mask:
                within = t
                while within and document[stream[index * seq_len + within - 1]] == document[token]:
                    within -= 1
                assert batch["positions"][row, t] == t - within
    assert ("positions" in batch) == document_mask
    assert all(value.dtype == np.int64 and value.flags.c_contiguous for value in batch.values())


def test_concat_trains_on_every_label_once(make_dataset):
    packing = ConcatPacking(make_dataset(LENGTHS), seq_len=8, document_mask=False)
    labels = packing.fetch(np.arange(packing.n_sequences))["labels"].ravel()
    n_tokens = sum(LENGTHS)
    assert np.array_equal(labels, np.arange(2, 2 + packing.n_sequences * 8))
    assert packing.report.cropped == pytest.approx(1 - (packing.n_sequences * 8 + 1) / n_tokens)
    assert packing.report.padded == 0


@pytest.mark.parametrize("total", [2, 8, 9, 10, 16, 17, 18])
@pytest.mark.parametrize("document_mask", [False, True])
def test_concat_with_tail_loses_no_label(make_dataset, total, document_mask):
    packing = ConcatPacking(make_dataset([total]), seq_len=8, document_mask=document_mask, keep_tail=True)
    batch = packing.fetch(np.arange(packing.n_sequences))
    labels = batch["labels"]
    assert np.array_equal(labels[labels != IGNORE], np.arange(2, total + 1))
    assert packing.report.cropped == 0
    # The window's last token is a label only, so a window with one token less has no padded place.
    assert packing.report.padded * labels.size == pytest.approx((labels == IGNORE).sum())


def test_concat_of_too_little_data_has_no_sequence(make_dataset):
    packing = ConcatPacking(make_dataset([8]), seq_len=8, document_mask=False)
    assert packing.n_sequences == 0
    assert packing.report.cropped == 1


@pytest.mark.parametrize("seq_len", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("document_mask", [False, True])
def test_best_fit_trains_on_every_label_inside_documents_once(make_dataset, tmp_path, seq_len, document_mask):
    packing = BestFitPacking(
        make_dataset(LENGTHS), seq_len=seq_len, document_mask=document_mask, cache_dir=tmp_path / "cache"
    )
    batch = packing.fetch(np.arange(packing.n_sequences))
    document = document_of(LENGTHS)
    tokens, labels = batch["tokens"], batch["labels"]
    inside = []
    for row in range(len(tokens)):
        for t in range(seq_len):
            token, label = tokens[row, t], labels[row, t]
            if label == IGNORE:
                continue
            if document[token] == document[label]:
                assert label == token + 1
                inside.append(label)
            else:
                assert not document_mask, "no label across documents with the mask"
                assert t + 1 == seq_len or tokens[row, t + 1] == label
    firsts = np.cumsum([0, *LENGTHS[:-1]]) + 1
    assert np.array_equal(np.sort(inside), np.setdiff1d(np.arange(1, sum(LENGTHS) + 1), firsts))


@pytest.mark.parametrize("seq_len", [4, 16, 64])
def test_best_fit_positions_restart_at_each_document(make_dataset, tmp_path, seq_len):
    packing = BestFitPacking(make_dataset(LENGTHS), seq_len=seq_len, document_mask=True, cache_dir=tmp_path)
    batch = packing.fetch(np.arange(packing.n_sequences))
    document = document_of(LENGTHS)
    for tokens, positions in zip(batch["tokens"], batch["positions"], strict=True):
        expected = []
        for t, token in enumerate(tokens):
            same = t > 0 and document[token] == document[tokens[t - 1]]  # padding (token 0) is a document of its own
            expected.append(expected[-1] + 1 if same else 0)
        assert positions.tolist() == expected


def test_best_fit_keeps_documents_whole_where_they_fit(make_dataset, tmp_path):
    packing = BestFitPacking(make_dataset(LENGTHS), seq_len=16, document_mask=False, cache_dir=tmp_path)
    plan = build_plan(np.concatenate([[0], np.cumsum(LENGTHS)]), seq_len=16)
    pieces = sorted(piece for i in range(plan.n_sequences) for piece in plan.pieces(i))
    starts = np.cumsum([0, *LENGTHS[:-1]])
    for start, length in zip(starts.tolist(), LENGTHS, strict=True):
        if 2 <= length <= 17:
            assert (start, length) in pieces
    assert packing.report.cut_documents == sum(length > 17 for length in LENGTHS)
    assert packing.report.cropped == pytest.approx(LENGTHS.count(1) / sum(LENGTHS))
    padded = (packing.fetch(np.arange(packing.n_sequences))["tokens"] == 0).mean()
    assert packing.report.padded == pytest.approx(padded)


def test_build_batch_does_not_alias_its_window():
    window = np.arange(10).reshape(2, 5)
    batch = build_batch(window, None, None)
    batch["labels"][:] = 0
    batch["tokens"][:] = 0
    assert np.array_equal(window, np.arange(10).reshape(2, 5))
