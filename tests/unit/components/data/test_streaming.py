import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.components.data import streaming
from trainer.components.data.batch_loader import BatchShape
from trainer.components.data.document_files import Document, DocumentFile, HuggingFaceShard, JsonlFile, ParquetFile
from trainer.components.data.streaming import StreamingLoader, StreamPosition, StreamShare
from trainer.config.schema_training import DataloaderConfig

SEQ_LEN = 8
IGNORE = -100
EOS = 0


def encode(text):
    """A document 'a b c' of numbers becomes these numbers and EOS."""
    return np.array([*map(int, text.split()), EOS], dtype=np.uint32)


def make_texts(n_files, n_rows, seed=0):
    """Texts of numbers, each used once, per file."""
    rng = np.random.default_rng(seed)
    counter, files = 1, []
    for _ in range(n_files):
        rows = []
        for _ in range(n_rows):
            length = int(rng.integers(1, 30))
            rows.append(" ".join(str(counter + i) for i in range(length)))
            counter += length
        files.append(rows)
    return files


def write_jsonl(folder, texts):
    files = []
    for number, rows in enumerate(texts):
        path = folder / f"part-{number}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        files.append(JsonlFile(path))
    return files


def write_parquet(folder, texts):
    import pyarrow
    from pyarrow import parquet

    files = []
    for number, rows in enumerate(texts):
        path = folder / f"part-{number}.parquet"
        parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=5)
        files.append(ParquetFile(path))
    return files


def write_hugging_face(folder, texts):
    pytest.importorskip("datasets")
    write_jsonl(folder, texts)
    return [HuggingFaceShard(str(folder), None, "train", "text", i, len(texts)) for i in range(len(texts))]


class StreamFactory:
    def __init__(self):
        self.made = []

    def __call__(self, files, *, rank=0, degree=1, local=2, mask=False, **more):
        options = {"seed": 0, "shuffle": False, "max_bad_rows": 0, "read_retries": 2, "encode": encode, **more}
        further = {name: options.pop(name) for name in ("epoch_steps", "read_timeout") if name in options}
        share = StreamShare(files, dp_rank=rank, dp_degree=degree, **options)
        loader = StreamingLoader(
            share,
            name="stream",
            identity={"files": len(files)},
            shape=BatchShape(local, local * degree, SEQ_LEN, rank, degree),
            document_mask=mask,
            section=DataloaderConfig(prefetch_factor=2),
            **further,
        )
        self.made.append(loader)
        return loader


@pytest.fixture
def make_stream():
    factory = StreamFactory()
    yield factory
    for loader in factory.made:
        loader.close()


def flat(batches, name="tokens"):
    return torch.cat([batch[name] for batch in batches]).flatten().tolist()


def read_into(batches, loader, count):
    for _ in range(count):
        batches.append(loader.next_batch())


def stream_of(texts):
    return [token for rows in texts for row in rows for token in encode(row).tolist()]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_hugging_face])
def test_stream_equals_brute_force_over_epochs(tmp_path, make_stream, write):
    texts = make_texts(3, 12)
    expected = stream_of(texts) * 3
    loader = make_stream(write(tmp_path, texts))
    n = (len(expected) - 1) // (2 * SEQ_LEN)
    batches = [loader.next_batch() for _ in range(n)]
    assert flat(batches) == expected[: n * 2 * SEQ_LEN]
    assert flat(batches, "labels") == expected[1 : 1 + n * 2 * SEQ_LEN]
    assert loader.describe()["stream"].tokens == n * 2 * SEQ_LEN
    assert loader.describe()["stream"].epochs >= 2


def test_document_mask_follows_the_documents(tmp_path, make_stream):
    texts = make_texts(2, 10)
    loader = make_stream(write_jsonl(tmp_path, texts), mask=True)
    for _ in range(20):
        batch = loader.next_batch()
        for tokens, labels, positions in zip(
            *(batch[k].tolist() for k in ("tokens", "labels", "positions")), strict=True
        ):
            expected = 0
            for t, token in enumerate(tokens):
                assert positions[t] == expected
                assert (labels[t] == IGNORE) == (token == EOS)
                assert token == EOS or t + 1 == SEQ_LEN or labels[t] == tokens[t + 1]
                expected = 0 if token == EOS else expected + 1


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_each_epoch_without_overlap(tmp_path, degree, shuffle):
    texts = make_texts(3, 10)
    files = write_jsonl(tmp_path, texts)
    for epoch in range(2):
        seen = []
        for rank in range(degree):
            share = StreamShare(
                files,
                encode=encode,
                dp_rank=rank,
                dp_degree=degree,
                seed=0,
                shuffle=shuffle,
                max_bad_rows=0,
                read_retries=0,
            )
            documents = share.read(StreamPosition(epoch=epoch), threading.Event(), endless=False)
            seen += [" ".join(map(str, tokens[:-1])) for _, tokens in documents]
        assert sorted(seen) == sorted(row for rows in texts for row in rows)


