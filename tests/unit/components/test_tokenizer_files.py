"""Tokenizers as files for transformers: the same ids."""

import json

import pytest
from transformers import AutoTokenizer

from tests.unit.components.test_tokenizer import make_tekken, make_tiktoken, make_tokenizer_json, standard_library_text
from trainer.components.tokenizer import build_tokenizer
from trainer.components.tokenizer_files import find_merges, write_tokenizer_files


def make(kind, folder):
    if kind == "byte":
        return "byte"
    special = {"<|bos|>": 300, "<|eos|>": 260}  # a gap before the first
    return {
        "tokenizer.json": lambda: make_tokenizer_json(folder),
        "tiktoken": lambda: make_tiktoken(folder, bos_token="<|bos|>", special_tokens=special),
        "tekken": lambda: make_tekken(folder),
    }[kind]()


@pytest.mark.parametrize("kind", ["byte", "tokenizer.json", "tiktoken", "tekken"])
def test_auto_tokenizer_gives_the_same_ids(kind, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    ours = build_tokenizer(make(kind, tmp_path / "source"))
    write_tokenizer_files(ours, tmp_path / "out", max_length=10**6)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.bos_token_id == ours.bos_id
    for text in (standard_library_text(5000), "hello  hell\u00f6 \U0001f642\n\n\tdon't 12345", ""):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    if kind in ("byte", "tiktoken"):
        assert theirs("a").input_ids[0] == ours.bos_id, "documents begin with it in training"


def test_settings_beside_a_tokenizer_json_go_along(tmp_path):
    make_tokenizer_json(tmp_path / "source", eos_token="<eos>", model_max_length=77)
    (tmp_path / "out").mkdir()
    write_tokenizer_files(build_tokenizer(tmp_path / "source"), tmp_path / "out", max_length=128)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"] == 77


def test_merges_follow_the_ranks():
    tokens = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"abab"]
    merges = find_merges({token: rank for rank, token in enumerate(tokens)})
    assert merges == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"ab", b"ab")]
