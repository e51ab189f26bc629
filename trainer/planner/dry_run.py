"""Two steps of one rank of a run that is not there: the program's own parts, on fake tensors, in a fake process group."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.build_model import BuiltModel, build_model
from trainer.build_passes import build_run_passes
from trainer.components.expert_balance import build_expert_balance
from trainer.components.optimizer import Optimizers, build_optimizer
from trainer.components.passes import sum_of
from trainer.config.pipeline_layout import PipelineLayout
from trainer.config.schedule_actions import Action
from trainer.config.schema import JobConfig
from trainer.distributed import pipeline_parallel
from trainer.distributed.grad_norm import clip_grad_norm
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import materialize
from trainer.low_precision.float8_training import build_float8_training
from trainer.planner.hardware import Gpu
from trainer.planner.memory import Memory, replay
from trainer.planner.offload import offloading
from trainer.planner.pipeline_time import Interval, count_all, split_pairs
from trainer.planner.recorder import Recorder, Span
from trainer.planner.settings import compile_by, find_copy_engine_groups, settle_accumulation, settle_float8
from trainer.planner.shortcuts import shortcuts_taken
from trainer.planner.stand_ins import installed

_DEVICE = torch.device("cpu")
_MORE_MICROBATCHES = 8
"""Beyond those that fill a pipeline: from 6 on nothing changes but counts (671B in 16 ranks by DualPipeV)."""


@dataclass
class DryRun:
    """What one rank did in two steps, or in a pipeline in one. The first makes the optimizer's states. Plain data."""

    args: Any
    """Sizes of the network."""
    dp_degree: int
    parts: int
    """Ranks among which one microbatch's hidden states are divided: of tensor and of context parallelism."""
    memory: Memory
    spans: list[Span]
    """What kept the streams of the device busy in the second step, and how often in a whole one."""
    passes: list[tuple[Action, float]]
    """In a pipeline: seconds of each forward and backward pass of the second step."""
    batch_seconds: list[float]
    """Of the second step: forward and backward of each batch that is accumulated."""
    update_seconds: float
    """Clipping and the optimizer."""
    orders: list[list[Action]]
    """In a pipeline: the passes of each of its ranks, of all microbatches."""
    layers: str
    """Which blocks the rank has."""
    axes: dict[str, str]
    """Names of process groups, and over which axis of the mesh each goes."""


def run_dry(
    config: JobConfig, *, world_size: int, rank: int, gpu: Gpu, gpus_per_host: int, microbatches: int
) -> DryRun:
    """Take the steps of `rank`, once in a process: torch remembers meshes of a process group that is gone.

    No device and no other process is needed. microbatches: of gradient accumulation. Two at most are run: the first, and the last,
    which reduces gradients.
    """
    recorder = Recorder(lambda work: gpu.seconds_of(work, gpus_per_host=gpus_per_host))
    with _fake_process_group(rank, world_size), shortcuts_taken(recorder):
        dims = ParallelDims.from_config(config.parallelism, world_size)
        dims.build_mesh(_DEVICE.type)
        dims.stage_group()  # for float8's amaxes: a mesh is cut up by real tensors
        recorder.copy_engine_groups = find_copy_engine_groups(config.parallelism, dims, gpus_per_host)
        config = dataclasses.replace(
            config,
            quantize=settle_float8(config.quantize, gpu),
            compile=compile_by(recorder, config.compile),
            parallelism=dataclasses.replace(config.parallelism, fsdp_collectives="nccl"),
        )
        built = build_model(config, dims)
        parallelism = settle_accumulation(config.parallelism, config.training, built.model, gpu)
        config = dataclasses.replace(config, parallelism=parallelism)
        step = _Step(config, dims, built, recorder)
        offload = offloading(recorder) if step.is_offloaded else contextlib.nullcontext()
        with recorder.recording(), installed(recorder, is_balanced=config.debug.moe_force_load_balance), offload:
            step.prepare()
            if built.stages:
                with step.updating():
                    step.optimizers.state_dict()  # makes the states: a step of a long pipeline would take as long as all else
            else:
                step.take(1)
            first_change, first_span = len(recorder.changes), len(recorder.spans)
            step.intervals.clear()
            step.take(min(microbatches, 2))
            _name_roles(built.model, step.optimizers, recorder)
            changes, spans = list(recorder.changes), recorder.spans[first_span:]
        count_all(spans, step.looked_at, step.list_actions())
        for span in recorder.spans[first_span : step.first_batch_end]:
            span.times *= max(1, microbatches - 1)
        return DryRun(
            args=built.args,
            dp_degree=dims.dp_degree,
            parts=dims.tp * dims.cp,
            memory=replay(changes, first=first_change),
            spans=spans,
            passes=split_pairs(step.intervals, spans),
            batch_seconds=step.batch_seconds,
            update_seconds=step.update_seconds,
            orders=step.list_orders(),
            layers=_name_layers(built),
            axes=_name_groups(dims),
        )


