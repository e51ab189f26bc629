"""Folders of Hugging Face files: config.json, safetensors in shards, and their index. No part of it runs code when it is read.

    config.json                          the network
    model.safetensors.index.json         which file has which tensor
    model-00001-of-00004.safetensors     tensors, about `shard_size` bytes in each file
    model.safetensors                    or all in one, without an index

Imports no torch before a tensor is read.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import safe_open

from models.hf_config import get_block_size
from trainer.components.durable_files import write_text
from trainer.components.hf_fp8 import DEQUANTIZED, dequantize, find_quantized, get_blocks, get_scale_name
from trainer.config.errors import UserError

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes of an export -> their names in safetensors files."""
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4}
_HEADER_ALIGNMENT = 8

_NO_PICKLE = (
    "it holds {names}, which are pickles: loading them can run any code, so that this program does not. Write them anew as "
    "safetensors where you trust them (transformers: model.save_pretrained(folder))"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16."""


class HFFolder:
    """A folder of Hugging Face weights, read tensor by tensor or part by part.

    config: content of config.json, empty if there is none. tensors: what the files hold, by name. Weights in fp8 with scales for
    blocks (`hf_fp8`) stand there as the bfloat16 that `read` makes of them, and their scales do not.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the headers of all files.

        Raises:
            ValueError: no safetensors, an index that names files elsewhere or tensors that are not there, damaged files, another
                quantization.
        """
        self.path = Path(path)
        weight_map = find_weights(self.path)
        self.config: dict[str, Any] = {}
        if (self.path / CONFIG_NAME).is_file():
            self.config = read_json(self.path / CONFIG_NAME)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: tuple[str, Any] | None = None
        self._read_headers(weight_map)
        try:
            self._block = get_block_size(self.config)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        self._scales: dict[str, StoredTensor] = {}
        self._set_scales_aside()

    def _read_headers(self, weight_map: Mapping[str, str] | None) -> None:
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]:
            self._read_header(file, weight_map)
        lost = sorted(set(weight_map or ()) - self.tensors.keys())
        if lost:
            raise UserError(
                f"{self.path / INDEX_NAME} promises {_count(lost)}, but the files do not have them: the folder is incomplete"
            )

    def _read_header(self, file: str, weight_map: Mapping[str, str] | None) -> None:
        handle = self._handle(file)
        for name in handle.keys():  # noqa: SIM118  # no mapping: `in` is not for it
            if weight_map is not None and weight_map.get(name) != file:
                continue  # the index decides
            view = handle.get_slice(name)
            self.tensors[name] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())

    def _set_scales_aside(self) -> None:
        """Show weights in fp8 as what is read of them."""
        dtypes = {name: stored.dtype for name, stored in self.tensors.items()}
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        for name in find_quantized(dtypes, shapes, self._block, str(self.path)):
            self._scales[name] = self.tensors.pop(get_scale_name(name))
            self.tensors[name] = replace(self.tensors[name], dtype=DEQUANTIZED)

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> "torch.Tensor":
        """Return a tensor, or a box of it, on the CPU, in the dtype that `tensors` says.

        Raises:
            ValueError: the file is damaged.
        """
        stored, scales = self.tensors[name], self._scales.get(name)
        if scales is None or self._block is None:
            return self._read(name, stored.file, box)
        box = box or tuple(slice(0, length) for length in stored.shape)
        blocks = self._read(get_scale_name(name), scales.file, get_blocks(box, self._block))
        return dequantize(self._read(name, stored.file, box), blocks, box, self._block)

    def _read(self, name: str, file: str, box: tuple[slice, ...] | None) -> "torch.Tensor":
        handle = self._handle(file)
        return handle.get_tensor(name) if not box else handle.get_slice(name)[box]

    def close(self) -> None:
        """Let go of the file that was read last. Until then its pages count as this process's memory."""
        self._open = None

    def _handle(self, file: str) -> Any:
        # One at a time: what was read of a mapped file stays in memory as long as the handle lives.
        if self._open is None or self._open[0] != file:
            self.close()
            try:
                self._open = file, safe_open(self.path / file, framework="pt")
            except FileNotFoundError as error:
                raise UserError(f"{self.path / file} is missing: the folder is incomplete") from error
            except Exception as error:  # the library has exceptions of its own
                raise UserError(f"{self.path / file} is no whole safetensors file: {error}") from error
        return self._open[1]


def find_weights(path: Path) -> dict[str, str] | None:
    """Return the index of a folder: name of a tensor -> name of its file; None where all are in `model.safetensors`.

    Opens no weights.

    Raises:
        ValueError: there are no safetensors, or the index is damaged or names files elsewhere.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder of Hugging Face files")
    if (path / INDEX_NAME).is_file():
        weight_map = read_json(path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path / INDEX_NAME} is damaged: it has no weight_map of names and files")
        for file in set(weight_map.values()):
            if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
                raise UserError(f"{path / INDEX_NAME} names {file!r}: files must be in the folder itself")
        return weight_map
    if (path / SINGLE_NAME).is_file():
        return None
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    found = f"; {_NO_PICKLE.format(names=_count(pickles))}" if pickles else ""
    raise UserError(f"{path} has neither {INDEX_NAME} nor {SINGLE_NAME}{found}")


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder holds Hugging Face weights."""
    return (path / INDEX_NAME).is_file() or (path / SINGLE_NAME).is_file()


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it."""

    @property
    def size(self) -> int:
        """Bytes."""
        size = _BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def plan_shards(entries: Sequence[Entry], shard_size: int) -> dict[str, list[Entry]]:
    """Divide tensors into files of at most `shard_size` bytes, in their order. A larger tensor has a file of its own.

    Returns: name of a file -> what it is to hold
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > shard_size:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the order of `entries`, so that no more than one need be in memory.

    Use it in a `with` statement: at its end the file is on stable storage. The format is that of the library's
    documentation: length of the header (8 bytes), the header as JSON, the tensors without gaps.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path = path
        self._left = list(entries)[::-1]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [begin, begin + entry.size],
            }
            begin += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "SafetensorsWriter":
        self._file = open(self._path, "wb")
        self._file.write(len(self._header).to_bytes(8, "little"))
        self._file.write(self._header)
        return self

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """Write the next tensor, on the CPU and of the promised shape and dtype."""
        import torch

        entry = self._left.pop()
        assert self._file is not None, "use the writer in a with statement"
        assert (name, tuple(tensor.shape)) == (entry.name, entry.shape), f"{name} is not what comes next: {entry}"
        assert tensor.nbytes == entry.size, f"{name} is {tensor.dtype}, not {entry.dtype}"
        if entry.size:
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None, "the writer was entered"
        with self._file:
            if kind is None:
                assert not self._left, f"{len(self._left)} tensors were promised and not written"
                self._file.flush()
                os.fsync(self._file.fileno())


def build_index(shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Return the content of the index of several files."""
    size = sum(entry.size for entries in shards.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, through to stable storage."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a table from a JSON file.

    Raises:
        ValueError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no table")
    return content


def _count(names: Iterable[str], shown: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
