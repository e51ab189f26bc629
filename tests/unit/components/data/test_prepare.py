"""Preparation: the same files for any number of workers and any interruption, and one worker among many processes."""

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer.components.data import prepare as prepare_module
from trainer.components.data import tokenize_tasks
from trainer.components.data.document_files import Document, DocumentFile
from trainer.components.data.prepare import PrepareStats, ensure_prepared, prepare, prepare_source
from trainer.components.data.sources import SourceSpec, get_source_spec, open_documents, register_source
from trainer.components.data.token_files import INDEX_NAME, TokenDataset
from trainer.components.data.token_shards import shard_name
from trainer.components.tokenizer import build_tokenizer
from trainer.config.schema import DataConfig

ROOT = Path(__file__).resolve().parents[4]
SHARD_TOKENS = 3_000


def write_jsonl(path: Path, count: int = 300, bad_every: int = 0) -> list[str]:
    texts = []
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            if bad_every and i % bad_every == bad_every - 1:
                file.write('{"text": 3}\n')
            texts.append(f"documént {i} " * (i % 11))
            file.write(json.dumps({"text": texts[-1]}) + "\n")
    return [text for text in texts if text]


def run(path: Path, out: Path, **options) -> tuple[TokenDataset, PrepareStats]:
    data = DataConfig(prepare_workers=options.pop("workers", 1), max_bad_rows=options.pop("max_bad_rows", 100))
    options = {"shard_tokens": SHARD_TOKENS, "tokenizer": build_tokenizer("byte"), **options}
    return prepare_source("jsonl", str(path), out, data=data, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def decode(dataset: TokenDataset) -> list[str]:
    tokenizer = build_tokenizer("byte")
    starts = dataset.document_starts
    return [tokenizer.decode(dataset.read(a, b - a)) for a, b in itertools.pairwise(starts)]


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_tasks, "_TASK_BYTES", 1_500)


