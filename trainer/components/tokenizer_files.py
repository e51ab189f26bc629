"""A tokenizer as the files that `AutoTokenizer.from_pretrained` reads.

Those of a tokenizer.json are copied. The built-in byte-level tokenizer and tiktoken files become a tokenizer.json that
gives the same ids.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.components.hf_files import write_json
from trainer.components.tokenizer import (
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    find_tokenizer_file,
)

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write a tokenizer's files into a folder.

    max_length: tokens that the model can take, for tokenizer_config.json where it is made here
    """
    assert tokenizer.path is not None, "only what build_tokenizer made has files"
    if isinstance(tokenizer, ByteTokenizer):
        ids = {bytes([i]): i for i in range(256)}
        special = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": tokenizer.pad_id}
        pattern, normalize = None, ""
    elif isinstance(tokenizer, TiktokenTokenizer):
        ids = {token: tokenizer.first_id + rank for token, rank in tokenizer.ranks.items()}
        special = dict(tokenizer.special_tokens)
        pattern, normalize = tokenizer.pattern, tokenizer.normalize
    else:
        _copy(tokenizer, folder, max_length)
        return
    names = {i: name for name, i in special.items()}
    bos = None if tokenizer.bos_id is None else names[tokenizer.bos_id]
    write_json(folder / _TOKENIZER, _describe_byte_level(ids, special, bos=bos, pattern=pattern, normalize=normalize))
    _write_config(folder, bos=bos, eos=names[tokenizer.eos_id], max_length=max_length)


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy what a folder of Hugging Face files has of a tokenizer."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _copy(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    file = find_tokenizer_file(str(tokenizer.path))
    copy_tokenizer_files(file.parent, folder)
    if file.name != _TOKENIZER:
        shutil.copyfile(file, folder / _TOKENIZER)
    if not (folder / _CONFIG).is_file():
        added = json.loads((folder / _TOKENIZER).read_text(encoding="utf-8"))["added_tokens"]
        names = {token["id"]: token["content"] for token in added}
        bos = None if tokenizer.bos_id is None else names.get(tokenizer.bos_id)
        _write_config(folder, bos=bos, eos=names.get(tokenizer.eos_id), max_length=max_length)


def _write_config(folder: Path, *, bos: str | None, eos: str | None, max_length: int) -> None:
    content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    content |= {key: token for key, token in (("bos_token", bos), ("eos_token", eos)) if token is not None}
    # Decoding must give back the text as it was.
    write_json(folder / _CONFIG, {**content, "clean_up_tokenization_spaces": False})


def _describe_byte_level(
    ranks: Mapping[bytes, int],
    special: Mapping[str, int],
    *,
    bos: str | None,
    pattern: str | None = None,
    normalize: str = "",
) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE, which begins each text with `bos`, as documents do in training.

    ranks: bytes of each ordinary token -> its id, of which the order of merges follows. pattern: regular expression that cuts
    text into words, None to leave it whole. normalize: Unicode form that text is brought to first, or empty.
    """
    letters = _byte_letters()
    # Special tokens, too: where numbers are left out before theirs, the library would give them others.
    vocabulary = {_spell(token, letters): i for token, i in ranks.items()} | dict(special)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [byte_level] if pattern is None else [split, byte_level]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for name, i in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": normalize} if normalize else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None if bos is None else _describe_template(bos, special[bos]),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken takes a word that is a token as that token, whatever the merges.
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [[_spell(a, letters), _spell(b, letters)] for a, b in find_merges(ranks)],
        },
    }  # fmt: skip


def _describe_template(bos: str, bos_id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def find_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two tokens that each token of several bytes is merged from, in the order of the ranks.

    They are what is left of its bytes when all merges of lower rank are done.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _spell(token: bytes, letters: Mapping[int, str]) -> str:
    return "".join(letters[byte] for byte in token)


def _byte_letters() -> dict[int, str]:
    """Return the printable letter that stands for each byte in the vocabulary of a byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
