"""The whole configuration of a run: `JobConfig` and the sections about the run itself.

Sections are frozen dataclasses; the string under a field is its `--help` text. Key names are those of torchtitan
v0.2.2 where it has the key. What a section describes stands in one of four files: the run (here), the model and its
training (`schema_training.py`), how it is spread over devices (`schema_parallel.py`), low precision
(`schema_quantize.py`). No file here imports torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from trainer.config.schema_parallel import (
    ActivationCheckpointConfig,
    CommConfig,
    CompileConfig,
    FaultToleranceConfig,
    MemoryEstimationConfig,
    ParallelismConfig,
)
from trainer.config.schema_plan import PlanConfig
from trainer.config.schema_quantize import QuantizeConfig
from trainer.config.schema_training import (
    DataConfig,
    LRSchedulerConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
)


@dataclass(frozen=True)
class JobSection:
    """What this run is called, and where its files go."""

    config_file: str | None = None
    """TOML file with the settings of the run."""
    dump_folder: str = "./outputs"
    """Folder for everything that the run writes: resolved config, metrics, curves, traces and checkpoints."""
    description: str = "default job"
    """One line about the run, for the log."""
    time_limit: str | None = None
    """Wall-clock time from the call of run_train.sh, such as 3:50:00 or 1-12:00:00 (days-hours:minutes:seconds). Before it is over the run saves and stops. Unset: what SLURM says is left of the job, where there is one."""
    print_config: bool = False
    """Print the resolved configuration at the start."""
    save_config_file: str | None = None
    """A further file, relative to `dump_folder`, to write the resolved configuration to (config.toml is always written)."""
    custom_config_module: str = ""
    """torchtitan's merge of a user-written config class. Not available: use `experimental.custom_import`."""
    plan: bool = False
    """Say what each GPU's memory will hold, whether it fits, and how fast a step should be, and exit. Needs no GPU; see the section `plan`."""
    plan_search: bool = False
    """Try layouts (data, tensor, context, pipeline and expert parallelism, recomputation, batch) that fit the number of GPUs, list the fastest that fit their memory, and exit."""
    validate_only: bool = False
    """Check the configuration, print it with the origin of each value that is not a default, and exit."""


@dataclass(frozen=True)
class ProfilingConfig:
    """Traces and memory snapshots."""

    enable_profiling: bool = False
    """Write a Chrome trace of some steps from every rank."""
    save_traces_folder: str = "profile_traces"
    """Folder for the traces, inside `job.dump_folder`."""
    profile_freq: int = 10
    """Steps from one trace to the next."""
    profiler_active: int = 1
    """Steps that a trace records."""
    profiler_warmup: int = 3
    """Steps with the profiler on and nothing recorded, before each trace."""
    enable_memory_snapshot: bool = False
    """Record CUDA allocations, and write a snapshot every `profile_freq` steps and when memory runs out."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder for the memory snapshots, inside `job.dump_folder`."""


@dataclass(frozen=True)
class MetricsConfig:
    """What is written about a run while it goes on."""

    log_freq: int = 10
    """Steps from one line of metrics to the next."""
    enable_tensorboard: bool = True
    """Write TensorBoard curves."""
    disable_color_printing: bool = False
    """No colours on the terminal."""
    save_tb_folder: str = "tb"
    """Folder for the TensorBoard files, inside `job.dump_folder`."""
    save_for_all_ranks: bool = False
    """Write metrics from every rank, each to its own folder, and not from the first one alone."""
    enable_wandb: bool = False
    """Log to Weights & Biases (the extra `wandb`; project, run and team from the WANDB_* variables)."""
    straggler_threshold: float = 1.5
    """Warn of a rank whose GPU takes so many times the median for the same matrix product, and of one that others wait for before the first collective of a step. 0: compare nothing."""
    progress_bar: bool = True
    """Show a progress bar with the remaining time when the output is a terminal."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one in `folder` if there is one."""
    enable_ft_dataloader_checkpoints: bool = True
    """torchtitan's per-replica data loader checkpoints under TorchFT. Has no effect here."""
    folder: str = "checkpoint"
    """Folder for the checkpoints, inside `job.dump_folder`."""
    remote_folder: str | None = None
    """URL of a folder in a store (s3://, gs://, az://, ...) that belongs to this run alone. Each whole checkpoint is copied there in the background, and a run goes on from there where the local folder has none as new. The store's fsspec package has to be installed (s3fs, gcsfs, ...)."""
    interval: int = 500
    """Steps from one checkpoint to the next."""
    initial_load_path: str | None = None
    """Checkpoint to begin from when `folder` holds none: a folder, or a URL (s3://, gs://, ...)."""
    initial_load_model_only: bool = True
    """Take only the weights from `initial_load_path`, and begin at step 0."""
    initial_load_in_hf: bool = False
    """`initial_load_path` is a folder of Hugging Face files (safetensors). Unset, they are in `model.hf_assets_path`."""
    initial_load_in_hf_quantized: bool = False
    """`initial_load_path` is in the Hugging Face format with quantized weights."""
    last_save_model_only: bool = False
    """Save only the weights at the last step. Such a checkpoint cannot be resumed from."""
    last_save_in_hf: bool = False
    """Save the last step as a Hugging Face folder, which transformers loads as it is. Needs `last_save_model_only`."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in a model-only save."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write checkpoints in the background. async first copies everything to host memory; async_with_pinned_mem copies to pinned memory, which it keeps for the whole run, while the next step computes."""
    keep_latest_k: int = 10
    """Checkpoints to keep; older ones are deleted. 0 keeps all."""
    max_failed_saves: int = 3
    """Saves in a row that may fail (a full disk) before the run stops. Each raises an alarm, and training goes on. 0 stops at the first."""
    allow_config_change: list[str] = field(default_factory=list)
    """Settings (globs of keys, such as optimizer.lr) that may differ from those of the checkpoint although that changes the result."""
    load_step: int = -1
    """Step to resume from. -1 takes the newest."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts not to load: of model, optimizer, lr_scheduler, dataloader, train_state, float8, rng."""
    enable_first_step_checkpoint: bool = False
    """Also save after the first step, to find storage problems early."""
    create_seed_checkpoint: bool = False
    """Write the initial weights as step 0 and exit."""
    load_only: bool = False
    """Resume, but save nothing."""


@dataclass(frozen=True)
class DebugConfig:
    """Reproducibility and checks."""

    seed: int | None = None
    """Seed of weights, data order and dropout. Unset, the seed is 0."""
    deterministic: bool = False
    """Use deterministic kernels only. Slower."""
    deterministic_warn_only: bool = False
    """Warn where an operation has no deterministic kernel, rather than fail."""
    moe_force_load_balance: bool = False
    """Route tokens to experts round-robin, for benchmarks. The metrics of such a run say so."""


@dataclass(frozen=True)
class ExperimentalConfig:
    """The user's own code."""

    custom_import: str = ""
    """Module to import first. It can register a model, a data set or an optimizer."""
    custom_args_module: str = ""
    """torchtitan's deprecated name of `job.custom_config_module`. Not available."""


@dataclass(frozen=True)
class JobConfig:
    """Pretrain a language model. Settings come from the TOML file, then from the command line."""

    job: JobSection = field(default_factory=JobSection)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    memory_estimation: MemoryEstimationConfig = field(default_factory=MemoryEstimationConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    experimental: ExperimentalConfig = field(default_factory=ExperimentalConfig)
