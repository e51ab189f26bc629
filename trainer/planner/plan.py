"""What a run will need and how fast it should be, before there is a GPU: `--job.plan`."""

import dataclasses
from dataclasses import dataclass, field
from statistics import median

from trainer.config.schedule_actions import Action
from trainer.config.schema import JobConfig
from trainer.planner.dry_run import DryRun
from trainer.planner.hardware import GIB, GPUS, Gpu
from trainer.planner.memory import Memory
from trainer.planner.network import Transfer
from trainer.planner.pipeline_time import run_pipeline
from trainer.planner.processes import run_all
from trainer.planner.recorder import Span
from trainer.planner.streams import COMPUTE, HOST

# Outside of torch's allocator, and not measured: the CUDA context with its kernels, and NCCL's buffers for each axis of the mesh.
_CONTEXT_BYTES = int(0.7 * GIB)
_BYTES_PER_AXIS = int(0.3 * GIB)

_ALL_RANKS = 4
"""Pipelines of so many ranks are looked at rank by rank; of longer ones the first two and the last."""


@dataclass
class RankPlan:
    """One rank of the pipeline, or the one that stands for all."""

    pipeline_rank: int
    memory: Memory
    layers: str
    """Which modules it has."""
    stands_for: str = ""
    """Other ranks of the pipeline that are taken to be alike."""


@dataclass
class TransferPlan:
    """Collectives of one kind over one axis, in one step of one rank."""

    axis: str
    kind: str
    degree: int
    count: int
    bytes: int
    """In all of them."""
    seconds: float
    crosses_hosts: bool


@dataclass
class Plan:
    """The answer."""

    world_size: int
    gpu: str
    gpu_bytes: int
    ranks: list[RankPlan]
    other_bytes: int
    """On the device, but not torch's allocator's."""
    step_seconds: float
    tokens_per_second: float
    """Per device."""
    mfu: float
    """Share of the dense bf16 peak, 0 to 1, with exact causal attention and nothing recomputed."""
    flops_per_token: float
    executed_flops: float
    """FLOPs that a rank really computes in a step, recomputation included."""
    busy_seconds: dict[str, float]
    """By kind of kernel, of one rank."""
    exposed_seconds: float
    """In which a rank's compute waits for collectives."""
    bubble: float
    """Share of the pipeline's time that its ranks wait for each other."""
    transfers: list[TransferPlan]
    parameters: int
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> RankPlan:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.memory.reserved)

    @property
    def needed_bytes(self) -> int:
        """What the fullest device needs."""
        return self.worst.memory.reserved + self.other_bytes

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.needed_bytes <= self.gpu_bytes


def find_gpu(config: JobConfig) -> Gpu:
    """Return the GPU that the settings name, with the memory that they give it."""
    gpu = GPUS[config.plan.gpu]
    if config.plan.memory_gib is None:
        return gpu
    return dataclasses.replace(gpu, memory=int(config.plan.memory_gib * GIB))


