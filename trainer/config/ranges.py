"""Ranges of the numeric settings. A test proves that each numeric field of the schema has one."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config.errors import Problem
from trainer.config.fields import get_value
from trainer.config.schema import JobConfig


@dataclass(frozen=True)
class Range:
    """Allowed values: `low` to `high`, ends included unless said otherwise, and one value with a meaning of its own."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    """Excluded lower end."""
    below: float | None = None
    """Excluded upper end."""
    special: float | None = None
    meaning: str = ""
    """What `special` stands for."""

    def __contains__(self, value: float) -> bool:
        if self.special is not None and value == self.special:
            return True
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        text = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return text if self.special is None else f"{text}, or {self.special} ({self.meaning})"


_COUNT = Range(low=1)
_COUNT_OR_NONE = Range(low=0)
_FACTOR = Range(low=0)
_SHARE = Range(low=0, high=1)
_BETA = Range(low=0, below=1)

RANGES: dict[str, Range] = {
    "profiling.profile_freq": _COUNT,
    "profiling.profiler_active": _COUNT,
    "profiling.profiler_warmup": _COUNT_OR_NONE,
    "metrics.log_freq": _COUNT,
    "metrics.straggler_threshold": Range(above=1, special=0, meaning="compare nothing"),
    "model.mtp_depth": _COUNT_OR_NONE,
    "model.mtp_weight": _FACTOR,
    "model.balance_loss_alpha": _FACTOR,
    "model.bias_update_speed": _FACTOR,
    "optimizer.lr": Range(above=0),
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": Range(above=0),
    "optimizer.weight_decay": _FACTOR,
    "optimizer.muon.lr": Range(above=0),
    "optimizer.muon.momentum": _BETA,
    "optimizer.muon.ns_steps": Range(low=1, high=99),  # torch.optim.Muon refuses 100 and more
    "optimizer.muon.weight_decay": _FACTOR,
    "lr_scheduler.warmup_steps": _COUNT_OR_NONE,
    "lr_scheduler.total_steps": _COUNT,
    "lr_scheduler.decay_ratio": _SHARE,
    "lr_scheduler.min_lr_factor": _SHARE,
    "training.local_batch_size": _COUNT,
    "training.global_batch_size": Range(low=1, special=-1, meaning="no accumulation"),
    "training.seq_len": _COUNT,
    "training.max_norm": _FACTOR,
    "training.steps": _COUNT,
    "training.gc_freq": _COUNT_OR_NONE,
    "training.loss_chunk_size": _COUNT_OR_NONE,
    "training.nonfinite_max_skips": _COUNT_OR_NONE,
    "training.spike_window": Range(low=16, high=10000),
    "training.spike_threshold": Range(above=0),
    "training.dataloader.num_workers": _COUNT_OR_NONE,
    "training.dataloader.prefetch_factor": _COUNT,
    "data.prepare_workers": _COUNT_OR_NONE,
    "data.max_bad_rows": _COUNT_OR_NONE,
    "data.read_retries": _COUNT_OR_NONE,
    "data.read_timeout_seconds": _COUNT_OR_NONE,
    "parallelism.data_parallel_replicate_degree": _COUNT,
    "parallelism.data_parallel_shard_degree": Range(low=1, special=-1, meaning="what the other degrees leave"),
    "parallelism.fsdp_prefetch": _COUNT_OR_NONE,
    "parallelism.tensor_parallel_degree": _COUNT,
    "parallelism.pipeline_parallel_degree": _COUNT,
    "parallelism.pipeline_parallel_first_stage_less_layers": _COUNT_OR_NONE,
    "parallelism.pipeline_parallel_last_stage_less_layers": _COUNT_OR_NONE,
    "parallelism.pipeline_parallel_layers_per_stage": _COUNT,
    "parallelism.pipeline_parallel_microbatch_size": _COUNT,
    "parallelism.context_parallel_degree": _COUNT,
    "parallelism.expert_parallel_degree": _COUNT,
    "parallelism.expert_tensor_parallel_degree": _COUNT,
    "checkpoint.interval": _COUNT,
    "checkpoint.keep_latest_k": _COUNT_OR_NONE,
    "checkpoint.max_failed_saves": _COUNT_OR_NONE,
    "checkpoint.load_step": Range(low=0, special=-1, meaning="the newest"),
    "activation_checkpoint.memory_budget": _SHARE,
    "quantize.linear.float8.amax_history_len": _COUNT,
    "quantize.linear.float8.keep_first_blocks": _COUNT_OR_NONE,
    "quantize.linear.float8.keep_last_blocks": _COUNT_OR_NONE,
    "quantize.linear.float8.measure_freq": _COUNT_OR_NONE,
    "quantize.grouped_mm.float8.measure_freq": _COUNT_OR_NONE,
    "quantize.linear.float8.margin": Range(low=0, high=15),
    "quantize.linear.float8.delayed_warmup_steps": _COUNT,
    "quantize.linear.float8.static_scale_input": Range(above=0),
    "quantize.linear.float8.static_scale_weight": Range(above=0),
    "quantize.linear.float8.static_scale_grad_output": Range(above=0),
    "comm.init_timeout_seconds": _COUNT,
    "comm.train_timeout_seconds": _COUNT,
    "comm.heartbeat_seconds": _COUNT_OR_NONE,
    "comm.startup_probe_seconds": _COUNT_OR_NONE,
    "comm.trace_buf_size": _COUNT_OR_NONE,
    "plan.memory_gib": Range(above=0),
    "plan.world_size": _COUNT,
    "plan.gpus_per_host": _COUNT,
    "plan.search_seconds": _COUNT,
    "plan.results": _COUNT,
    "fault_tolerance.process_group_timeout_ms": _COUNT,
    "fault_tolerance.replica_id": _COUNT_OR_NONE,
    "fault_tolerance.group_size": _COUNT_OR_NONE,
    "fault_tolerance.min_replica_size": _COUNT_OR_NONE,
    "fault_tolerance.sync_steps": _COUNT,
    "fault_tolerance.fragment_sync_delay": _COUNT_OR_NONE,
    "fault_tolerance.fragment_update_alpha": _SHARE,
    "fault_tolerance.num_fragments": _COUNT,
    "validation.local_batch_size": _COUNT,
    "validation.seq_len": _COUNT,
    "validation.freq": _COUNT,
    "validation.steps": Range(low=1, special=-1, meaning="the whole data set, once"),
    "validation.dataloader.num_workers": _COUNT_OR_NONE,
    "validation.dataloader.prefetch_factor": _COUNT,
    "debug.seed": Range(low=0, below=2**63),
}

ITEM_RANGES: dict[str, dict[str, Range]] = {
    "optimizer.param_groups": {"lr_scale": _FACTOR, "weight_decay": _FACTOR},
    "data.sources": {"weight": Range(above=0)},
}
"""Ranges inside lists of tables: key of the list, then field of a table."""


def find_range_problems(config: JobConfig) -> Iterator[Problem]:
    """Numbers outside their range. Settings that are unset are in order."""
    for key, allowed in RANGES.items():
        value = get_value(config, key)
        if value is not None and value not in allowed:
            yield Problem(f"{key} = {value}: must be {allowed}.", (key,))
    for key, fields in ITEM_RANGES.items():
        for index, item in enumerate(get_value(config, key)):
            for name, allowed in fields.items():
                value = getattr(item, name)
                if value is not None and value not in allowed:
                    yield Problem(f"{key}, item {index + 1}: {name} = {value}: must be {allowed}.", (key,))