@pytest.mark.usefixtures("small_tasks")
def test_documents_are_framed_and_in_order(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl")
    dataset, stats = run(tmp_path / "a.jsonl", tmp_path / "out")
    assert decode(dataset) == texts
    assert dataset.read(0, 2).tolist() == [256, ord("d")]
    np.testing.assert_array_equal([dataset.read(end - 1, 1)[0] for end in dataset.document_starts[1:]], 257)
    assert len(dataset.shards) > 5
    assert stats.n_text_bytes == sum(len(text.encode()) for text in texts)
    assert stats.n_tokens == stats.n_text_bytes + 2 * len(texts)
    dataset.verify()


@pytest.mark.usefixtures("small_tasks")
def test_files_do_not_depend_on_workers_or_compression(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", bad_every=50)
    run(tmp_path / "a.jsonl", tmp_path / "one")
    run(tmp_path / "a.jsonl", tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    subprocess.run(["gzip", "-k", str(tmp_path / "a.jsonl")], check=True)
    compressed, stats = run(tmp_path / "a.jsonl.gz", tmp_path / "three", workers=2)
    assert compressed.fingerprint == TokenDataset.open(tmp_path / "one").fingerprint
    assert stats.n_bad_rows == 6


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_interrupted_run_goes_on_after_whole_shards(tmp_path: Path, kept: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", bad_every=7)
    _, whole = run(tmp_path / "a.jsonl", tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    partial = tmp_path / "partial"
    partial.mkdir()
    for i in range(kept):
        (partial / shard_name(i)).write_bytes(expected[shard_name(i)])
    (partial / (shard_name(kept) + ".tmp")).write_bytes(b"half")
    _, stats = run(tmp_path / "a.jsonl", partial)
    assert contents(partial) == expected
    assert replace(stats, seconds=0, new_tokens=0) == replace(whole, seconds=0, new_tokens=0)
    assert stats.new_tokens < whole.n_tokens or not kept
    _, again = run(tmp_path / "a.jsonl", partial)
    assert again.new_tokens == 0


@pytest.mark.usefixtures("small_tasks")
def test_disk_full_keeps_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    run(tmp_path / "a.jsonl", tmp_path / "whole")

    def fail(self, *arguments) -> None:
        if self.path.name == shard_name(2):
            self.abort()
            raise OSError(28, "no space")
        append(self, *arguments)

    append = prepare_module.ShardWriter.append
    monkeypatch.setattr(prepare_module.ShardWriter, "append", fail)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [shard_name(0), shard_name(1)]
    monkeypatch.undo()
    monkeypatch.setattr(tokenize_tasks, "_TASK_BYTES", 1_500)
    run(tmp_path / "a.jsonl", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_folder_with_other_work_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    run(tmp_path / "a.jsonl", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds token files of other inputs"):
        run(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_rows_stop_the_run(tmp_path: Path, workers: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", bad_every=10)
    with pytest.raises(ValueError, match=r"6 rows cannot be used, .*/a.jsonl, line 65: field 'text' is int"):
        run(tmp_path / "a.jsonl", tmp_path / "out", max_bad_rows=5, workers=workers)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="jsonl has no text"):
        run(tmp_path / "a.jsonl", tmp_path / "out")


class DyingFile(DocumentFile):
    """Ends the process that reads it."""

    name = "dying"

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        os._exit(3)

    def identity(self) -> list:
        return []


def test_dead_worker_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a process that tokenizes has died"):
        prepare(
            lambda: [DyingFile()], tmp_path, build_tokenizer("byte"), inputs_fingerprint="x", workers=2, progress=False
        )


def test_cache_is_used_until_inputs_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "prepare", count_calls(prepare_module.prepare, calls := []))
    texts = write_jsonl(tmp_path / "a.jsonl")
    data = DataConfig(cache_dir=str(tmp_path / "cache"))

    def ensure(tokenizer: str = "byte") -> TokenDataset:
        options = {"tokenizer": build_tokenizer(tokenizer), "data": data, "progress": False}
        return ensure_prepared("jsonl", str(tmp_path / "a.jsonl"), **options)

    first = ensure()
    assert decode(first) == texts
    assert ensure().folder == first.folder
    assert len(calls) == 1
    write_jsonl(tmp_path / "a.jsonl", count=10)
    assert ensure().n_documents == 9
    assert len(calls) == 2


def count_calls(function, calls: list):
    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return counted


def test_prepared_folder_needs_its_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    made, _ = run(tmp_path / "a.jsonl", tmp_path / "out")
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    tokenizer = build_tokenizer("byte")
    opened = ensure_prepared("prepared", str(tmp_path / "out"), tokenizer=tokenizer, data=data)
    assert opened.fingerprint == made.fingerprint
    tokenizer.fingerprint = "f" * 64
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        ensure_prepared("prepared", str(tmp_path / "out"), tokenizer=tokenizer, data=data)
    with pytest.raises(ValueError, match=r"needs training\.dataset_path"):
        ensure_prepared("prepared", None, tokenizer=tokenizer, data=data)


def test_unwritable_cache_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "file").touch()
    data = DataConfig(cache_dir=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .* choose another data\.cache_dir"):
        ensure_prepared("jsonl", str(tmp_path / "a.jsonl"), tokenizer=build_tokenizer("byte"), data=data)


class SlowFile(DocumentFile):
    """Notes each process that reads it, and takes a while."""

    def __init__(self, notes: str) -> None:
        self.notes = notes

    @property
    def name(self) -> str:
        return "slow"

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.0)
        yield Document("text", 0, 1)

    def identity(self) -> list:
        return [self.notes]


def ensure_slow(folder: str, results) -> None:
    spec = SourceSpec("slow", "slow", lambda path, text_key, split: [SlowFile(str(Path(folder) / "notes"))], "none")
    register_source(spec)
    data = DataConfig(cache_dir=folder, prepare_workers=1)
    dataset = ensure_prepared("slow", None, tokenizer=build_tokenizer("byte"), data=data, progress=False)
    results.put((dataset.n_tokens, dataset.fingerprint))


def start_processes(folder: Path, count: int):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=ensure_slow, args=(str(folder), results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, results


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_one_of_many_processes_prepares(tmp_path: Path) -> None:
    processes, results = start_processes(tmp_path, 3)
    got = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(got) == 1
    assert len((tmp_path / "notes").read_text().split()) == 1


def test_death_of_the_preparing_process_lets_another_go_on(tmp_path: Path) -> None:
    processes, results = start_processes(tmp_path, 2)
    wait_for((tmp_path / "notes").exists)
    wait_for(lambda: bool((tmp_path / "notes").read_text().endswith("\n")))
    victim = int((tmp_path / "notes").read_text().split()[0])
    os.kill(victim, signal.SIGKILL)
    assert results.get(timeout=60)[0] == len("text") + 2
    for process in processes:
        process.join()
    assert len((tmp_path / "notes").read_text().split()) == 2


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/prepare_data.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_script_prints_summary_and_verifies(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", bad_every=100)
    source = ("--dataset", "jsonl", "--path", str(tmp_path / "a.jsonl"), "--tokenizer", "byte")
    done = run_script(*source, "--output", str(tmp_path / "out"), "--verify")
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(None, 1) for line in done.stdout.replace("bad rows", "bad_rows").splitlines())
    dataset = TokenDataset.open(tmp_path / "out")
    assert printed["tokens"].startswith(f"{dataset.n_tokens:,} (2 bytes each)")
    assert printed["bad_rows"] == "3"
    assert printed["verified"] == "1 shards, all checksums are right"
    shard = tmp_path / "out" / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    damaged = run_script("--output", str(tmp_path / "out"), "--verify")
    assert damaged.returncode == 1
    assert "shard-00000.tokens: the checksum of its documents is wrong" in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--dataset", "jsnl", "--tokenizer", "byte"), 1, "error: unknown data set 'jsnl'. Did you mean jsonl?"),
        (
            ("--dataset", "text", "--tokenizer", "byte", "--path", "absent"),
            1,
            "error: data set 'text': absent does not exist",
        ),
        (("--dataset", "stdlib", "--tokenizer", "absent"), 1, "error: .*absent does not exist; give `byte`"),
        (("--dataset", "stdlib"), 2, "--tokenizer is missing"),
        ((), 2, "--dataset is missing"),
    ],
)
def test_script_error_has_no_traceback(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run_script(*arguments, "--output", str(tmp_path / "out"))
    assert done.returncode == code
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_script_interrupted_leaves_what_can_go_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", count=250_000)
    source = ["--dataset", "jsonl", "--path", str(tmp_path / "a.jsonl"), "--tokenizer", "byte", "--workers", "2"]
    out = tmp_path / "out"
    command = [sys.executable, "scripts/prepare_data.py", *source, "--output", str(out), "--shard-tokens", "100000"]
    # Where the tests run in the background of a shell, programs would inherit that the signal is ignored.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for((out / shard_name(1)).exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "start again to go on" in errors
    assert "Traceback" not in errors
    assert not (out / INDEX_NAME).exists()
    assert not list(out.glob("*.tmp"))
    options = {"tokenizer": build_tokenizer("byte"), "shard_tokens": 100_000, "data": DataConfig(prepare_workers=1)}
    dataset, stats = prepare_source("jsonl", str(tmp_path / "a.jsonl"), out, progress=False, **options)
    dataset.verify()
    assert stats.new_tokens < stats.n_tokens
    spec = get_source_spec("jsonl")
    (file,) = open_documents(spec, str(tmp_path / "a.jsonl"), text_key="text", split="train")
    assert dataset.n_documents == sum(1 for document in file.read() if document.text)
