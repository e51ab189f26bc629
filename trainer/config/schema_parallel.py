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
    data_parallel_implementation: Literal["fsdp2", "simple_fsdp"] = "fsdp2"
    """Who gathers weights and reduces gradients. fsdp2: torch's hooks around each block. simple_fsdp: operations within the network, which the compiler sees and can reorder (docs/simple_fsdp.md)."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered weights after its forward pass. default: yes, but not under pipeline parallelism."""
    fsdp_accumulation: Literal["auto", "sharded", "unsharded"] = "auto"
    """Gradient accumulation: reduce every microbatch (sharded), or only the last and hold whole gradients until then (unsharded: faster, 4 bytes a parameter). auto: unsharded when that takes under a tenth of the device memory."""
    fsdp_collectives: Literal["nccl", "copy_engine", "auto"] = "nccl"
    """How FSDP gathers weights and reduces gradients. copy_engine leaves the GPU's multiprocessors to the model, and sends gradients in the dtype of the backward pass while summing them in `training.mixed_precision_reduce`; it needs the GPUs of a sharding group to be of one host and to reach each other's memory (NVLink). auto: copy_engine where that is so, else nccl."""
    fsdp_prefetch: int = 0
    """Further blocks whose weights are gathered ahead of use. 0 leaves it to FSDP2, which gathers one ahead."""
    tensor_parallel_degree: int = 1
    """Ranks over which each matrix is split, and the sequence between matrices: best the GPUs of one host. It must divide the query heads, and divide the key and value heads or be a multiple of them."""
    disable_loss_parallel: bool = False
    """tensor parallelism: gather the logits, rather than compute the loss from each rank's part of the vocabulary."""
    enable_async_tensor_parallel: bool = False
    """tensor parallelism: run matmuls and the communication beside them in pieces, in turns. It needs a model compiled by inductor, and GPUs joined by NVLink."""
    pipeline_parallel_degree: int = 1
    """Ranks over which the layers are split, into one or more stages on each (see pipeline_parallel_schedule)."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Names of the modules of each stage, in the order of the forward pass. By default the model is cut into stages of even cost."""
    pipeline_parallel_first_stage_less_layers: int | None = None
    """Cost of the embedding in layers, for the cut into stages. By default its FLOPs count."""
    pipeline_parallel_last_stage_less_layers: int | None = None
    """Cost of the output in layers, for the cut into stages. By default its FLOPs count."""
    pipeline_parallel_layers_per_stage: int | None = None
    """Layers in each stage: a cut that counts layers, and not their cost, and that sets the number of stages."""
    pipeline_parallel_schedule: str = "1F1B"
    """Order in which microbatches go through the stages. GPipe, 1F1B: one stage a rank. Interleaved1F1B, LoopedBFS, InterleavedZeroBubble: two or more, in a loop. ZBVZeroBubble, DualPipeV: two, in a V. InterleavedZeroBubble, ZBVZeroBubble and DualPipeV compute gradients of weights apart from those of inputs, when a rank would wait."""
    pipeline_parallel_schedule_csv: str = ""
    """File with a schedule of one's own, in place of a named one: a line for each rank, a pass in each cell, such as 0F1 for stage 0, forward, microbatch 1."""
    pipeline_parallel_microbatch_size: int = 1
    """Sequences in one microbatch of a pipeline: `training.local_batch_size` is divided into these."""
    pipeline_parallel_expert_parallel_overlap: bool = True
    """DualPipeV (and OVERLAP_F_B in a file) with expert parallelism: where a forward pass waits for rows of other ranks the backward pass of another microbatch computes, and the other way round."""
    context_parallel_degree: int = 1
    """Ranks over which each sequence is split."""
    context_parallel_method: Literal["allgather", "ring", "ulysses"] = "allgather"
    """How ranks attend to each other's tokens. allgather: each gathers all keys and values. ring: keys and values go around, or are gathered, and are attended to part by part (see context_parallel_rotate_method). ulysses: an all-to-all gives each rank all tokens of some of the heads, so that the degree must divide the number of key and value heads."""
    context_parallel_load_balancer: Literal["headtail", "ptrr"] | None = "headtail"
    """How a sequence is cut. headtail: each rank gets one part from the front and its mirror image from the back, so that causal attention is equal work for all; none: one contiguous part each. ulysses needs no balance, and takes contiguous parts."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """ring: gather keys and values once (allgather), or pass them on from rank to rank while attending (alltoall), which takes less memory."""
    expert_parallel_degree: int = 1
    """Ranks over which the experts of a mixture are spread. It borrows the ranks of sharding and of context parallelism, and of tensor parallelism unless expert_tensor_parallel_degree cuts experts over those. It must divide the product of their degrees, and the number of experts."""
    expert_tensor_parallel_degree: int = 1
    """Ranks over which each expert is cut: 1, or as many as tensor_parallel_degree."""
    expert_parallel_comm_backend: str = "standard"
    """How tokens travel to experts. standard: the all-to-all of the process group's backend. deepep: the kernels of the package deep_ep, which must be installed. Or one that the module of experimental.custom_import registers."""


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


