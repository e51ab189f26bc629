#!/usr/bin/env python
"""Converts a checkpoint of this program to a Hugging Face folder, or a Hugging Face folder to a checkpoint.

The direction follows from SOURCE: a checkpoint's folder (.../checkpoint/step-500), or a folder with config.json and
safetensors. transformers loads what is written: AutoModelForCausalLM.from_pretrained(OUTPUT). Tensors go from file to file one by
one, so that memory holds a few of them at most, whatever the size of the model. OUTPUT is whole or absent.
"""

import argparse
import ctypes
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from models.hf_layout import read_box
from trainer.components.durable_files import sync_folder
from trainer.components.hf_export import SHARD_SIZE, Export, match_tensors, write_description, write_weights
from trainer.components.hf_files import CONFIG_NAME, DTYPES, GENERATION_CONFIG_NAME, HFFolder, is_hf_folder, write_json
from trainer.components.hf_load import check_shapes, find_stored
from trainer.components.native_weights import NativeWeights, write_native
from trainer.components.network import Network, find_saved_model
from trainer.components.tokenizer import Tokenizer, build_tokenizer
from trainer.components.tokenizer_files import copy_tokenizer_files
from trainer.components.tools import add_import, import_custom, run_tool

_GIGA = 10**9
_M_MMAP_THRESHOLD = -3  # malloc.h


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="what to convert; it is only read")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to make; it must not exist")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="dtype of the weights that are written (default: as they are)"
    )
    to_hf = parser.add_argument_group("to Hugging Face")
    to_hf.add_argument(
        "--config",
        metavar="FILE",
        help="settings of the run (default: those in the checkpoint, or config.toml in the folder of its run)",
    )
    to_hf.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer that goes along, as in model.hf_assets_path (default: that of the run)",
    )
    to_hf.add_argument(
        "--shard-size", type=float, default=SHARD_SIZE / _GIGA, metavar="GB", help="size of a file (%(default)s)"
    )
    to_hf.add_argument(
        "--fuse-experts",
        action="store_true",
        help="one tensor for the matrices of all experts, as in transformers' memory; its own files have one for each expert",
    )
    add_import(to_hf, registers="the model")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.shard_size <= 0:
        parser.error("--shard-size must be above 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_tool(lambda: run(options), if_interrupted="interrupted; nothing was written")


def run(options: argparse.Namespace) -> None:
    return_freed_memory()
    import_custom(options.custom_import)
    if options.output.exists():
        raise ValueError(f"{options.output} exists: name a new folder, or remove it")
    convert = convert_from_hf if is_hf_folder(options.source) else convert_to_hf
    started = time.perf_counter()
    with staged(options.output) as folder:
        size = convert(options, folder)
    print(f"{options.output}: {size / _GIGA:.2f} GB in {time.perf_counter() - started:.1f} s")


def return_freed_memory() -> None:
    """Have the memory of each tensor go back to the system when it is freed.

    glibc keeps blocks below a bound that grows to 32 MiB, and does not use one for the next aligned block of the same size: the
    heap would grow with every matrix (seen: 64 MB a layer, four matrices of 16 MB).
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a hidden folder that gets the name `output` at the end, or goes away after an error."""
    folder = output.absolute().with_name(f".{output.name}.{os.getpid()}.staging")
    folder.mkdir(parents=True)
    try:
        yield folder
        sync_folder(folder)
        folder.rename(output)
        sync_folder(output.absolute().parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def convert_to_hf(options: argparse.Namespace, folder: Path) -> int:
    """Write a checkpoint as a Hugging Face folder, and return the bytes of its weights."""
    source = NativeWeights(options.source)
    network = Network.from_native(source, options.config)
    tokenizer = find_tokenizer(options)
    export = Export(network, options.dtype, int(options.shard_size * _GIGA), options.fuse_experts)
    match_tensors(export, source)  # before all files are read
    source.verify()
    total = sum(
        torch.Size(shape).numel() * get_dtype(options, source.dtypes[name]).itemsize
        for name, shape in source.shapes.items()
    )
    with progress_bar(total) as bar:
        size = write_weights(export, source, folder, on_written=bar.update)
    dtype = str(get_dtype(options, next(iter(source.dtypes.values())))).removeprefix("torch.")
    write_description(export, folder, dtype=dtype, tokenizer=tokenizer)
    return size


def get_dtype(options: argparse.Namespace, stored: torch.dtype) -> torch.dtype:
    return stored if options.dtype is None else getattr(torch, options.dtype)


def find_tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """Return the tokenizer that goes along, None where there is none."""
    if options.tokenizer:
        return build_tokenizer(options.tokenizer)
    saved = find_saved_model(options.source, options.config)
    if saved is not None:
        return build_tokenizer(saved.hf_assets_path) if saved.hf_assets_path.strip() else None
    return build_tokenizer(options.source) if (options.source / "tokenizer.json").is_file() else None


def convert_from_hf(options: argparse.Namespace, folder: Path) -> int:
    """Write a Hugging Face folder as a checkpoint of the weights, and return their bytes."""
    source = HFFolder(options.source)
    network = Network.from_hf(source)
    stored = find_stored(source, network.adapter)
    check_shapes(source, stored, network.shapes)
    names = {tensor.name: tensor for tensor in network.adapter.match(source.tensors.keys())}
    types = {code: getattr(torch, name) for name, code in DTYPES.items()}
    dtypes = {}
    for name, places in stored.items():
        tensor = places[0].tensor
        keeps = names[tensor.name].keeps_fp32
        code = source.tensors[tensor.name].dtype
        if code not in types:
            raise ValueError(f"{source.path}: {tensor.name} is {code}; only {', '.join(types)} can be read")
        dtypes[name] = torch.float32 if keeps else get_dtype(options, types[code])

    def read_rows(name: str, begin: int, count: int) -> torch.Tensor:
        shape = network.shapes[name]
        offsets, sizes = (begin, *(0 for _ in shape[1:])), (count, *shape[1:])
        return read_box(stored[name], shape, offsets, sizes, source.read)

    # Quantized weights are no longer that.
    write_json(folder / CONFIG_NAME, {k: v for k, v in source.config.items() if k != "quantization_config"})
    if (source.path / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(source.path / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)
    copy_tokenizer_files(source.path, folder)
    total = sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in network.shapes.items())
    with progress_bar(total) as bar:
        write_native(folder, shapes=network.shapes, dtypes=dtypes, read_rows=read_rows, on_written=bar.update)
    return total


def progress_bar(total: int) -> Any:
    return tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None)


if __name__ == "__main__":
    sys.exit(main())
