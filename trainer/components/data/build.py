"""From the configuration to a loader."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.components.data.batch_loader import BatchLoader, BatchShape
from trainer.components.data.document_files import LocalFile
from trainer.components.data.loader import DataLoader, Source
from trainer.components.data.mixture import SourceProgress
from trainer.components.data.packing import BestFitPacking, ConcatPacking, Packing
from trainer.components.data.prepare import ensure_prepared
from trainer.components.data.sources import PREPARED, get_source_spec, open_documents
from trainer.components.data.streaming import StreamingLoader, StreamShare
from trainer.components.data.token_files import TokenDataset
from trainer.components.tokenizer import Tokenizer
from trainer.config.errors import UserError
from trainer.config.schema_training import DataConfig, SourceConfig, TrainingConfig, ValidationConfig

logger = logging.getLogger(__name__)

BLOCK_CAUSAL = "block_causal"


def build_dataloader(
    *,
    training: TrainingConfig,
    data: DataConfig,
    attn_mask_type: str,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_degree: int,
    seed: int,
    device_type: str,
) -> BatchLoader:
    """Build the loader of the training data; tokenizes text sources on first use, which may take long.

    Args:
        attn_mask_type: `block_causal` keeps positions and labels inside each document.
        dp_rank, dp_degree: this rank among those that see different data, and their number.
        seed: of the order of the data.
        device_type: where batches go; pinned memory is for `cuda`.
    Raises:
        ValueError: the data cannot be used or are too few; see `ensure_prepared`, `Mixture` and `BatchShape`.
    """
    configs = data.sources or [SourceConfig(training.dataset, training.dataset_path)]
    local = training.local_batch_size
    total = training.global_batch_size if training.global_batch_size >= 0 else local * dp_degree
    shape = BatchShape(local, total, training.seq_len, dp_rank, dp_degree)
    document_mask = attn_mask_type == BLOCK_CAUSAL
    if data.streaming:
        if len(configs) > 1:
            raise UserError(
                f"data.streaming reads one source, and data.sources has {len(configs)}: set data.streaming = false to "
                "prepare and mix them, or leave one"
            )
        return _build_stream(
            configs[0],
            data=data,
            document_mask=document_mask,
            tokenizer=tokenizer,
            shape=shape,
            loader_options={"section": training.dataloader, "device_type": device_type},
            seed=seed,
            shuffle=data.shuffle,
        )
    datasets = [_open_dataset(config, tokenizer=tokenizer, data=data) for config in configs]
    sources = [
        _pack(config, dataset, data=data, seq_len=training.seq_len, document_mask=document_mask)
        for config, dataset in zip(configs, datasets, strict=True)
    ]
    loader = DataLoader(
        sources,
        shape=shape,
        seed=seed,
        shuffle=data.shuffle,
        packing=data.packing,
        section=training.dataloader,
        device_type=device_type,
    )
    if dp_rank == 0:
        _log_sources(sources, datasets, data=data, progress=loader.describe(training.steps), seq_len=shape.seq_len)
    return loader


def build_validation_loader(
    *,
    validation: ValidationConfig,
    data: DataConfig,
    attn_mask_type: str,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_degree: int,
    device_type: str,
) -> BatchLoader:
    """Build the loader of the validation data, to be walked over with `epoch_batches`, in the order of the data.

    With `data.streaming` and a limit in `validation.steps` the data are streamed too; otherwise they are prepared.

    Raises:
        ValueError: the data cannot be used or are too few.
    """
    config = SourceConfig(validation.dataset, validation.dataset_path)
    shape = BatchShape(
        validation.local_batch_size, validation.local_batch_size * dp_degree, validation.seq_len, dp_rank, dp_degree
    )
    document_mask = attn_mask_type == BLOCK_CAUSAL
    options: dict[str, Any] = {
        "section": validation.dataloader,
        "device_type": device_type,
        "epoch_steps": validation.steps,
    }
    spec = get_source_spec(validation.dataset)
    if data.streaming and validation.steps >= 0 and spec.name != PREPARED and spec.path != "none":
        return _build_stream(
            config,
            data=data,
            document_mask=document_mask,
            tokenizer=tokenizer,
            shape=shape,
            loader_options=options,
            seed=0,
            shuffle=False,
        )
    dataset = _open_dataset(config, tokenizer=tokenizer, data=data)
    source = _pack(config, dataset, data=data, seq_len=shape.seq_len, document_mask=document_mask, keep_tail=True)
    if source.packing.n_sequences < 1:
        raise UserError(f"validation.dataset {validation.dataset!r} has not one token to predict: take more data")
    loader = DataLoader([source], shape=shape, seed=0, shuffle=False, packing=data.packing, **options)
    if dp_rank == 0:
        _log_validation(source, dataset, loader)
    return loader


def _open_dataset(config: SourceConfig, *, tokenizer: Tokenizer, data: DataConfig) -> TokenDataset:
    if not config.dataset:
        raise UserError("data.sources: a source has no `dataset`; name one, as in training.dataset")
    return ensure_prepared(config.dataset, config.path, tokenizer=tokenizer, data=data)


def _pack(
    config: SourceConfig,
    dataset: TokenDataset,
    *,
    data: DataConfig,
    seq_len: int,
    document_mask: bool,
    keep_tail: bool = False,
) -> Source:
    packing: Packing
    if data.packing == "best_fit":
        cache_dir = Path(data.cache_dir).expanduser()
        packing = BestFitPacking(dataset, seq_len=seq_len, document_mask=document_mask, cache_dir=cache_dir)
    else:
        packing = ConcatPacking(dataset, seq_len=seq_len, document_mask=document_mask, keep_tail=keep_tail)
    return Source(config.name or config.dataset, packing, dataset.fingerprint, config.weight)


def _log_validation(source: Source, dataset: TokenDataset, loader: DataLoader) -> None:
    sizes = (dataset.n_documents, dataset.n_tokens, source.packing.n_sequences, loader.shape.seq_len)
    logger.info(
        "validation data %s: %s documents, %s tokens, %s sequences of %s; %s batches on each of %d ranks",
        source.name,
        *(f"{size:,}" for size in sizes),
        f"{loader.n_epoch_batches:,}",
        loader.shape.dp_degree,
    )


def _log_sources(
    sources: Sequence[Source],
    datasets: Sequence[TokenDataset],
    *,
    data: DataConfig,
    progress: dict[str, SourceProgress],
    seq_len: int,
) -> None:
    """Log one line for each source."""
    total = sum(part.sequences for part in progress.values())
    for source, dataset in zip(sources, datasets, strict=True):
        report, part = source.packing.report, progress[source.name]
        cut = "" if report.cut_documents is None else f", {report.cut_documents:,} documents cut"
        share = f" and {part.sequences / max(total, 1):.1%} of its tokens" if len(sources) > 1 else ""
        logger.info(
            "data %s: %s documents, %s tokens, %s sequences of %s; the whole run is %.2f epochs%s; "
            "packing %s leaves out %.2f%% of the tokens, %.2f%% of the places are padding%s",
            source.name,
            *(f"{n:,}" for n in (dataset.n_documents, dataset.n_tokens, source.packing.n_sequences, seq_len)),
            part.epochs,
            share,
            data.packing,
            100 * report.cropped,
            100 * report.padded,
            cut,
        )


def _build_stream(
    config: SourceConfig,
    *,
    data: DataConfig,
    document_mask: bool,
    tokenizer: Tokenizer,
    shape: BatchShape,
    loader_options: dict[str, Any],
    seed: int,
    shuffle: bool,
) -> StreamingLoader:
    spec = get_source_spec(config.dataset)
    if spec.name == PREPARED:
        raise UserError("data.streaming cannot read token files, which need no streaming: set data.streaming = false")
    if data.packing != "concat":
        raise UserError(
            f"data.packing {data.packing!r} looks at all documents first, which a stream cannot: set data.packing = "
            "'concat' or data.streaming = false"
        )
    files = open_documents(spec, config.path, text_key=data.text_key, split=data.split)
    share = StreamShare(
        files,
        encode=tokenizer.encode_document,
        dp_rank=shape.dp_rank,
        dp_degree=shape.dp_degree,
        seed=seed,
        shuffle=shuffle,
        max_bad_rows=data.max_bad_rows,
        read_retries=data.read_retries,
    )
    # Names without folders: the data may have been moved.
    names = [[file.path.name if isinstance(file, LocalFile) else file.name, file.n_bytes] for file in files]
    name = config.name or config.dataset
    if shape.dp_rank == 0:
        logger.info(
            "data %s: streamed from %d files, dealt out to %d ranks by %s; the order is that of the files, not shuffled by row",
            name,
            len(files),
            shape.dp_degree,
            "rows" if share.by_rows else "files",
        )
    return StreamingLoader(
        share,
        name=name,
        identity={
            "data set": config.dataset,
            "files": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
            "data.text_key": data.text_key,
            "tokenizer": tokenizer.fingerprint,
            "debug.seed": seed,
            "data.shuffle": shuffle,
        },
        shape=shape,
        document_mask=document_mask,
        read_timeout=data.read_timeout_seconds,
        **loader_options,
    )