GraphPasses = Literal["none", "auto_bucketing", "transformer_block_bucketing"]

_AUTO_BUCKETING = "_autobucketing"
"""Ends the names of backends that stand for graph_passes = auto_bucketing."""


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile, by default block by block."""

    enable: bool = False
    """Compile the components below."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """What to compile: each block of the model, the loss."""
    backend: str = "inductor"
    """Compiler backend. aot_eager_autobucketing and inductor_autobucketing stand for these two with graph_passes = auto_bucketing."""
    model_backend_override: str | None = None
    """Backend of the model alone, where the loss is to have another (a name of torchtitan's)."""
    scope: Literal["block", "model"] = "block"
    """What makes one graph. block: each block, which compiles fast. model: all of the model, so that weights of the next block are gathered while one computes; it needs simple_fsdp."""
    graph_passes: GraphPasses = "none"
    """simple_fsdp: which collectives of weights become one, and when they start. auto_bucketing: by torch's estimates of times. transformer_block_bucketing: those of a block, while its neighbour computes."""

    def get_backend(self) -> tuple[str, GraphPasses]:
        """Return the name of torch's backend, and the graph passes, whichever setting asks for them."""
        given = self.model_backend_override or self.backend
        name = given.removesuffix(_AUTO_BUCKETING)
        return name, "auto_bucketing" if name != given else self.graph_passes

    def get_loss_backend(self) -> str:
        """Return the name of torch's backend for the loss, which has no weights to gather."""
        return self.backend.removesuffix(_AUTO_BUCKETING)


@dataclass(frozen=True)
class CommConfig:
    """Process groups and what is recorded about them."""

    init_timeout_seconds: int = 300
    """Time that a collective may take until the first steps are done, and in the first validation: compilation and set-up included."""
    train_timeout_seconds: int = 100
    """Time that a collective may take after that."""
    heartbeat_seconds: int = 5
    """Time between the signs of life of each process, by which one message names a rank that stalls or dies. 0 turns it off."""
    startup_probe_seconds: int = 0
    """Time to measure all devices and links for before training, so that slow ones are named: some 10. 0: not at all."""
    trace_buf_size: int = 20000
    """Collectives kept in the flight recorder. 0 turns it off."""
    save_traces_folder: str = "comm_traces"
    """Folder for the flight recorder's files, inside `job.dump_folder`."""
    save_traces_file_prefix: str = "rank_"
    """Beginning of the name of each of these files."""
    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """torchtitan's dry-run modes. Only default is available."""


@dataclass(frozen=True)
class MemoryEstimationConfig:
    """torchtitan's memory estimator."""

    enable: bool = False
    """torchtitan's dry run. Refused: use `job.plan`."""
    disable_fake_mode: bool = False
    """torchtitan's estimate with real tensors. Has no effect here."""


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
