"""Tokenizers: tiktoken files, `tokenizer.json`, tekken files, and a built-in byte-level one.

Everything is read from local files. Text never turns into control tokens: `<|end_of_text|>` inside a document is
encoded as the characters it is made of, so that data cannot forge the boundary of a document.
"""

import base64
import binascii
import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

BYTE_TOKENIZER = "byte"

_MAX_PIECE_CHARS = 2**18  # the tokenizers library slows down on longer ones
_MAX_RUN_CHARS = 25_000  # the limit of Llama 3's own tokenizer
_PROBE_CHARS = _MAX_RUN_CHARS // 2
_SPACE = re.compile(r"\s")
_NON_SPACE = re.compile(r"\S")
_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")

_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "[BOS]")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]")
_CONTROL_LIKE = re.compile(r"<\|.*\|>|.*｜.*", re.DOTALL)

_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _CL100K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"gpt2": _GPT2_PATTERN, "cl100k": _CL100K_PATTERN, "o200k": _O200K_PATTERN, "qwen": _QWEN_PATTERN}


UnicodeForm = Literal["", "NFC", "NFD", "NFKC", "NFKD"]


class Tokenizer(ABC):
    """Turns text into ids and back.

    Attributes:
        vocab_size: the largest id + 1, special tokens included.
        bos_id: id that begins a document, or None where the tokenizer has none.
        eos_id: id that ends a document.
        fingerprint: hash of the files and of every setting that decides on the ids of a document.
    """

    def __init__(self, *, name: str, vocab_size: int, bos_id: int | None, eos_id: int, fingerprint: str) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        # Token files from when the one token stood at both ends of a document are not to be taken for those of now.
        self.fingerprint = _fingerprint("one separator", fingerprint.encode()) if bos_id == eos_id else fingerprint
        self.path: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as the path that it is built from."""
        assert self.path is not None, "only what build_tokenizer made can be pickled"
        return build_tokenizer, (self.path,)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the ids of `text`, with the bos and eos ids around it where asked for.

        Linear in the length of the text: longer than 2**18 characters, it is encoded in pieces (cut at a line
        break), and a run of over 12,500 characters of white space, or without any, is cut too.

        Raises: ValueError where `bos` is asked for and the tokenizer has none.
        """
        return self.encode_array(text, bos=bos, eos=eos).tolist()

    def encode_batch(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def encode_array(self, text: str, bos: bool = False, eos: bool = False) -> np.ndarray:
        """Returns what `encode` does, as (n,) uint32."""
        if bos and self.bos_id is None:
            raise ValueError(f"the tokenizer {self.name} has no token that begins a document")
        try:
            pieces = [self._encode(piece) for piece in split_long_text(text)]
        except UnicodeEncodeError:  # half a surrogate pair: no valid Unicode, so no UTF-8
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            pieces = [self._encode(piece) for piece in split_long_text(text)]
        before = [np.array([self.bos_id], dtype=np.uint32)] if bos else []
        after = [np.array([self.eos_id], dtype=np.uint32)] if eos else []
        return np.concatenate([*before, *pieces, *after]) if before or after or len(pieces) != 1 else pieces[0]

    def encode_document(self, text: str) -> np.ndarray:
        """Returns a document as it stands in the training data, (n,) uint32: bos where the tokenizer has one, text, eos.

        Where bos is eos (GPT-2, GPT-NeoX, OLMo), it stands at the end alone, so that one token separates two documents: as
        Megatron-LM's `--append-eod` and nanoGPT have it.
        """
        return self.encode_array(text, bos=self.bos_id not in (None, self.eos_id), eos=True)

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Returns (n,) uint32 for a text that is short enough for the library."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises: ValueError for an unknown id."""

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.name} (0..{self.vocab_size - 1})")
        return checked


