"""Prepared data: token ids in memory-mapped shards, with checksums, written so that a half file never looks whole.

A prepared data set is a folder:

    shard-00000.tokens ...   4096 bytes of header, token ids, document offsets
    documents.offsets        4096 bytes of header, the offsets of all shards joined (one map, shared by all processes)
    index.json               written last: what belongs to the data set, with sizes and checksums

The header page and the numbers are those of `token_shards`. Offsets in `documents.offsets` count from the start of the
data set, and its last one is the number of tokens.
"""

import hashlib
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.components.data.token_shards import (
    FORMAT_VERSION,
    OFFSET_DTYPE,
    PAGE,
    ShardHeader,
    ShardWriter,
    check_size,
    explain_write_error,
    get_file_crc32,
    map_array,
    open_for_writing,
    read_header,
    read_shard_header,
    seal_file,
    shard_name,
    sync_folder,
)
from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
DOCUMENTS_NAME = "documents.offsets"
DEFAULT_SHARD_TOKENS = 100_000_000

_MAX_OPEN_SHARDS = 256  # each map holds a file descriptor, and 1024 is a common limit


def finish_dataset(folder: Path, *, source: Mapping[str, Any] | None = None) -> "TokenDataset":
    """Turns a folder of whole shards into a data set: joins the document offsets and writes the index, last.

    Args:
        source: what the data was made from, kept in the index for people to read.

    Raises: ValueError where there is no shard or the shards do not belong together; OutOfSpaceError.
    """
    paths = sorted(folder.glob("shard-*.tokens"))
    if [path.name for path in paths] != [shard_name(i) for i in range(len(paths))]:
        raise UserError(f"{folder}: shards are missing, found {[path.name for path in paths]}")
    headers = [read_shard_header(path) for path in paths]
    if not sum(header.n_tokens for header in headers):
        raise UserError(f"{folder}: there are no tokens to make a data set of")
    kinds = {(header.dtype, header.vocab_size, header.tokenizer_fingerprint) for header in headers}
    if len(kinds) > 1:
        raise UserError(f"{folder}: the shards come from different tokenizers; prepare into an empty folder")
    documents_crc32 = _write_documents(folder, paths, headers)
    index = {
        "version": FORMAT_VERSION,
        "dtype": headers[0].dtype,
        "vocab_size": headers[0].vocab_size,
        "tokenizer_fingerprint": headers[0].tokenizer_fingerprint,
        "n_tokens": sum(header.n_tokens for header in headers),
        "n_documents": sum(header.n_documents for header in headers),
        "documents_crc32": documents_crc32,
        "shards": [
            {
                "file": path.name,
                "n_tokens": header.n_tokens,
                "n_documents": header.n_documents,
                "file_size": header.file_size,
                "tokens_crc32": header.tokens_crc32,
                "documents_crc32": header.documents_crc32,
            }
            for path, header in zip(paths, headers, strict=True)
        ],
    }
    index["fingerprint"] = _fingerprint(index)
    index["source"] = dict(source or {})
    _write_text(folder / INDEX_NAME, json.dumps(index, indent=1))
    return TokenDataset.open(folder)


