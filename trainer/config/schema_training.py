"""Sections about the model, the data and the optimization. See `schema.py`."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """Which network to train."""

    name: str = "llama3"
    """Model family, by its name in the registry."""
    flavor: str = "debugmodel"
    """Size of the model, by its name in the family's table."""
    hf_assets_path: str = "byte"
    """Folder with the tokenizer's files (tokenizer.json, tokenizer.model or *.tiktoken), or one such file, or `byte` for the built-in byte-level tokenizer."""
    tokenizer_path: str | None = None
    """Deprecated name of `hf_assets_path`."""
    converters: list[str] = field(default_factory=list)
    """Conversions applied to the model before it is parallelized, such as quantize.linear.float8."""
    print_after_conversion: bool = False
    """Print the model after the conversions."""
    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    """block_causal keeps attention, positions and labels inside each document."""
    mtp_depth: int | None = None
    """Further tokens that each token predicts in training (multi-token prediction). null: as the flavor says."""
    mtp_weight: float | None = None
    """Weight of the mean of their losses. null: as the flavor says."""
    balance_loss_alpha: float | None = None
    """Weight of the sequence-wise auxiliary loss of a mixture of experts. null: as the flavor says."""

    bias_update: Literal["sign", "proportional"] | None = None
    """How the routers' bias moves against the load: always by bias_update_speed, or by a part of it near balance. null: as the flavor says."""
    bias_update_speed: float | None = None
    """How much it moves in a step, at most. null: as the flavor says."""

    def get_changes(self) -> dict[str, Any]:
        """Return what is to differ from the flavor's args, by name."""
        names = ("mtp_depth", "mtp_weight", "balance_loss_alpha", "bias_update", "bias_update_speed")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class MuonConfig:
    """Muon (Keller Jordan, 2024) for hidden matrices. Everything else is trained by AdamW with `optimizer.lr`."""

    lr: float = 0.02
    """Learning rate of the matrices, before the schedule."""
    momentum: float = 0.95
    """Momentum of the gradient average."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations of the orthogonalization."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    """How the shape of a matrix scales the learning rate."""
    exclude: list[str] = field(default_factory=list)
    """Globs of names of further matrices that AdamW trains, beside embeddings and output. Each must match something."""


@dataclass(frozen=True)
class ParamGroupConfig:
    """Settings for the parameters that a pattern matches."""

    match: str = ""
    """Glob over parameter names, such as `layers.*.feed_forward.*`. It must match something."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float | None = None
    """Weight decay in place of `optimizer.weight_decay`."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    name: str = "AdamW"
    """Optimizer, by its name in the table: AdamW, Adam, Muon, AdamW with moments of few bits as in torchao (AdamW8bit, AdamWFp8, AdamW4bit), or one registered by `experimental.custom_import`."""
    lr: float = 8e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient average."""
    beta2: float = 0.95
    """Decay of the squared gradient average."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """Kernel of the update. fused is the fastest."""
    state_dtype: Literal["float32", "bfloat16", "float8"] | None = None
    """AdamW and Adam: dtype of the moments. Unset: that of the parameters. bfloat16: with stochastic rounding. float8: the first moment in float8, with a scale for each block of up to 256 values, the second in bfloat16."""
    early_step_in_backward: bool = False
    """torchtitan's update inside the backward pass. Not available: it turns gradient clipping off in silence."""
    no_decay: list[str] = field(default_factory=list)
    """Globs of parameter names without weight decay, such as `*norm*` and `tok_embeddings.*`. Each must match something."""
    param_groups: list[ParamGroupConfig] = field(default_factory=list)
    """Settings for the parameters that match a pattern; the first match counts."""
    muon: MuonConfig = field(default_factory=MuonConfig)