class _Step:
    """The parts of a run, and `Trainer.train_step` without what costs the device nothing."""

    def __init__(self, config: JobConfig, dims: ParallelDims, built: BuiltModel, recorder: Recorder) -> None:
        self.config, self.dims, self.built, self.recorder = config, dims, built, recorder
        self.intervals: list[Interval] = []
        self.looked_at: list[Action] = []
        self.batch_seconds: list[float] = []
        self.first_batch_end = 0
        """Number of the spans when the first of the batches that are accumulated is done."""
        self.update_seconds = 0.0

    @property
    def is_offloaded(self) -> bool:
        """Whether parameters, gradients and the optimizer's states are in host memory."""
        return self.config.training.enable_cpu_offload

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Do what has to do with these where they are."""
        return self.recorder.on_host() if self.is_offloaded else contextlib.nullcontext()

    def prepare(self) -> None:
        """Give the model memory, and build what trains it."""
        config, dims = self.config, self.dims
        model = self.built.model
        with self.updating():
            materialize(model, _DEVICE, torch.device("meta"))
        materialize(model, _DEVICE, _DEVICE)  # the buffers
        model.init_buffers(_DEVICE)  # type: ignore[operator]
        model.train()
        self.float8 = build_float8_training(
            model, converters=config.model.converters, quantize=config.quantize, dims=dims, device=_DEVICE
        )
        self.runner = build_run_passes(config, self.built, dims=dims, device=_DEVICE)
        self.optimizers: Optimizers = build_optimizer(model, section=config.optimizer, all_names=self.built.names)
        self.balance = build_expert_balance(
            model,
            args=self.built.args,
            dims=dims,
            device=_DEVICE,
            force_load_balance=config.debug.moe_force_load_balance,
        )

    def take(self, n_batches: int) -> None:
        """Take one step."""
        recorder, training = self.recorder, self.config.training
        recorder.step += 1
        recorder.phase = "forward"
        self.optimizers.zero_grad()
        self.float8.begin_step(1, is_logged=False)
        batches = [self._make_batch() for _ in range(n_batches)]
        valid_tokens = sum_of([self.runner.count_labels(batch) for batch in batches])
        losses = []
        stream = recorder.streams.compute
        self.batch_seconds = []
        with self._timing_passes():
            for place, batch in enumerate(batches):
                begin = stream.clock
                losses.append(self.runner.forward_backward(batch, valid_tokens, is_last=place == n_batches - 1))
                self.batch_seconds.append(stream.clock - begin)
                if place == 0:
                    self.first_batch_end = len(recorder.spans)
        recorder.phase = "update"
        begin = stream.clock
        sum_of(losses)
        pp_mesh = self.dims.mesh("pp") if self.dims.pp > 1 else None
        with self.updating():
            clip_grad_norm(self.built.model.parameters(), training.max_norm, pp_mesh=pp_mesh)
        self.balance.update(torch.zeros((), device=_DEVICE))
        self.float8.before_update()
        with self.updating():
            self.optimizers.step()
        self.float8.after_update()
        self.update_seconds = stream.clock - begin

    def list_orders(self) -> list[list[Action]]:
        """Return the passes of each rank of the pipeline, of all microbatches of a batch."""
        return [[action for action in of_rank if action.kind in "FBIW"] for of_rank in self._list_all_actions()]

    def list_actions(self) -> Sequence[Action]:
        """Return what this rank of the pipeline does with all microbatches of a batch, transfers too."""
        pipeline = self.runner.pipeline
        return [] if pipeline is None else self._list_all_actions()[pipeline.group.rank()]

    def _list_all_actions(self) -> Sequence[Sequence[Action]]:
        pipeline = self.runner.pipeline
        if pipeline is None:
            return []
        return pipeline._get_timetable(_count_pipeline_microbatches(self.config), forward_only=False).actions

    def _make_batch(self) -> dict[str, Tensor]:
        training = self.config.training
        rows = training.local_batch_size
        if self.runner.pipeline is not None:
            size = self.config.parallelism.pipeline_parallel_microbatch_size
            rows = size * _choose_microbatches(self.runner.pipeline.layout, rows // size)
        shape = rows, training.seq_len
        documents = ("positions",) if self.config.model.attn_mask_type == "block_causal" else ()
        names = ("tokens", "labels", *documents)
        return {name: torch.zeros(shape, dtype=torch.int64, device=_DEVICE) for name in names}

    @contextlib.contextmanager
    def _timing_passes(self) -> Iterator[None]:
        """Note how long each pass of a pipeline takes."""
        carry_out = pipeline_parallel._Pass._carry_out
        stream = self.recorder.streams.compute

        def timed(self_: Any, action: Action, final: bool) -> None:
            begin = stream.clock
            self.looked_at.append(action)
            with self.recorder.during(action):
                carry_out(self_, action, final)
            if action.kind in "FBIW":
                self.intervals.append(Interval(action, begin, stream.clock))

        with mock.patch.object(pipeline_parallel._Pass, "_carry_out", timed):
            yield


def _count_pipeline_microbatches(config: JobConfig) -> int:
    return config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size


def _choose_microbatches(layout: PipelineLayout, given: int) -> int:
    """Return how many microbatches show what the memory's peak is: where a schedule goes forward and backward in turns, as many as
    fill the pipeline and some more.
    """
    if layout.schedule.name in ("GPipe", "LoopedBFS") or layout.order is not None:
        return given
    if layout.schedule.style == "single":
        return min(given, layout.n_ranks + 2)
    if layout.schedule.style == "v":
        n_stages = len(layout.stages)  # as many microbatches are on the way, before the first one is done
        return min(given, n_stages + min(n_stages, _MORE_MICROBATCHES))
    return min(given, 2 * layout.n_ranks)


@contextlib.contextmanager
def _fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """One rank of many, whose collectives carry nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _name_roles(model: nn.Module, optimizers: Optimizers, recorder: Recorder) -> None:
    """Say of memory that lasts what it holds."""

    def note(tensor: Any, role: str) -> None:
        if isinstance(tensor, Tensor):
            allocation = recorder.find(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
            if allocation is not None:
                allocation.role = role

    for parameter in model.parameters():
        note(parameter, "parameters")
        note(parameter.grad, "gradients")
    for buffer in model.buffers():
        note(buffer, "parameters")
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                note(value, "optimizer")


def _name_layers(built: BuiltModel) -> str:
    """Return which modules of the network the stages here have, as numbers of layers and names."""
    parts = [stage.module for stage in built.stages] or [built.model]
    return "; ".join(", ".join(_list_children(part)) for part in parts)


def _list_children(part: nn.Module) -> list[str]:
    names = []
    for name, child in part.named_children():
        if isinstance(child, nn.ModuleDict):
            numbers = list(child)
            names.append(f"{name} {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{name} {' '.join(numbers)}")
        elif next(child.parameters(), None) is not None:
            names.append(name)
    return names


def _name_groups(dims: ParallelDims) -> dict[str, str]:
    names = ("pp", "dp_replicate", "fsdp", "tp", "cp", "efsdp", "ep", "etp", "dp", "loss", "stage", "world")
    axes: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(KeyError):
            axes.setdefault(dims.mesh(name).get_group().group_name, name)
    return axes