def write_token_dataset(
    folder: str | Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
) -> "TokenDataset":
    """Writes documents that are token ids already, in one process; a document is never cut between two shards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number, writer = 0, None
    for document in documents:
        if writer is None:
            path = folder / shard_name(number)
            writer = ShardWriter(path, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint)
        tokens = np.asarray(document, dtype=np.int64)
        writer.append(tokens, np.array([len(tokens)]))
        if writer.n_tokens >= shard_tokens:
            writer.commit()
            number, writer = number + 1, None
    if writer is not None:
        writer.commit()
    return finish_dataset(folder)


class TokenDataset:
    """A prepared data set, read through memory maps: opening is cheap, processes of one host share the pages.

    Tokens are addressed by their place in the whole data set, 0..n_tokens-1, whatever shard they are in. Picklable
    (a copy maps the files anew).
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.n_tokens: int = index["n_tokens"]
        self.n_documents: int = index["n_documents"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        self.fingerprint: str = index["fingerprint"]
        self.source: dict[str, Any] = index.get("source", {})
        self.dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.shards: list[dict[str, Any]] = index["shards"]
        self._documents_crc32: int = index["documents_crc32"]
        self._starts = np.concatenate([[0], np.cumsum([s["n_tokens"] for s in self.shards], dtype=np.int64)])
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._document_starts: np.ndarray | None = None

    @classmethod
    def open(cls, folder: str | Path) -> "TokenDataset":
        """Opens a folder written by `prepare` or `write_token_dataset`.

        Raises: ValueError naming the file and the cause where the folder is not a whole data set.
        """
        folder = Path(folder).expanduser()
        index_path = folder / INDEX_NAME
        if not index_path.is_file():
            raise UserError(f"{folder} is not a prepared data set: {_why_not_whole(folder)}")
        try:
            index = json.loads(index_path.read_text(encoding="utf-8"))
            version = index["version"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{index_path}: not an index of a prepared data set ({error})") from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{index_path}: format version {version}, this program reads {FORMAT_VERSION}; prepare anew"
            )
        try:
            dataset = cls(folder, index)
            if _fingerprint(index) != dataset.fingerprint:
                raise UserError(f"{index_path}: its fingerprint does not fit its content; was it edited?")
        except (KeyError, TypeError) as error:
            raise UserError(f"{index_path}: not an index of a prepared data set (no {error})") from error
        for shard in dataset.shards:
            check_size(folder / shard["file"], shard["file_size"])
        check_size(folder / DOCUMENTS_NAME, PAGE + (dataset.n_documents + 1) * OFFSET_DTYPE.itemsize)
        return dataset

    @property
    def document_starts(self) -> np.ndarray:
        """Returns (n_documents + 1,) int64, memory-mapped: the first token of each document, and `n_tokens` at the end."""
        if self._document_starts is None:
            read_header(self.folder / DOCUMENTS_NAME)
            self._document_starts = map_array(self.folder / DOCUMENTS_NAME, OFFSET_DTYPE, PAGE, self.n_documents + 1)
        return self._document_starts

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns (length,) ids from `start` on, in the file's dtype: a copy, across borders of shards where needed.

        Raises: IndexError outside the data set.
        """
        out = np.empty(length, dtype=self.dtype)
        self._copy(start, out)
        return out

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns (n, length) int64: the `length` tokens from each of `starts` (n,) on.

        Raises: IndexError where one lies outside the data set.
        """
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, np.asarray(starts).tolist(), strict=True):
            self._copy(start, row)
        return out

    def verify(self) -> None:
        """Reads everything and compares it with the checksums.

        Raises: ValueError naming each file that differs from what was written.
        """
        problems = []
        for shard in self.shards:
            path = self.folder / shard["file"]
            try:
                header = read_shard_header(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            for part, offset, size in (
                ("tokens", PAGE, header.n_tokens * self.dtype.itemsize),
                ("documents", header.documents_offset, (header.n_documents + 1) * OFFSET_DTYPE.itemsize),
            ):
                if get_file_crc32(path, offset, size) != shard[f"{part}_crc32"]:
                    problems.append(f"{path}: the checksum of its {part} is wrong")
        documents = self.folder / DOCUMENTS_NAME
        if get_file_crc32(documents, PAGE, (self.n_documents + 1) * OFFSET_DTYPE.itemsize) != self._documents_crc32:
            problems.append(f"{documents}: its checksum is wrong")
        if problems:
            raise UserError("damaged data set, prepare it anew or copy it again:\n  " + "\n  ".join(problems))

    def _copy(self, start: int, out: np.ndarray) -> None:
        if start < 0 or start + len(out) > self.n_tokens:
            raise IndexError(f"tokens {start}..{start + len(out)} of {self.folder}, which has {self.n_tokens}")
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(out):
            tokens = self._tokens(shard)
            low = start + done - int(self._starts[shard])
            piece = tokens[low : low + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1

    def _tokens(self, shard: int) -> np.ndarray:
        tokens = self._maps.get(shard)
        if tokens is None:
            info = self.shards[shard]
            path = self.folder / info["file"]
            header = read_shard_header(path)
            if (header.n_tokens, header.tokens_crc32) != (info["n_tokens"], info["tokens_crc32"]):
                raise UserError(f"{path}: not the shard that {INDEX_NAME} lists; was it replaced?")
            tokens = map_array(path, self.dtype, PAGE, header.n_tokens)
            self._maps[shard] = tokens
            if len(self._maps) > _MAX_OPEN_SHARDS:
                self._maps.popitem(last=False)
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict(), "_document_starts": None}


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open_for_writing(temporary) as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain_write_error(error, path, len(text)) from error
    os.replace(temporary, path)
    sync_folder(path.parent)


def _write_documents(folder: Path, paths: list[Path], headers: list[ShardHeader]) -> int:
    """Writes the document offsets of the whole data set; returns their CRC-32."""
    path = folder / DOCUMENTS_NAME
    temporary = path.with_name(path.name + ".tmp")
    n_documents = sum(header.n_documents for header in headers)
    crc, first = 0, 0
    try:
        with open_for_writing(temporary) as file:
            file.write(b"\0" * PAGE)
            for shard_path, header in zip(paths, headers, strict=True):
                offsets = map_array(shard_path, OFFSET_DTYPE, header.documents_offset, header.n_documents + 1)
                payload = (offsets[:-1] + first).tobytes()
                crc = zlib.crc32(payload, crc)
                file.write(payload)
                first += header.n_tokens
            last = np.array([first], dtype=OFFSET_DTYPE).tobytes()
            file.write(last)
            crc = zlib.crc32(last, crc)
            seal_file(file, {"n_documents": n_documents, "documents_crc32": crc}, temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain_write_error(error, path, PAGE + (n_documents + 1) * OFFSET_DTYPE.itemsize) from error
    return crc


def _fingerprint(index: Mapping[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key not in ("fingerprint", "source")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _why_not_whole(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if any(folder.glob("shard-*.tokens*")):
        return (
            f"it has shards but no {INDEX_NAME}: preparing it did not end; run scripts/prepare_data.py again to go on"
        )
    return f"it has no {INDEX_NAME}; make one with scripts/prepare_data.py"
