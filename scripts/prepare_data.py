#!/usr/bin/env python
"""Tokenizes a data set into token files, which a run reads with `--training.dataset prepared --training.dataset_path FOLDER`.

Interrupted (Ctrl-C, a full disk, a lost machine), it goes on from the last whole shard when started again.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.components.data.prepare import PrepareStats, prepare_source
from trainer.components.data.sources import HUGGING_FACE_PREFIX, PREPARED, SOURCES
from trainer.components.data.token_files import DEFAULT_SHARD_TOKENS, TokenDataset
from trainer.components.tokenizer import build_tokenizer
from trainer.components.tools import add_import, import_custom, run_tool
from trainer.config.schema import DataConfig


def build_parser() -> argparse.ArgumentParser:
    defaults = DataConfig()
    table = "\n".join(f"  {spec.name:18} {spec.description}" for spec in SOURCES.values() if spec.name != PREPARED)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"data sets:\n{table}\n  {HUGGING_FACE_PREFIX + 'NAME[:CONFIG]':18} a data set of the `datasets` library",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset", help="name in the table below; leave out with --verify to check what --output holds"
    )
    parser.add_argument("--path", help="path, glob or folder of the data set, where it takes one")
    parser.add_argument("--tokenizer", help="`byte`, a tokenizer file, or a folder with one")
    parser.add_argument("--output", required=True, help="folder for the token files")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a CPU, 8 at most)")
    parser.add_argument(
        "--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, help="tokens in a shard (%(default)s)"
    )
    parser.add_argument("--text-key", default=defaults.text_key, help="field or column with the text (%(default)s)")
    parser.add_argument("--split", default=defaults.split, help="split of a Hugging Face data set (%(default)s)")
    parser.add_argument(
        "--max-bad-rows", type=int, default=defaults.max_bad_rows, help="bad rows to bear (%(default)s)"
    )
    add_import(parser, registers="a data set")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare with the checksums")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.dataset is None and not options.verify:
        parser.error("--dataset is missing (or give --verify to check what --output holds)")
    if options.dataset is not None and options.tokenizer is None:
        parser.error("--tokenizer is missing: `byte`, a tokenizer file, or a folder with one")
    if options.shard_tokens < 1 or options.workers < 0:
        parser.error("--shard-tokens must be at least 1, --workers at least 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    message = "interrupted; whole shards were kept: start again to go on from there"
    return run_tool(lambda: run(options), if_interrupted=message)


def run(options: argparse.Namespace) -> None:
    if options.dataset is None:
        dataset = TokenDataset.open(options.output)
    else:
        import_custom(options.custom_import)
        data = DataConfig(
            text_key=options.text_key,
            split=options.split,
            prepare_workers=options.workers,
            max_bad_rows=options.max_bad_rows,
        )
        dataset, stats = prepare_source(
            options.dataset,
            options.path,
            options.output,
            tokenizer=build_tokenizer(options.tokenizer),
            data=data,
            shard_tokens=options.shard_tokens,
        )
        print_summary(dataset, stats)
    if options.verify:
        dataset.verify()
        print(f"verified   {len(dataset.shards)} shards, all checksums are right")


def print_summary(dataset: TokenDataset, stats: PrepareStats) -> None:
    print(f"documents  {stats.n_documents:,}")
    print(f"tokens     {stats.n_tokens:,} ({dataset.dtype.itemsize} bytes each) in {len(dataset.shards)} shards")
    print(f"text       {stats.n_text_bytes:,} bytes, {stats.n_text_bytes / stats.n_tokens:.2f} bytes/token")
    print(f"bad rows   {stats.n_bad_rows:,}")
    if stats.new_tokens:
        speed = stats.new_tokens / max(stats.seconds, 1e-6)
        print(f"speed      {speed / 1e6:.2f} million tokens/s, {stats.seconds:.1f} s")
    else:
        print("speed      nothing was left to do")
    print(f"folder     {dataset.folder}")


if __name__ == "__main__":
    sys.exit(main())