def make_plan(config: JobConfig, world_size: int, *, ends_at: float | None = None) -> Plan:
    """Plan a run on `world_size` GPUs. No process group of others and no GPU is needed, nothing is started.

    ends_at: when to give up, in seconds of the monotonic clock.

    Raises:
        ValueError: settings that do not fit each other, or that cannot be planned.
        TimeoutError: it was not done by then.
    """
    gpu = find_gpu(config)
    pp = config.parallelism.pipeline_parallel_degree
    chosen = list(range(pp)) if pp <= _ALL_RANKS else [0, 1, pp - 1]
    n_batches = count_batches(config, world_size)
    runs = run_all(
        [
            {
                "config": config,
                "world_size": world_size,
                "rank": place * (world_size // pp),
                "gpu": gpu,
                "gpus_per_host": config.plan.gpus_per_host,
                "microbatches": n_batches,
            }
            for place in chosen
        ],
        ends_at=ends_at,
    )
    ranks = [RankPlan(place, run.memory, run.layers) for place, run in zip(chosen, runs, strict=True)]
    if len(chosen) < pp:
        ranks[1].stands_for = f"2 to {pp - 2}, which hold fewer microbatches"
    return _Assembly(config, gpu, world_size, runs, chosen, n_batches).build(ranks)


def count_batches(config: JobConfig, world_size: int) -> int:
    """Return the batches that each data-parallel rank adds up in a step."""
    section = config.parallelism
    others = section.tensor_parallel_degree * section.context_parallel_degree * section.pipeline_parallel_degree
    data_parallel = world_size // others
    whole = config.training.global_batch_size
    return 1 if whole < 0 else max(1, whole // (config.training.local_batch_size * data_parallel))


class _Assembly:
    """From what the ranks did to the answer."""

    def __init__(
        self, config: JobConfig, gpu: Gpu, world_size: int, runs: list[DryRun], chosen: list[int], n_batches: int
    ) -> None:
        self.config, self.gpu, self.world_size = config, gpu, world_size
        self.runs, self.chosen, self.n_batches = runs, chosen, n_batches

    def build(self, ranks: list[RankPlan]) -> Plan:
        run, training = self.runs[0], self.config.training
        seconds, bubble = self._find_seconds()
        tokens = training.local_batch_size * training.seq_len * self.n_batches * run.dp_degree / self.world_size
        flops_per_token = run.args.flops_per_token(training.seq_len, "causal")
        spans = run.spans
        busy: dict[str, float] = {}
        for span in spans:
            if not isinstance(span.work, Transfer):
                busy[span.work.kind] = busy.get(span.work.kind, 0.0) + span.times * span.seconds
        return Plan(
            world_size=self.world_size,
            gpu=self.gpu.name,
            gpu_bytes=self.gpu.memory,
            ranks=ranks,
            other_bytes=_CONTEXT_BYTES + _BYTES_PER_AXIS * len(set(run.axes.values())),
            step_seconds=seconds,
            tokens_per_second=tokens / seconds,
            mfu=tokens / seconds * flops_per_token / self.gpu.peak,
            flops_per_token=flops_per_token,
            executed_flops=sum(span.times * span.work.flops for span in spans if not isinstance(span.work, Transfer)),
            busy_seconds=busy,
            exposed_seconds=_sum_gaps(spans),
            bubble=bubble,
            transfers=_sum_transfers(run, self.config.plan.gpus_per_host),
            parameters=run.args.n_params(),
            notes=list(self._list_notes()),
        )

    def _find_seconds(self) -> tuple[float, float]:
        """Return the seconds of a step, and the share that a pipeline waits."""
        if len(self.runs) == 1 and not self.runs[0].orders:
            run = self.runs[0]
            first, last = run.batch_seconds[0], run.batch_seconds[-1]
            return first * (self.n_batches - 1) + last + run.update_seconds, 0.0
        orders = self.runs[0].orders
        known = {place: _PassTimes(run) for place, run in zip(self.chosen, self.runs, strict=True)}
        rank_of = {action.stage: rank for rank, actions in enumerate(orders) for action in actions}

        def seconds_of(action: Action) -> float:
            rank = rank_of[action.stage]
            times = known.get(rank) or known[self.chosen[1]]
            return times.get(action)

        hidden = self.config.training.seq_len * self.runs[0].args.dim * 2 // self.runs[0].parts
        hidden *= self.config.parallelism.pipeline_parallel_microbatch_size
        transfer = Transfer("send", hidden, "pp", (0, self.world_size // len(orders)))
        per_transfer = self.gpu.seconds_of(transfer, gpus_per_host=self.config.plan.gpus_per_host)
        total, bubble = run_pipeline(orders, seconds_of, transfer_seconds=per_transfer)
        tail = max(times.extra for times in known.values())
        return (total + tail) * self.n_batches + max(run.update_seconds for run in self.runs), bubble

    def _list_notes(self) -> list[str]:
        config = self.config
        notes = [self._describe_rates()]
        if config.parallelism.fsdp_collectives != "nccl":
            notes.append(
                "parallelism.fsdp_collectives: copy engines, where they can be used, are planned as nccl that slows nothing beside it"
            )
        if config.parallelism.expert_parallel_degree > 1 and not config.debug.moe_force_load_balance:
            notes.append(
                "experts: their loads are drawn anew for each layer and step, the busiest of 64 with 2.6 times the mean's. A router "
                "that is further from balance fills some ranks more"
            )
        if config.training.enable_cpu_offload:
            notes.append(
                f"CPU offload: {self.gpu.pcie_bandwidth / 1e9:.0f} GB/s over PCIe and {self.gpu.cpu_bandwidth / 1e9:.0f} GB/s of host memory for "
                "each rank's update are assumed. What is in host memory is not in the table"
            )
        if config.model.attn_mask_type == "block_causal":
            notes.append(
                "documents: attention is taken to last as long as cuDNN's over the whole sequence. Short documents spare most of that, "
                "FlexAttention is slower at the rest; how long documents are is not known here"
            )
        if not config.compile.enable:
            notes.append(
                "compile.enable = false: times are of single kernels, as long as the host keeps up with the device"
            )
        return notes

    def _describe_rates(self) -> str:
        gpu = self.gpu
        known = "measured on H200 (products, attention, memory, collectives in a host)"
        if gpu.name != "H200":
            known = f"for {gpu.name} not measured: H200's for products, attention and collectives in a host, memory's by the data sheets"
        crosses = self.world_size > self.config.plan.gpus_per_host
        between = f"; between hosts assumed: {gpu.host_bandwidth / 1e9:.0f} GB/s a GPU" if crosses else ""
        return f"rates {known}{between}. Kernels and collectives overlap where the program's streams let them; beside NCCL's, kernels take a third longer"


class _PassTimes:
    """Seconds of the passes of one rank: as in the middle of a step, and what first and last ones take on top."""

    def __init__(self, run: DryRun) -> None:
        seconds: dict[tuple[int, str], list[float]] = {}
        for action, taken in run.passes:
            seconds.setdefault((action.stage, action.kind), []).append(taken)
        self._usual = {key: median(values) for key, values in seconds.items()}
        self._by_kind: dict[str, float] = {}
        for (_, kind), value in self._usual.items():
            self._by_kind.setdefault(kind, value)
        whole = sum(taken for _, taken in run.passes)
        self.extra = max(0.0, whole - sum(self._usual[action.stage, action.kind] for action, _ in run.passes))

    def get(self, action: Action) -> float:
        """Return the seconds of a pass, of another rank's like stage, too."""
        known = self._usual.get((action.stage, action.kind))
        return self._by_kind[action.kind] if known is None else known


def _sum_gaps(spans: list[Span]) -> float:
    """Return the seconds of a step in which no kernel runs, since the next one waits for a collective."""
    total, free_from = 0.0, spans[0].begin if spans else 0.0
    for span in spans:
        if span.stream in (COMPUTE, HOST):
            total += span.times * max(0.0, span.begin - free_from)
            free_from = span.begin + span.seconds
    return total


def _sum_transfers(run: DryRun, gpus_per_host: int) -> list[TransferPlan]:
    found: dict[tuple[str, str], TransferPlan] = {}
    for span in run.spans:
        work = span.work
        if not isinstance(work, Transfer):
            continue
        axis = run.axes.get(work.group, work.group)
        key = axis, work.kind
        if key not in found:
            crosses = len({rank // gpus_per_host for rank in work.ranks}) > 1
            found[key] = TransferPlan(axis, work.kind, work.degree, 0, 0, 0.0, crosses)
        entry = found[key]
        entry.count += span.times
        entry.bytes += span.times * work.bytes
        entry.seconds += span.times * span.seconds
    return sorted(found.values(), key=lambda entry: -entry.seconds)