def build_tokenizer(path: str | Path) -> Tokenizer:
    """Builds the tokenizer that `path` names.

    Args:
        path: `byte`, a file (tokenizer.json, tekken*.json, tokenizer.model or *.tiktoken), or a folder with one.

    Raises: ValueError naming the path, what was looked for, and the remedy.
    """
    if str(path) == BYTE_TOKENIZER:
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        file = find_tokenizer_file(path)
        build = _build_tiktoken
        if file.suffix == ".json":
            build = _build_tekken if file.name.startswith("tekken") else _build_tokenizer_json
        try:
            tokenizer = build(file)
        except OSError as error:
            raise ValueError(f"tokenizer file {file} cannot be read: {error}") from error
    tokenizer.path = str(path)
    return tokenizer


def find_tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer file that `path` is or holds; reads no file. Raises: ValueError where there is none."""
    found = Path(path).expanduser()
    if found.is_file():
        return found
    if not found.is_dir():
        raise ValueError(
            f"model.hf_assets_path: {found} does not exist; give `{BYTE_TOKENIZER}`, a tokenizer file, or a folder with one"
        )
    patterns = ("tokenizer.json", "tekken*.json", "tokenizer.model", "*.tiktoken", "original/tokenizer.model")
    for pattern in patterns:
        files = sorted(found.glob(pattern))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"model.hf_assets_path: {found} holds several tokenizers ({names}); name one of the files")
        if files:
            return files[0]
    raise ValueError(f"model.hf_assets_path: no tokenizer in {found}; looked for {', '.join(patterns)}")


def split_long_text(text: str) -> list[str]:
    """Cuts a text into pieces that no tokenizer chokes on. Nearly every text comes back whole.

    Regular expressions and merges of some tokenizers are quadratic (or overflow a stack) on endless runs. A run is
    noticed by probes at fixed places, each of which ends at the first character that breaks the run, so that plain
    text costs next to nothing.
    """
    if len(text) < _PROBE_CHARS:
        return [text]
    cuts = list(_long_text_cuts(text))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _long_text_cuts(text: str) -> Iterator[int]:
    last = 0
    for start in range(0, len(text), _PROBE_CHARS):
        stop = start + _PROBE_CHARS
        if start - last >= _MAX_PIECE_CHARS and (line_break := _LINE_BREAK.search(text, start, stop)):
            last = line_break.end()
            yield last
        elif (
            start
            and stop <= len(text)
            and not (_SPACE.search(text, start, stop) and _NON_SPACE.search(text, start, stop))
        ):
            last = start
            yield last


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, then bos, eos and pad: needs no file."""

    def __init__(self) -> None:
        super().__init__(
            name=BYTE_TOKENIZER,
            vocab_size=259,
            bos_id=256,
            eos_id=257,
            fingerprint=_fingerprint("byte", b"", 259, 256, 257),
        )
        self.pad_id = 258

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in self._check_ids(ids) if i < 256).decode(errors="replace")


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by the tiktoken library.

    Args:
        ranks: bytes of each ordinary token, to its rank.
        special_tokens: name to id, never produced from text.
        first_id: id of rank 0 (tekken puts its special tokens first).
        normalize: Unicode form that text is brought to first, or empty.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special_tokens: Mapping[str, int],
        *,
        pattern: str,
        first_id: int = 0,
        normalize: UnicodeForm = "",
        **attributes: Any,
    ) -> None:
        import tiktoken

        super().__init__(vocab_size=max(first_id + max(ranks.values()), *special_tokens.values()) + 1, **attributes)
        self._encoding = tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.ranks, self.special_tokens, self.first_id = ranks, special_tokens, first_id
        self.pattern, self.normalize = pattern, normalize
        self._special_names = {i: name for name, i in special_tokens.items()}

    def _encode(self, text: str) -> np.ndarray:
        if self.normalize:
            text = unicodedata.normalize(self.normalize, text)
        text.encode()  # the library would replace half surrogate pairs by itself, in its own way
        return np.asarray(self._encoding.encode_ordinary(text), dtype=np.uint32) + np.uint32(self.first_id)

    def decode(self, ids: Iterable[int]) -> str:
        parts = []
        for i in self._check_ids(ids):
            rank = i - self.first_id
            if i in self._special_names:
                parts.append(self._special_names[i].encode())
            elif 0 <= rank < len(self.ranks):
                parts.append(self._encoding.decode_single_token_bytes(rank))
        return b"".join(parts).decode(errors="replace")


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, by the tokenizers library."""

    def __init__(self, backend: Any, **attributes: Any) -> None:
        super().__init__(vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1, **attributes)
        self._backend = backend

    def _encode(self, text: str) -> np.ndarray:
        text.encode()
        return np.asarray(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """Returns the ids of each text; the library uses all cores."""
        if any(len(text) >= _PROBE_CHARS or not _is_unicode(text) for text in texts) or (bos and self.bos_id is None):
            return super().encode_batch(texts, bos=bos, eos=eos)
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self.eos_id] if eos else []
        return [before + e.ids + after for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(self._check_ids(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class TiktokenLayout:
    """What a tiktoken file itself does not say."""

    pattern: str
    """Regular expression that cuts text into words, or a name from the table of patterns."""
    special_tokens: dict[str, int]
    eos_token: str
    bos_token: str | None = None
    normalize: UnicodeForm = ""
    """Unicode form that text is brought to first."""


def _reserve(first: int, names: Sequence[str], total: int) -> dict[str, int]:
    spare = [f"<|reserved_special_token_{i}|>" for i in range(total - len(names))]
    return {name: first + i for i, name in enumerate([*names, *spare])}


# Names and ids: llama-models (tokenizer.py of Llama 3 and 4), tiktoken's openai_public.py, Qwen's tokenization_qwen.py.
_LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
_LLAMA4_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
_KNOWN_TIKTOKEN = {  # by the number of ranks in the file, which differs for all of them
    50_256: ("gpt2", TiktokenLayout("gpt2", {"<|endoftext|>": 50256}, "<|endoftext|>")),
    100_256: ("cl100k", TiktokenLayout("cl100k", _CL100K_SPECIAL, "<|endoftext|>")),
    128_000: (
        "llama3",
        TiktokenLayout("cl100k", _reserve(128_000, _LLAMA3_SPECIAL, 256), "<|end_of_text|>", "<|begin_of_text|>"),
    ),
    151_643: (
        "qwen",
        TiktokenLayout("qwen", _reserve(151_643, _QWEN_SPECIAL, 208), "<|endoftext|>", normalize="NFC"),
    ),
    199_998: ("o200k", TiktokenLayout("o200k", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, "<|endoftext|>")),
    200_000: (
        "llama4",
        TiktokenLayout("o200k", _reserve(200_000, _LLAMA4_SPECIAL, 2048), "<|end_of_text|>", "<|begin_of_text|>"),
    ),
}


def _build_tiktoken(file: Path) -> Tokenizer:
    content = file.read_bytes()
    ranks = _parse_ranks(file, content)
    layout = _find_layout(file, len(ranks))
    special = layout.special_tokens
    for token in (layout.eos_token, layout.bos_token):
        if token is not None and token not in special:
            raise ValueError(f"{_layout_path(file)}: {token!r} is not among special_tokens ({', '.join(special)})")
    overlap = sorted(set(special.values()) & set(ranks.values()))
    if overlap:
        raise ValueError(f"{_layout_path(file)}: special token id {overlap[0]} is an ordinary token of {file.name}")
    return TiktokenTokenizer(
        ranks,
        special,
        pattern=_PATTERNS.get(layout.pattern, layout.pattern),
        normalize=layout.normalize,
        name=file.name,
        bos_id=None if layout.bos_token is None else special[layout.bos_token],
        eos_id=special[layout.eos_token],
        fingerprint=_fingerprint("tiktoken", content, asdict(layout)),
    )


def _parse_ranks(file: Path, content: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if number == 1:
                raise ValueError(
                    f"{file} is not a tiktoken file (lines of base64 and rank). A SentencePiece model must be converted "
                    "to tokenizer.json first (transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
                ) from None
            raise ValueError(f"{file}, line {number}: not a token in base64 and its rank") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{file}: its ranks are not 0..{len(ranks) - 1}; the file is damaged or cut short")
    return ranks


def _layout_path(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _find_layout(file: Path, n_ranks: int) -> TiktokenLayout:
    """Returns the layout written beside the file (`<file>.json`), else the known one with as many ranks."""
    beside = _layout_path(file)
    if beside.is_file():
        try:
            layout = TiktokenLayout(**json.loads(beside.read_text(encoding="utf-8")))
            if layout.normalize not in get_args(UnicodeForm):
                raise ValueError(f"normalize is {layout.normalize!r}, not one of {get_args(UnicodeForm)}")
            return layout
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{beside}: expected an object with pattern, special_tokens, eos_token and, where wanted, bos_token and "
                f"normalize ({error})"
            ) from error
    if n_ranks not in _KNOWN_TIKTOKEN:
        known = ", ".join(f"{name} ({count})" for count, (name, _) in _KNOWN_TIKTOKEN.items())
        raise ValueError(
            f"{file} has {n_ranks} tokens, as none of the known tiktoken files: {known}. Write {beside.name} beside it: "
            '{"pattern": "gpt2", "special_tokens": {"<|endoftext|>": ID}, "eos_token": "<|endoftext|>"}, where pattern is '
            f"one of {', '.join(_PATTERNS)} or a regular expression"
        )
    return _KNOWN_TIKTOKEN[n_ranks][1]


def _build_tekken(file: Path) -> Tokenizer:
    """Tekken files (Mistral): special tokens come first, and only part of the listed tokens is in use."""
    content = file.read_bytes()
    try:
        data = json.loads(content)
        config = data["config"]
        n_special = config["default_num_special_tokens"]
        in_use = data["vocab"][: config["default_vocab_size"] - n_special]
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in in_use}
        listed = {token["token_str"]: token["rank"] for token in data.get("special_tokens") or []}
        pattern = config["pattern"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a tekken file ({type(error).__name__}: {error})") from error
    special = listed or {"<unk>": 0, "<s>": 1, "</s>": 2}
    taken = set(special.values())
    special |= {f"<SPECIAL_{i}>": i for i in range(n_special) if i not in taken}
    return TiktokenTokenizer(
        ranks,
        special,
        pattern=pattern,
        first_id=n_special,
        name=file.name,
        bos_id=special["<s>"],
        eos_id=special["</s>"],
        fingerprint=_fingerprint("tekken", content),
    )


def _build_tokenizer_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    content = file.read_bytes()
    try:
        data = json.loads(content)
        for token in data["added_tokens"]:
            # Some files list control tokens as ordinary ones, which would be found in text.
            token["special"] = token["special"] or _CONTROL_LIKE.fullmatch(token["content"]) is not None
        backend = Backend.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json that the tokenizers library reads ({error})") from error
    backend.encode_special_tokens = True  # means: encode their text like any other
    backend.no_truncation()
    backend.no_padding()
    bos_id = _find_special(file, backend, "bos_token", _BOS_NAMES, required=False)
    eos_id = _find_special(file, backend, "eos_token", _EOS_NAMES, required=True)
    assert eos_id is not None, "a required token is found or refused"
    return JsonTokenizer(
        backend,
        name=file.name,
        bos_id=bos_id,
        eos_id=eos_id,
        fingerprint=_fingerprint("tokenizer.json", content, bos_id, eos_id),
    )


def _find_special(file: Path, backend: Any, key: str, names: Sequence[str], *, required: bool) -> int | None:
    """Returns the id of the bos or eos token: what the files beside say, else the first well-known name."""
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        path = file.with_name(beside)
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        if key not in settings:
            continue
        token = settings[key]["content"] if isinstance(settings[key], dict) else settings[key]
        if token is None and not required:
            return None
        if token is not None:
            token_id = backend.token_to_id(token)
            if token_id is None:
                raise ValueError(f"{path}: {key} is {token!r}, which {file.name} does not have")
            return token_id
    for name in names:
        if (token_id := backend.token_to_id(name)) is not None:
            return token_id
    if required:
        raise ValueError(
            f"{file}: no token ends a document; looked for {', '.join(names)} and for `{key}` in tokenizer_config.json "
            "and special_tokens_map.json beside it. Name it there"
        )
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fingerprint(kind: str, content: bytes, *settings: Any) -> str:
    digest = hashlib.sha256(json.dumps([kind, *settings], sort_keys=True).encode())
    digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
