"""Sections about how the work is spread over devices and made fast. See `schema.py`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ParallelismConfig:
    """Degrees of each parallelism; their product is the number of processes."""

    data_parallel_replicate_degree: int = 1
    """Copies of the (sharded) weights: with a shard degree of 1 this is DDP, with a larger one HSDP."""
    data_parallel_shard_degree: int = -1
    """Ranks over which weights are sharded (FSDP). -1: all that the other degrees leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered weights after its forward pass. default: yes, but not under pipeline parallelism."""
    fsdp_accumulation: Literal["auto", "sharded", "unsharded"] = "auto"
    """Gradient accumulation: reduce every microbatch (sharded), or only the last and hold whole gradients until then (unsharded: faster, 4 bytes a parameter). auto: unsharded when that takes under a tenth of the device memory."""
    fsdp_collectives: Literal["nccl", "copy_engine", "auto"] = "nccl"
    """How FSDP gathers weights and reduces gradients. copy_engine leaves the GPU's multiprocessors to the model, and sends gradients in the dtype of the backward pass while summing them in `training.mixed_precision_reduce`; it needs the GPUs of a sharding group to be of one host and to reach each other's memory (NVLink). auto: copy_engine where that is so, else nccl."""
    fsdp_prefetch: int = 0
    """Further blocks whose weights are gathered ahead of use. 0 leaves it to FSDP2, which gathers one ahead."""
    tensor_parallel_degree: int = 1
    """Ranks over which each matrix is split."""
    disable_loss_parallel: bool = False
    """Gather the logits under tensor parallelism."""
    enable_async_tensor_parallel: bool = False
    """Overlap the communication of tensor parallelism with its matmuls."""
    pipeline_parallel_degree: int = 1
    """Stages into which the layers are split."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Module names of each pipeline stage."""
    pipeline_parallel_first_stage_less_layers: int = 1
    """Layers by which the first stage is shorter, for the embedding."""
    pipeline_parallel_last_stage_less_layers: int = 1
    """Layers by which the last stage is shorter, for the output."""
    pipeline_parallel_layers_per_stage: int | None = None
    """Layers in each pipeline stage."""
    pipeline_parallel_schedule: str = "1F1B"
    """Pipeline schedule."""
    pipeline_parallel_schedule_csv: str = ""
    """File with a pipeline schedule of one's own."""
    pipeline_parallel_microbatch_size: int = 1
    """Sequences in one pipeline microbatch."""
    pipeline_parallel_expert_parallel_overlap: bool = True
    """Overlap expert communication with compute in DualPipeV."""
    context_parallel_degree: int = 1
    """Ranks over which each sequence is split."""
    context_parallel_load_balancer: Literal["headtail", "ptrr"] | None = "headtail"
    """How a causal sequence is cut so that all ranks have equal work."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel."""
    expert_parallel_degree: int = 1
    """Ranks over which experts are spread."""
    expert_tensor_parallel_degree: int = 1
    """Ranks over which each expert is split."""
    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """Communication between experts."""


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    """Recompute activations in the backward pass rather than keep them."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """none keeps all, full recomputes every block, selective some blocks or operations, memory_budget lets the compiler choose."""
    selective_ac_option: str = "2"
    """selective: `op` recomputes cheap operations of every block; a number n recomputes every nth block."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    """`op`: linear layers (by part of their name) that are recomputed all the same."""
    early_stop: bool = False
    """Stop a recomputation as soon as all that is needed is there."""
    memory_budget: float = 0.5
    """memory_budget: 0 recomputes as much as full, 1 nothing."""
    visualize_memory_budget_pareto: bool = False
    """memory_budget: write a chart of memory against recomputation to the dump folder."""
    preserve_rng_state: bool = True
    """Recompute with the random numbers of the forward pass."""
    determinism_check: str = "default"
    """`default` compares shapes and dtypes of recomputed tensors, `none` nothing."""
    debug: bool = False
    """Report in detail when a recomputation differs from the forward pass."""


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile, block by block."""

    enable: bool = False
    """Compile the components below."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """What to compile: each block of the model, the loss."""
    backend: str = "inductor"
    """Compiler backend."""


@dataclass(frozen=True)
class CommConfig:
    """Process groups and what is recorded about them."""

    init_timeout_seconds: int = 300
    """Time that a collective may take until the first steps are done: compilation and set-up included."""
    train_timeout_seconds: int = 100
    """Time that a collective may take after that."""
    trace_buf_size: int = 20000
    """Collectives kept in the flight recorder. 0 turns it off."""
    save_traces_folder: str = "comm_traces"
    """Folder for the flight recorder's files, inside `job.dump_folder`."""
    save_traces_file_prefix: str = "rank_"
    """Beginning of the name of each of these files."""
    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """torchtitan's dry-run modes. Only default is available."""


