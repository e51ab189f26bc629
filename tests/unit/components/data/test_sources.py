"""The table of data sets and the readers of documents."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.components.data import document_files
from trainer.components.data.document_files import (
    Document,
    DocumentFile,
    GeneratedFile,
    JsonlFile,
    ParquetFile,
    TextFile,
)
from trainer.components.data.sources import (
    SOURCES,
    BadRows,
    SourceSpec,
    get_inputs_fingerprint,
    get_source_spec,
    open_documents,
    register_source,
)

TEXTS = [f"document {i} " + "wörd " * (i % 7) for i in range(40)]


def write_jsonl(path: Path, texts: list[str] = TEXTS, key: str = "text") -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({key: text, "n": 1}, ensure_ascii=False) + "\n")
    return path


def write_parquet(path: Path, values: list, *, rows_in_group: int = 7, kind: str = "string", key: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(len(values))), key: pyarrow.array(values, type=getattr(pyarrow, kind)())})
    parquet.write_table(table, path, row_group_size=rows_in_group)
    return path


def write_text(path: Path, texts: list[str] = TEXTS) -> Path:
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return path


def number_strings(count: int) -> Iterator[str]:
    yield from map(str, range(count))


def read(name: str, path: Path | None, *, text_key: str = "text", split: str = "train") -> list[Document]:
    files = open_documents(get_source_spec(name), path and str(path), text_key=text_key, split=split)
    return [document for file in files for document in file.read()]


def texts_of(documents: list[Document]) -> list[str]:
    return [document.text for document in documents if not document.problem]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("text", lambda folder: write_text(folder / "texts")),
        ("jsonl", lambda folder: write_jsonl(folder / "a.jsonl")),
        ("jsonl", lambda folder: write_jsonl(folder / "a.json.gz")),
        ("jsonl", lambda folder: write_jsonl(folder / "a.ndjson").parent),
        ("parquet", lambda folder: write_parquet(folder / "a.parquet", TEXTS)),
        (
            "parquet",
            lambda folder: write_parquet(folder / "a.parquet", TEXTS, kind="large_string").parent / "*.parquet",
        ),
        ("c4", lambda folder: write_jsonl(folder / "c4-train.00000-of-01024.json.gz").parent),
        ("c4_test", lambda folder: write_jsonl(folder / "data.json").parent),
    ],
)
def test_source_yields_documents_in_order(tmp_path: Path, name: str, make) -> None:
    assert texts_of(read(name, make(tmp_path))) == TEXTS


def test_c4_parts_are_told_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c4-train.00000-of-00001.json.gz", ["training"])
    write_jsonl(tmp_path / "c4-validation.00000-of-00001.json.gz", ["held out"])
    assert texts_of(read("c4", tmp_path)) == ["training"]
    assert texts_of(read("c4_validation", tmp_path)) == ["held out"]


def test_hugging_face_folder_offline(tmp_path: Path) -> None:
    for part in range(3):
        write_jsonl(tmp_path / f"train-{part}.jsonl", TEXTS[part * 10 : part * 10 + 10])
    files = open_documents(get_source_spec(f"hf:{tmp_path}"), None, text_key="text", split="train")
    assert len(files) == 3
    assert [d.text for file in files for d in file.read()] == TEXTS[:30]
    resumed = list(pickle.loads(pickle.dumps(files[1])).read(4, 8))
    assert [(d.text, d.position, d.next_position) for d in resumed] == [(TEXTS[10 + i], i, i + 1) for i in range(4, 8)]


def test_hugging_face_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(read("hf:mine", tmp_path / "saved", text_key="body")) == TEXTS


def test_hugging_face_missing_split_names_data_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="split 'nothing', cannot be opened"):
        read(f"hf:{tmp_path}", None, split="nothing")


def test_stdlib_holds_out_whole_files_for_validation() -> None:
    spec, held_out = get_source_spec("stdlib"), get_source_spec("stdlib_validation")
    train = [f.name for f in open_documents(spec, None, text_key="text", split="train")]
    validation = [f.name for f in open_documents(held_out, None, text_key="text", split="train")]
    assert train == sorted(train)
    assert not set(train) & set(validation)
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.1
    assert any(name.endswith("json/decoder.py") for name in train + validation)
    assert not any("/test/" in name or "/site-packages/" in name for name in train + validation)


def test_stdlib_is_readable_text() -> None:
    documents = read("stdlib", None)
    assert len(documents) > 300
    assert not [d for d in documents if d.problem]
    assert sum(len(d.text) for d in documents) > 5_000_000


def make_files(folder: Path) -> dict[str, DocumentFile]:
    return {
        "jsonl": JsonlFile(write_jsonl(folder / "a.jsonl")),
        "jsonl.gz": JsonlFile(write_jsonl(folder / "a.jsonl.gz")),
        "parquet": ParquetFile(write_parquet(folder / "a.parquet", TEXTS)),
        "generated": GeneratedFile(number_strings, (40,)),
        "text": TextFile(write_text(folder / "texts") / "001.txt"),
    }


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "generated", "text"])
def test_reading_goes_on_from_any_document(tmp_path: Path, kind: str) -> None:
    file = make_files(tmp_path)[kind]
    whole = list(file.read())
    assert [d.position for d in whole[1:]] == [d.next_position for d in whole[:-1]]
    for number, document in enumerate(whole):
        assert list(file.read(document.next_position)) == whole[number + 1 :]
        assert list(file.read(document.position, document.next_position)) == [document]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "text"])
@pytest.mark.parametrize("target_bytes", [1, 50, 333, 10**6])
def test_spans_cover_each_document_once(tmp_path: Path, kind: str, target_bytes: int) -> None:
    file = make_files(tmp_path)[kind]
    spans = list(file.split(target_bytes))
    assert [d for span in spans for d in file.read(span.start, span.stop)] == list(file.read())
    assert kind == "parquet" or sum(span.n_bytes for span in spans) == file.n_bytes
    assert (len(spans) > 2) == (kind in ("jsonl", "parquet") and target_bytes < 10**6)


def test_long_text_is_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_files, "_TEXT_PIECE_BYTES", 100)
    text = "".join(f"línea {i} " + "x" * (i * 37 % 150) + "\n" for i in range(60)) + "no line break"
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    file = TextFile(path)
    documents = list(file.read())
    assert "".join(d.text for d in documents) == text
    assert len(documents) > 20
    assert all(d.text.endswith("\n") for d in documents[:-1] if d.text)
    assert [d for span in file.split(1) for d in file.read(span.start, span.stop)] == documents


def test_python_source_heeds_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (document,) = TextFile(tmp_path / "a.py", python_source=True).read()
    assert document.text.endswith("# é\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not valid JSON: Unterminated string"),
        (b'{"body": "x", "n": 1}', r"no field 'text', it has body, n \(data.text_key names the field\)"),
        (b'{"text": 3}', "field 'text' is int, not a string"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'["text"]', "a JSON list where an object is expected"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b"[" * 100_000, "not valid JSON: maximum recursion"),
    ],
)
def test_bad_line_is_named_and_left_out(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    file = JsonlFile(path)
    documents = list(file.read())
    assert texts_of(documents) == ["first", "last"]
    assert file.locate(documents[1].position) == f"{path}, line 3"
    with pytest.raises(ValueError, match=problem):
        BadRows(0).add(file.locate(documents[1].position), documents[1].problem)


def test_bad_parquet_rows_are_left_out(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    raw = pyarrow.array([b"good", b"\xff\xfe", None, b"fine"], type=pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), tmp_path / "a.parquet")
    documents = list(ParquetFile(tmp_path / "a.parquet").read())
    assert [d.text for d in documents] == ["good", "", "", "fine"]
    assert [d.problem[:30] for d in documents] == ["", "column 'text' is not valid UTF", "column 'text' is null", ""]
    assert ParquetFile(tmp_path / "a.parquet").locate(1).endswith("a.parquet, row 1")


@pytest.mark.parametrize("content", [b"\xff\xfe\xfd", b"PNG\0\0\0"])
def test_bad_text_file_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (document,) = read("text", tmp_path)
    assert document.problem
    assert document.text == ""


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (
            lambda f: ParquetFile(write_parquet(f, ["x"], key="body")),
            "has no column 'text', it has id, body: set data.text_key",
        ),
        (lambda f: ParquetFile(write_parquet(f, [1, 2], kind="int64")), "column 'text' is int64, not string"),
        (lambda f: ParquetFile(f.write_bytes(b"no parquet") and f), "not a whole Parquet file"),
        (lambda f: JsonlFile(cut_gzip(f.with_suffix(".gz"))), r"a\.gz: damaged or cut short"),
        (lambda f: JsonlFile(f.with_suffix(".zst")), "needs Python 3.14 or the package zstandard"),
    ],
)
def test_unusable_file_raises_naming_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, cause: str) -> None:
    monkeypatch.setattr(document_files, "_open_zst", fail_without_zstandard)
    file = make(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=cause):
        list(file.read())


def fail_without_zstandard(path: Path, mode: str) -> None:
    raise ValueError(f"{path}: reading .zst needs Python 3.14 or the package zstandard")


def cut_gzip(path: Path) -> Path:
    write_jsonl(path, ["word " * i for i in range(500)])
    path.write_bytes(path.read_bytes()[:-300])
    return path


def test_bad_rows_counts_up_to_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    bad_rows = BadRows(2)
    bad_rows.add("a.jsonl, line 1", "no field")
    bad_rows.add("a.jsonl, line 5", "no field")
    assert "a.jsonl, line 5: no field" in caplog.text
    with pytest.raises(
        ValueError, match=r"3 rows cannot be used, more than data.max_bad_rows = 2; the last one: a.jsonl, line 9"
    ):
        bad_rows.add("a.jsonl, line 9", "no field")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("stdlb", "unknown data set 'stdlb'. Did you mean stdlib?"),
        ("zzz", "Known: stdlib, .*hf:NAME"),
        ("hf:", "unknown"),
    ],
)
def test_unknown_source_lists_known(name: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        get_source_spec(name)


@pytest.mark.parametrize(
    ("name", "path", "cause"),
    [
        ("text", None, "needs a path .*: set training.dataset_path"),
        ("text", "absent", "absent does not exist"),
        ("text", "*.nothing", r"no file matches \*.nothing"),
        ("stdlib", "somewhere", "takes no path"),
        ("prepared", ".", "holds token ids, not text"),
    ],
)
def test_wrong_path_is_refused(name: str, path: str | None, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        open_documents(get_source_spec(name), path, text_key="text", split="train")


def test_registered_source_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.components.data.sources.SOURCES", dict(SOURCES))
    spec = SourceSpec("numbers", "numbers", lambda path, text_key, split: [GeneratedFile(number_strings, (3,))], "none")
    register_source(spec)
    assert texts_of(read("numbers", None)) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="registered already"):
        register_source(spec)


def test_inputs_fingerprint_tells_changes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")

    def fingerprint(name: str = "jsonl", text_key: str = "text") -> str:
        return get_inputs_fingerprint(get_source_spec(name), str(path), text_key=text_key, split="train")

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(text_key="body") != before
    assert fingerprint(name="text") != before
    os.utime(path, (1, 1))
    assert fingerprint() != before


def test_inputs_fingerprint_tells_changes_of_a_hugging_face_folder(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    spec = get_source_spec(f"hf:{tmp_path}")
    assert not spec.on_hub
    before = get_inputs_fingerprint(spec, None, text_key="text", split="train")
    os.utime(path, (1, 1))
    assert get_inputs_fingerprint(spec, None, text_key="text", split="train") != before


def test_hub_fingerprint_needs_no_network() -> None:
    spec = get_source_spec("hf:someone/something")
    assert get_inputs_fingerprint(spec, None, text_key="text", split="train")
    assert get_inputs_fingerprint(get_source_spec("c4"), None, text_key="text", split="train")


def test_import_of_table_is_light() -> None:
    heavy = ("torch", "tokenizers", "tiktoken", "datasets", "pyarrow", "numpy")
    code = f"import sys, trainer.components.data.sources; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
