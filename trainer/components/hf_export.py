"""A checkpoint of this program as a folder of Hugging Face files, which transformers loads as it is.

Tensors go one by one from the checkpoint's files into those of the export; several processes write a file each at a time.
The network, of which there is no part in memory, need not fit anywhere.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.hf_layout import HFTensor, find_places
from trainer.components.hf_files import (
    CONFIG_NAME,
    DTYPES,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    Entry,
    SafetensorsWriter,
    build_index,
    plan_shards,
    write_json,
)
from trainer.components.native_weights import NativeWeights
from trainer.components.network import Network
from trainer.components.tokenizer import Tokenizer
from trainer.components.tokenizer_files import write_tokenizer_files

SHARD_SIZE = 5 * 10**9
"""Bytes in a file, as transformers writes them."""


@dataclass(frozen=True)
class Export:
    """How a checkpoint is to be written."""

    network: Network
    dtype: str | None = None
    """float32, bfloat16 or float16. None: as it is in the checkpoint."""
    shard_size: int = SHARD_SIZE
    fused_experts: bool = False
    """One tensor for the matrices of all experts, and not one for each."""


def write_weights(
    export: Export,
    source: NativeWeights,
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_written: Callable[[int], object] = lambda size: None,
) -> int:
    """Write this process's share of the files, each through to stable storage, and on rank 0 their index.

    on_written: is told of the bytes of each tensor.
    Returns: bytes in all files of all processes.

    Raises:
        ValueError: the checkpoint is not one of this network: a tensor is missing, surplus, or has another shape.
    """
    tensors = match_tensors(export, source)
    entries = [_describe(tensor, export, source) for tensor in tensors.values()]
    shards = plan_shards(entries, export.shard_size)
    for file in list(shards)[rank::world_size]:
        with SafetensorsWriter(folder / file, shards[file]) as writer:
            for entry, x in _build(shards[file], tensors, source):
                writer.write(entry.name, x)
                on_written(entry.size)
    if rank == 0 and len(shards) > 1:
        write_json(folder / INDEX_NAME, build_index(shards))
    return sum(entry.size for entry in entries)


def match_tensors(export: Export, source: NativeWeights) -> dict[str, HFTensor]:
    """Return the tensors to write, by name, having compared names and shapes.

    Raises:
        ValueError: the checkpoint is not one of this network.
    """
    network = export.network
    tensors = network.adapter.hf_tensors(fused_experts=export.fused_experts)
    found = source.shapes.keys() - network.adapter.tied.keys()
    network.adapter.check_names(found, find_places(tensors), str(source.path))
    wrong = [
        f"{name} ({source.shapes[name]} there, {shape} in this model)"
        for name, shape in network.shapes.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{source.path} does not fit this model: shapes differ: {', '.join(wrong[:4])}{more}")
    return {tensor.name: tensor for tensor in tensors}


def _describe(tensor: HFTensor, export: Export, source: NativeWeights) -> Entry:
    stored = source.dtypes[tensor.parts[0].name]
    dtype = str(stored).removeprefix("torch.") if export.dtype is None else export.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"{source.path}: {tensor.parts[0].name} is {dtype}. Name the dtype of the export: {', '.join(DTYPES)}"
        )
    dtype = "float32" if tensor.keeps_fp32 else dtype
    return Entry(tensor.name, tensor.get_shape(source.shapes), DTYPES[dtype])


def _build(
    entries: list[Entry], tensors: Mapping[str, HFTensor], source: NativeWeights
) -> Iterator[tuple[Entry, Tensor]]:
    """Yield each tensor of a file, on the CPU, as it is to be written. What it is made from is kept while it is needed."""
    dtypes = {stored: getattr(torch, name) for name, stored in DTYPES.items()}
    held: dict[str, Tensor] = {}
    for entry in entries:
        tensor = tensors[entry.name]
        names = {part.name for part in tensor.parts}
        held = {name: x for name, x in held.items() if name in names}
        for name in names - held.keys():
            held[name] = source.read(name)
        yield entry, tensor.build(held.__getitem__).to(dtypes[entry.dtype])


def write_description(export: Export, folder: Path, *, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Write all but the weights: config.json, generation_config.json and the tokenizer's files.

    dtype: that of the weights. tokenizer: the one that the model was trained with; without it the folder has none.
    """
    config = describe_network(export.network, dtype=dtype, tokenizer=tokenizer)
    write_json(folder / CONFIG_NAME, config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / GENERATION_CONFIG_NAME, {"_from_model_config": True, **ids})
    if tokenizer is not None:
        write_tokenizer_files(tokenizer, folder, max_length=config["max_position_embeddings"])


def describe_network(network: Network, *, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        ValueError: transformers has no such model.
    """
    return {
        **network.adapter.hf_config(),
        "torch_dtype": dtype,
        # Always there: the classes have ids of their own by default, which would be wrong.
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "use_cache": True,
    }