def test_shuffle_changes_the_order_of_files_each_epoch(tmp_path):
    files = write_jsonl(tmp_path, make_texts(20, 1))
    options = {"encode": encode, "dp_rank": 0, "dp_degree": 1, "max_bad_rows": 0, "read_retries": 0}
    share = StreamShare(files, seed=0, shuffle=True, **options)
    other = StreamShare(files, seed=1, shuffle=True, **options)
    assert share.files_of(0) != share.files_of(1)
    assert share.files_of(0) != other.files_of(0)
    assert sorted(f.name for f in share.files_of(0)) == sorted(f.name for f in files)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_hugging_face])
@pytest.mark.parametrize(("n_files", "degree"), [(3, 1), (3, 2), (2, 3)], ids=["one", "by-file", "by-row"])
def test_resume_is_exact_again_and_again(tmp_path, make_stream, write, n_files, degree):
    files = write(tmp_path, make_texts(n_files, 9))
    rank = degree - 1
    options = {"rank": rank, "degree": degree, "mask": True, "shuffle": True}
    loader = make_stream(files, **options)
    whole = [loader.next_batch() for _ in range(60)]
    state, got = None, []
    for steps in (1, 7, 2, 20, 30):
        loader = make_stream(files, **options)
        if state is not None:
            loader.load_state_dict(state)
        got += [loader.next_batch() for _ in range(steps)]
        state = json.loads(json.dumps(loader.state_dict()))
        assert state == loader.state_dict(), "the state survives JSON"
        loader.close()
    assert loader.describe()[loader._name].epochs > 1, "the run must cross an epoch"
    for a, b in zip(got, whole, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in whole[0])


def test_resume_with_another_microbatch_goes_on_at_the_same_token(tmp_path, make_stream):
    texts = make_texts(2, 30)
    files = write_jsonl(tmp_path, texts)
    first = make_stream(files, local=3)
    got = flat([first.next_batch() for _ in range(5)])
    second = make_stream(files, local=2)
    second.load_state_dict(first.state_dict())
    got += flat([second.next_batch() for _ in range(5)])
    assert got == stream_of(texts)[: len(got)]