@dataclass(frozen=True)
class LRSchedulerConfig:
    """The learning rate over the run: linear warm-up, a stable part, decay."""

    warmup_steps: int = 200
    """Steps of linear warm-up."""
    total_steps: int | None = None
    """Steps that the schedule spans. Unset: `training.steps`."""
    decay_ratio: float | None = None
    """Share of the steps spent in decay. Unset: everything after the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: float = 0.0
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class DataloaderConfig:
    """How batches are made ready ahead of time."""

    num_workers: int = 0
    """Threads that make batches ahead of the training loop. 0 means one."""
    persistent_workers: bool = False
    """torchtitan's worker processes are threads here. Has no effect."""
    pin_memory: bool = True
    """Batches in pinned host memory, for copies that do not wait (CUDA only)."""
    prefetch_factor: int | None = None
    """Batches ready ahead of the training loop, for each thread. Unset: 4."""


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, length, precision."""

    dataset: str = "stdlib"
    """Data set, by its name in the table: stdlib (the Python standard library's own source), text, jsonl, parquet, prepared, c4, ..., or `hf:NAME`."""
    dataset_path: str | None = None
    """Path, glob or folder of the data set, where it has one."""
    local_batch_size: int = 8
    """Sequences in one microbatch of one data-parallel rank."""
    global_batch_size: int = -1
    """Sequences in one optimizer step over all ranks. -1: `local_batch_size` on every data-parallel rank, no accumulation."""
    seq_len: int = 2048
    """Tokens in a sequence."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm. 0 turns clipping off."""
    steps: int = 10000
    """Optimizer steps of the run."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory between uses."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which parameters are stored and updated."""
    mixed_precision_param: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of parameters and activations in forward and backward."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over ranks."""
    gradient_wire_dtype: Literal["float8"] | None = None
    """Dtype in which FSDP sends gradients to the rank that adds them up. Unset: that of the sum, or as fsdp_collectives says. float8: a quarter of the traffic, with a scale for each 256 values; they are added up in float32."""
    gc_freq: int = 50
    """Steps from one Python garbage collection to the next, which all ranks do at the same time. 0 leaves it to Python."""
    gc_debug: bool = False
    """Log what each garbage collection finds."""
    loss_chunk_size: int = 4096
    """Tokens for which logits are held at a time. 0: all of a microbatch."""
    nonfinite_policy: Literal["stop", "skip", "rollback"] = "stop"
    """When loss or gradient is not finite no rank updates. Then: stop the run, go on with the next batch, or go back to the last checkpoint and leave the batch out."""
    nonfinite_max_skips: int = 10
    """Steps in a row that may be skipped, and rollbacks, before the run stops all the same."""
    spike_policy: Literal["off", "warn", "stop", "skip", "rollback"] = "warn"
    """What to do at a finite loss far above those before it. skip leaves the step out, on the device; rollback as in `nonfinite_policy`."""
    spike_window: int = 128
    """Losses that a spike is told by: those of the last steps that counted."""
    spike_threshold: float = 10.0
    """A spike is this many deviations (1.4826 median absolute deviations) above the median of the window."""
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    dataset: str = ""
    """Data set, as in `training.dataset`."""
    path: str | None = None
    """Path, as in `training.dataset_path`."""
    weight: float = 1.0
    """Share of the sequences drawn from this source, relative to the others."""
    name: str = ""
    """Name in logs. Unset: the data set's."""


@dataclass(frozen=True)
class DataConfig:
    """How text becomes batches."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Mixture of sources, in place of `training.dataset`: `[[data.sources]]` tables."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat joins all documents and cuts every `seq_len` tokens. best_fit keeps documents whole where they fit and pads."""
    shuffle: bool = True
    """Visit sequences in a new random order each epoch."""
    cache_dir: str = "~/.cache/bloomery"
    """Where token files made from text sources are kept."""
    text_key: str = "text"
    """Field or column with the text, in JSONL, Parquet and Hugging Face data sets."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    streaming: bool = False
    """Read a Hugging Face, JSONL or Parquet source as a stream, without preparing it. Order is then by rank, not global."""
    prepare_workers: int = 0
    """Processes that tokenize a text source on first use. 0: one for each CPU, 8 at most."""
    max_bad_rows: int = 100
    """Rows that cannot be read before the run stops; of a stream, on one rank in one epoch. Each is logged by file and row."""
    read_retries: int = 5
    """Attempts at a failing read of a stream, with growing pauses."""
    read_timeout_seconds: int = 75
    """Longest that a step waits for a batch of a stream, retries included, before the run ends with that as the reason. Below `comm.train_timeout_seconds`. 0: no limit."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out data during training."""

    enable: bool = False
    """Measure the loss on the validation data every `freq` steps."""
    dataset: str = "stdlib_validation"
    """Data set, as in `training.dataset`."""
    dataset_path: str | None = None
    """Path, as in `training.dataset_path`."""
    local_batch_size: int = 8
    """Sequences in one batch of one data-parallel rank."""
    seq_len: int = 2048
    """Tokens in a sequence."""
    freq: int = 10
    """Steps from one validation to the next."""
    steps: int = -1
    """Batches in one validation. -1: the whole data set, once."""
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