@dataclass(frozen=True)
class Float8LinearConfig:
    """Linear layers in float8."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather weights in float8."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights with one all-reduce."""
    recipe_name: str | None = None
    """Recipe: tensorwise, rowwise, rowwise_with_gw_hp."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers, by part of their name, that stay in high precision."""
    emulate: bool = False
    """Compute in float32 what float8 would give, on any device."""


@dataclass(frozen=True)
class MXLinearConfig:
    """Linear layers in MX formats."""

    mxfp8_dim1_cast_kernel_choice: str = "triton"
    """Kernel of the cast along dim 1."""
    recipe_name: str = "mxfp8_cublas"
    """Recipe."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Layers, by part of their name, that stay in high precision."""


@dataclass(frozen=True)
class QuantizeLinearConfig:
    """Low precision for linear layers."""

    float8: Float8LinearConfig = field(default_factory=Float8LinearConfig)
    mx: MXLinearConfig = field(default_factory=MXLinearConfig)


@dataclass(frozen=True)
class Float8GroupedMMConfig:
    """Experts in float8."""

    fqns: list[str] = field(default_factory=list)
    """Modules, by part of their name, whose experts are converted."""


@dataclass(frozen=True)
class MXGroupedMMConfig:
    """Experts in MX formats."""

    recipe_name: str = "mxfp8"
    """Recipe."""
    fqns: list[str] = field(default_factory=list)
    """Modules, by part of their name, whose experts are converted."""


@dataclass(frozen=True)
class QuantizeGroupedMMConfig:
    """Low precision for grouped matmuls."""

    float8: Float8GroupedMMConfig = field(default_factory=Float8GroupedMMConfig)
    mx: MXGroupedMMConfig = field(default_factory=MXGroupedMMConfig)


@dataclass(frozen=True)
class QuantizeConfig:
    """Low precision, by kind of operation."""

    linear: QuantizeLinearConfig = field(default_factory=QuantizeLinearConfig)
    grouped_mm: QuantizeGroupedMMConfig = field(default_factory=QuantizeGroupedMMConfig)


@dataclass(frozen=True)
class MemoryEstimationConfig:
    """torchtitan's memory estimator."""

    enable: bool = False
    """Estimate memory and exit. Not available yet."""
    disable_fake_mode: bool = False
    """Estimate with real tensors. Not available yet."""


@dataclass(frozen=True)
class FaultToleranceConfig:
    """torchtitan's TorchFT integration. Not available: enabling it is refused."""

    enable: bool = False
    """Train with TorchFT."""
    process_group: str = "gloo"
    """Process group between replicas."""
    process_group_timeout_ms: int = 10000
    """Timeout of that group, in milliseconds."""
    replica_id: int = 0
    """Number of this replica."""
    group_size: int = 0
    """Number of replicas."""
    min_replica_size: int = 1
    """Replicas that a step needs."""
    semi_sync_method: str | None = None
    """local_sgd or diloco."""
    sync_steps: int = 5
    """Steps from one synchronization to the next."""
    should_quantize: bool = False
    """Quantize what DiLoCo sends."""
    fragment_sync_delay: int = 0
    """Steps by which a fragment's synchronization is delayed."""
    fragment_update_alpha: float = 0.0
    """Weight of local parameters when a fragment is merged."""
    module_fqns_per_model_fragment: list[list[str]] = field(default_factory=list)
    """Modules of each DiLoCo fragment."""
    num_fragments: int = 1
    """Number of DiLoCo fragments."""