def test_other_number_of_ranks_is_refused(tmp_path, make_stream):
    files = write_jsonl(tmp_path, make_texts(4, 3))
    state = make_stream(files, degree=4).state_dict()
    with pytest.raises(ValueError, match=r"as many data-parallel ranks.*: 4 .*now 2 .*Use that number"):
        make_stream(files, degree=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rank 1"):
        make_stream(files, rank=1, degree=4).load_state_dict(state)


def test_other_data_is_refused_by_name(tmp_path, make_stream):
    files = write_jsonl(tmp_path, make_texts(4, 3))
    state = make_stream(files).state_dict()
    with pytest.raises(ValueError, match=r"what changed: files"):
        make_stream(files[:3]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.streaming"):
        make_stream(files).load_state_dict({"sequences": 3})


def spoil(files, row=4):
    lines = files[1].path.read_text().splitlines()
    lines[row] = "{no json"
    files[1].path.write_text("\n".join(lines) + "\n")


def test_bad_row_is_named_and_left_out(tmp_path, make_stream, caplog):
    texts = make_texts(2, 10)
    files = write_jsonl(tmp_path, texts)
    spoil(files)
    del texts[1][4]
    loader = make_stream(files, max_bad_rows=1)
    n = (len(stream_of(texts)) - 1) // (2 * SEQ_LEN)
    got = flat([loader.next_batch() for _ in range(n)])
    assert got == stream_of(texts)[: len(got)]
    assert "part-1.jsonl, line 5" in caplog.text


def test_too_many_bad_rows_stop_after_the_good_batches(tmp_path, make_stream):
    texts = make_texts(2, 10)
    files = write_jsonl(tmp_path, texts)
    spoil(files)
    loader = make_stream(files)
    good = stream_of([texts[0], texts[1][:4]])
    batches = []
    with pytest.raises(ValueError, match=r"data.max_bad_rows = 0.*part-1.jsonl, line 5"):
        read_into(batches, loader, 1000)
    got = flat(batches)
    assert got == good[: len(got)]
    assert len(good) - len(got) <= 2 * SEQ_LEN
    with pytest.raises(ValueError, match=r"data.max_bad_rows"):
        loader.next_batch()


def test_bad_rows_are_counted_once_an_epoch_across_a_resume(tmp_path, make_stream):
    texts = make_texts(2, 10)
    files = write_jsonl(tmp_path, texts)
    spoil(files, row=0)
    spoil(files, row=8)
    del texts[1][8], texts[1][0]
    one_epoch = len(stream_of(texts)) // (2 * SEQ_LEN)
    loader = make_stream(files, max_bad_rows=2)
    for _ in range(2 * one_epoch - 3):
        loader.next_batch()
    state = loader.state_dict()
    assert (state["position"]["epoch"], state["position"]["bad_rows"]) == (1, 1)
    resumed = make_stream(files, max_bad_rows=2)
    resumed.load_state_dict(state)
    read_into([], resumed, 2 * one_epoch)
    assert resumed.state_dict()["position"]["epoch"] == 3, "the same rows again and again, two an epoch"
    state["position"]["bad_rows"] = 2
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"3 rows cannot be used.*part-1.jsonl, line 9"):
        read_into([], resumed, one_epoch)


class FlakyFile(DocumentFile):
    """Fails `failures` times at each of some rows."""

    name = "flaky"

    def __init__(self, n_rows, failures, error=ConnectionError):
        self.n_rows, self.error = n_rows, error
        self.left = dict.fromkeys(range(3, n_rows, 5), failures)

    def read(self, start=0, stop=None):
        for row in range(start, self.n_rows):
            if self.left.get(row, 0):
                self.left[row] -= 1
                raise self.error("reset by peer")
            yield Document(str(row + 1), row, row + 1)

    def identity(self):
        return [self.name]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(streaming, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.mark.usefixtures("no_pauses")
def test_failing_reads_are_tried_again_without_loss(make_stream, caplog):
    loader = make_stream([FlakyFile(40, failures=2)])
    got = flat([loader.next_batch() for _ in range(4)])
    assert got[0::2] == list(range(1, 33))
    assert "attempt 2 of 2" in caplog.text


@pytest.mark.usefixtures("no_pauses")
def test_reads_that_keep_failing_stop_the_run(make_stream):
    loader = make_stream([FlakyFile(40, failures=3)], local=1)
    with pytest.raises(RuntimeError, match=r"flaky, at 3 failed 3 times, data.read_retries = 2.*reset by peer"):
        read_into([], loader, 3)


@pytest.mark.usefixtures("no_pauses")
def test_programming_errors_are_not_tried_again(make_stream):
    file = FlakyFile(40, failures=1, error=KeyError)
    with pytest.raises(KeyError):
        make_stream([file]).next_batch()
    assert file.left[3] == 0
    assert file.left[8] == 1


def test_close_interrupts_a_pause(make_stream, monkeypatch):
    monkeypatch.setattr(streaming, "FIRST_PAUSE_SECONDS", 600.0)
    monkeypatch.setattr(streaming, "LONGEST_PAUSE_SECONDS", 600.0)
    loader = make_stream([FlakyFile(40, failures=9)], local=1)
    loader._background = loader._start(StreamPosition(), endless=True)
    thread = loader._background._thread
    loader.close()
    assert not thread.is_alive()


def test_share_without_documents_is_an_error_and_no_endless_loop(tmp_path, make_stream):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"rank 0 of 1 finds no usable document"):
        make_stream([JsonlFile(tmp_path / "empty.jsonl")]).next_batch()


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_validation_has_as_many_batches_on_all_ranks(tmp_path, make_stream, degree):
    texts = make_texts(3, 10)
    files = write_jsonl(tmp_path, texts)
    labels = []
    for rank in range(degree):
        loader = make_stream(files, rank=rank, degree=degree, mask=True, epoch_steps=40)
        batches = list(loader.epoch_batches())
        assert len(batches) == 40
        labels += [label for label in flat(batches, "labels") if label != IGNORE]
        assert flat(loader.epoch_batches()) == flat(batches), "it begins anew each time"
        assert loader.state_dict()["sequences"] == 0
    # Within a document every token but the first is a label, and each document counts once.
    expected = [token for rows in texts for row in rows for token in encode(row).tolist()[1:]]
    assert sorted(labels) == sorted(expected)


class Stuck:
    """A file that stops giving rows."""

    name = "stuck"

    def read(self, start=0, stop=None):
        yield from (Document("7 " * 40, row, row + 1) for row in range(6))
        threading.Event().wait(2.0)

    def locate(self, position):
        return f"stuck:{position}"


def test_source_that_gives_nothing_is_named_before_other_ranks_give_up(make_stream):
    loader = make_stream([Stuck()], read_timeout=0.3)
    with pytest.raises(RuntimeError, match=r"data: stream gave no batch for 0.3 s .*'file': 'stuck'.* slow"):
        read_into([], loader, 200)
    with pytest.raises(RuntimeError, match=r"gave no batch for 0\.3 s"):
        list(make_stream([Stuck()], read_timeout=0.3, epoch_steps=200).epoch_batches())


EXIT_SCRIPT = """
import time
from test_streaming import DataloaderConfig, BatchShape, Document, FlakyFile, StreamShare, StreamingLoader, encode

class Stuck(FlakyFile):
    def read(self, start=0, stop=None):
        yield from (Document(str(row + 1), row, row + 1) for row in range(40))
        time.sleep(600)

share = StreamShare([Stuck(1, 0)], encode=encode, dp_rank=0, dp_degree=1, seed=0, shuffle=False, max_bad_rows=0, read_retries=0)
shape = BatchShape(1, 1, 8)
loader = StreamingLoader(share, name="s", identity={}, shape=shape, document_mask=False, section=DataloaderConfig())
loader.next_batch()
print("read", flush=True)
"""


def test_process_ends_while_a_read_hangs():
    here = Path(__file__)
    env = {"PYTHONPATH": f"{here.parent}:{here.parents[4]}", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXIT_SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
