"""Pipeline parallelism: each rank has a part of the layers, and microbatches go from rank to rank.

Which pass comes when is taken from the schedules of torch.distributed.pipelining; the passes are run here. torch's own
runtime keeps a receive buffer for each microbatch of each stage for good, has its shapes fixed once, cannot evaluate
every schedule, cuts batches itself (not possible with a BlockMask), and drives FSDP in one way only.
"""

import functools
import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.profiler import record_function

from models.common.output import LossFunction
from trainer.config.pipeline_layout import PipelineLayout
from trainer.config.schedule_actions import (
    Action,
    Timetable,
    build_forward_order,
    build_timetable,
    join_backward,
)
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed import transfers
from trainer.distributed.fsdp import Accumulation
from trainer.distributed.pipeline_orders import build_order, find_overlapping
from trainer.distributed.pipeline_stages import Stage
from trainer.distributed.stage_copies import StageCopies
from trainer.distributed.turns import TURNS
from trainer.low_precision.float8_layer import list_state

logger = logging.getLogger(__name__)

Microbatch = Mapping[str, Any]
"""`tokens` and `labels`, (batch, seq) both, and under their names what else the forward of every stage takes."""


@dataclass(frozen=True)
class Activations:
    """What goes from stage to stage: hidden states (batch, seq / seq_parts, dim)."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    seq_parts: int = 1
    """Ranks among which a microbatch's hidden states are divided: the tp degree, for its sequence parallelism."""

    def get_shape(self, microbatch: Microbatch) -> tuple[int, int, int]:
        """Return the shape of those of one microbatch."""
        batch, seq = microbatch["tokens"].shape
        return batch, seq // self.seq_parts, self.dim

    def allocate(self, microbatch: Microbatch) -> Tensor:
        """Return room for those of one microbatch."""
        return torch.empty(self.get_shape(microbatch), dtype=self.dtype, device=self.device)

    def check(self, tensor: Tensor, microbatch: Microbatch) -> None:
        """Check what is to be sent: the receiver, which has made room, would hang or read garbage.

        Raises:
            ValueError: it is not what the receiver expects.
        """
        if tensor.shape != self.get_shape(microbatch) or tensor.dtype != self.dtype:
            raise ValueError(
                f"a stage of the pipeline gave hidden states {tuple(tensor.shape)} in {tensor.dtype}, but the next expects "
                f"{self.get_shape(microbatch)} in {self.dtype}: between blocks a model must keep to (batch, seq, dim) and to "
                "training.mixed_precision_param"
            )


@dataclass(frozen=True)
class GradientPolicy:
    """What data parallelism does with weights and gradients between the microbatches of a step."""

    accumulation: Accumulation
    """sharded: reduce the gradients of each microbatch. unsharded: add them up whole, and reduce them in the last
    backward pass."""
    stays_gathered: bool
    """Whether weights are gathered once a step, and not for each pass of each microbatch."""

    def prepare(self, module: nn.Module, *, reduces: bool, final: bool) -> None:
        """Tell FSDP or DDP about the coming backward pass: whether it may reduce, and whether it is the step's last."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(final or (reduces and self.accumulation == "sharded"))
            module.set_requires_all_reduce(final)
            module.set_reshard_after_backward(final or not self.stays_gathered)
            # Else FSDP2 keeps the order of units of past microbatches, by which the first unit's backward pass gathers
            # the last unit ahead: again, at the end of a step.
            module.set_is_last_backward(final or self.stays_gathered)

    def finish(self, module: nn.Module) -> None:
        """Have FSDP or DDP take up gradients that came about outside of its hooks, as `prepare` said."""
        if isinstance(module, FSDPModule):
            # What it would do at the end of `Tensor.backward()`.
            module._get_fsdp_state()._root_post_backward_final_callback()


def build_pipeline(
    stages: Sequence[Stage],
    *,
    group: dist.ProcessGroup,
    activations: Activations,
    parallelism: ParallelismConfig,
    accumulation: Accumulation,
    splits_backward: bool,
) -> "Pipeline":
    """Return what runs the stages of this rank together with those of the other ranks of `group`.

    stages: parallelized, in order. accumulation: see `trainer.distributed.fsdp.choose_accumulation`. splits_backward:
    whether a schedule may compute gradients of inputs ahead of those of weights. Where it may not, it computes both at
    once. It should not where blocks are compiled, since the whole backward pass of such a block would run for either,
    if it did not refuse; nor where they recompute activations, since they would do so once for each weight, or refuse.

    Raises:
        ValueError: weights are not to stay gathered, but are needed for a second part of the backward pass.
    """
    layout = stages[0].layout
    splits_backward = splits_backward and layout.schedule.splits_backward
    stays_gathered = parallelism.fsdp_reshard_after_forward != "always"
    if splits_backward and not stays_gathered:
        raise ValueError(
            f"parallelism.fsdp_reshard_after_forward = 'always' frees weights that "
            f"parallelism.pipeline_parallel_schedule = {layout.schedule.name} needs for gradients that it computes "
            "later. Use 'default', or another schedule"
        )
    return Pipeline(
        stages,
        group=group,
        activations=activations,
        policy=GradientPolicy(accumulation, stays_gathered),
        splits_backward=splits_backward,
        overlaps=parallelism.pipeline_parallel_expert_parallel_overlap and parallelism.expert_parallel_degree > 1,
    )


class Pipeline:
    """The stages of this rank, and what it does when. All ranks call the same methods with the same microbatches."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        group: dist.ProcessGroup,
        activations: Activations,
        policy: GradientPolicy,
        splits_backward: bool,
        overlaps: bool,
    ) -> None:
        """See `build_pipeline`."""
        self.stages = {stage.index: stage for stage in stages}
        self.layout = stages[0].layout
        self.group = group
        self.activations = activations
        self.policy = policy
        self.splits_backward = splits_backward
        self.overlaps = overlaps
        self._copies = StageCopies(stages, group=group)
        self._begins_step = True
        self._timetables: dict[tuple[int, bool], Timetable] = {}

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is here."""
        return any(stage.is_last for stage in self.stages.values())

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        *,
        loss_fn: LossFunction,
        valid_tokens: Tensor,
        is_last: bool = True,
    ) -> Tensor:
        """Add the gradients of the microbatches' loss, divided by `valid_tokens`. Return this divided loss, summed,
        0-dim; it is 0 on ranks without the last stage, so that a sum over the ranks of the pipeline gives it to all.

        valid_tokens: 0-dim, the labels of the whole step over all ranks. is_last: whether the optimizer comes next;
        gradients of several calls add up before.

        Raises:
            ValueError: the schedule cannot run with so many microbatches.
        """
        timetable = self._get_timetable(len(microbatches), forward_only=False)
        if self._begins_step:
            self._copies.refresh()
        self._begins_step = is_last
        loss = _Pass(self, microbatches, loss_fn, valid_tokens, reduces=is_last).run(
            timetable.actions[self.group.rank()], timetable.pairs
        )
        if is_last:
            self._copies.hand_over_gradients()
        return loss

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], *, loss_fn: LossFunction) -> Tensor:
        """Return the loss, summed over the microbatches and divided by nothing: 0 on ranks without the last stage.

        Any number of microbatches of any length will do, whatever the schedule. As after any forward pass without a
        backward pass, weights may stay gathered: see `trainer.distributed.fsdp.reshard`.
        """
        timetable = self._get_timetable(len(microbatches), forward_only=True)
        return _Pass(self, microbatches, loss_fn).run(timetable.actions[self.group.rank()])

    def _get_timetable(self, n_microbatches: int, *, forward_only: bool) -> Timetable:
        key = n_microbatches, forward_only
        if key not in self._timetables:
            pairs: frozenset[Action] = frozenset()
            if forward_only:
                order = build_forward_order(self.layout.ranks, n_microbatches)
            else:
                order = build_order(self.layout, n_microbatches)
                if not self.splits_backward:
                    order = join_backward(order)
                elif self._copies.exist:
                    # The last stage uses a weight in several places (`_check_uses`): the output's, for each depth of its loss.
                    order = join_backward(order, [len(self.layout.stages) - 1])
                pairs = find_overlapping(self.layout, n_microbatches) if self.overlaps else frozenset()
            self._timetables[key] = build_timetable(order, pairs)
            if not forward_only:
                logger.info(
                    "pipeline: %s, %d stages on %d ranks, %d microbatches, %.0f %% of the time waiting",
                    self.layout.schedule.name,
                    len(self.layout.stages),
                    self.layout.n_ranks,
                    n_microbatches,
                    100 * self._timetables[key].bubble,
                )
        return self._timetables[key]


class _Saved(NamedTuple):
    """What the backward pass of one stage and microbatch starts from."""

    input: Tensor | None
    output: Tensor | GradientEdge | None
    """Where the pass begins: the place in the graph is enough, unless it is taken in two parts, which torch wants tensors for."""
    gradient: Tensor | None = None
    """Of the output; None for a loss."""
    groups: list[dict[str, Any]] | None = None
    """Weights, and where in the graph their gradients go on from after those of inputs."""
    edge: GradientEdge | None = None
    """What keeps that graph alive: places in it that are `autograd.Function`s would not."""


def _check_uses(groups: Sequence[Mapping[str, Any]], layout: PipelineLayout) -> None:
    """Check that each weight is used in one place: from several, torch's second part of a backward pass meets parts of
    the graph that are gone, or counts them twice (2.11).

    Raises:
        ValueError: a weight is used in several places.
    """
    if any(len(group["intermediates"]) > 1 for group in groups):
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule = {layout.schedule.name} computes gradients of weights apart from "
            "those of inputs, which is not possible for a weight that a stage uses in several places. Take a schedule "
            "that does not: 1F1B or Interleaved1F1B"
        )


class _Pass:
    """The microbatches' way through the stages of this rank, once. Tensors in here go by kind of pass, stage and
    microbatch."""

    def __init__(
        self,
        pipeline: Pipeline,
        microbatches: Sequence[Microbatch],
        loss_fn: LossFunction,
        divisor: Tensor | None = None,
        *,
        reduces: bool = False,
    ) -> None:
        """divisor: of the loss, in training. reduces: whether the last backward pass is to reduce the gradients."""
        self.stages, self.layout, self.group = pipeline.stages, pipeline.layout, pipeline.group
        self.activations, self.policy = pipeline.activations, pipeline.policy
        self.microbatches = microbatches
        self.splits_backward = pipeline.splits_backward
        self.loss_fn = loss_fn
        self.divisor = divisor
        self.reduces = reduces
        self.trains = divisor is not None
        self.loss = torch.zeros((), dtype=torch.float32, device=self.activations.device)
        self._recorded = {index: tuple(list_state(stage.module)) for index, stage in self.stages.items()}
        self._saved: dict[tuple[int, int], _Saved] = {}
        self._arrived: dict[tuple[str, int, int], tuple[Tensor, dist.Work | None]] = {}
        self._departing: dict[tuple[str, int, int], Tensor] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def run(self, actions: Sequence[Action], pairs: Container[Action] = ()) -> Tensor:
        """Carry out the actions, and return the loss. pairs: forward passes to run at once with the pass that follows them."""
        last_backward = {action.stage: position for position, action in enumerate(actions) if action.kind in ("B", "W")}
        for stage in self.stages.values():
            stage.module.training = self.trains  # its children have that of the model
        steps = [
            functools.partial(self._carry_out, action, self.reduces and last_backward.get(action.stage) == position)
            for position, action in enumerate(actions)
        ]
        upcoming = iter(zip(actions, steps, strict=True))
        for action, step in upcoming:
            if action in pairs:
                _, beside = next(upcoming)
                TURNS.run(step, beside, self.activations.device)
            else:
                step()
        for work, tensor in self._sending:
            transfers.send(work, tensor, self.group)
        undone = [*self._saved, *self._arrived, *self._departing]
        assert not undone, f"the schedule left something undone: {undone}"
        return self.loss

    def _carry_out(self, action: Action, final: bool) -> None:
        """final: whether it is the last to make gradients of its stage's weights, and these are to be reduced."""
        try:
            # A compiled graph keeps for backward what its backward pass writes to. That of another microbatch may come between, which
            # autograd refuses for a tensor that gradients depend on: but what float8 layers record is none.
            recorded = self._recorded[action.stage] if action.kind in ("B", "I", "W") else ()
            with record_function(f"pipeline {action}"), torch.autograd._unsafe_preserve_version_counter(recorded):
                self._run_action(action, final)
        except Exception as error:
            error.add_note(f"in {action} of pipeline rank {self.group.rank()} ({self.layout.schedule.name})")
            raise

    def _run_action(self, action: Action, final: bool) -> None:
        stage, microbatch = self.stages[action.stage], action.microbatch
        match action.kind:
            case "F":
                self._forward(stage, microbatch)
            case "B":
                self._backward(stage, microbatch, final)
            case "I":
                self._backward_input(stage, microbatch)
            case "W":
                self._backward_weight(stage, microbatch, final)
            case "SEND_F" | "SEND_B":
                self._send(action)
            case "RECV_F" | "RECV_B":
                self._receive(action)
            case _:
                raise AssertionError(f"{action} is no action")

    def _forward(self, stage: Stage, microbatch: int) -> None:
        batch = dict(self.microbatches[microbatch])
        tokens, labels = batch.pop("tokens"), batch.pop("labels")
        inputs = tokens if stage.is_first else self._take("F", stage.index, microbatch).requires_grad_(self.trains)
        if stage.is_last:
            batch |= {"labels": labels, "loss_fn": self.loss_fn}
        elif self.divisor is not None and hasattr(stage.module, "loss_gradient"):
            stage.module.loss_gradient = self.divisor.reciprocal()
        output = stage.module(inputs, **batch)
        if stage.is_last:
            output = output if self.divisor is None else output / self.divisor
            self.loss += output.detach()
        else:
            self._pass_on("F", stage.index, microbatch, output.detach())
        if self.trains:
            # The tensor itself is the next stage's business: in the graph nothing needs it.
            begins = output if stage.is_last or self.splits_backward else get_gradient_edge(output)
            self._saved[stage.index, microbatch] = _Saved(inputs, begins)

    def _backward(self, stage: Stage, microbatch: int, final: bool) -> None:
        saved = self._saved.pop((stage.index, microbatch))
        assert saved.output is not None, "no part of it came before"
        gradient = self._take_gradient(stage, microbatch)
        self.policy.prepare(stage.module, reduces=True, final=final)
        torch.autograd.backward(saved.output, gradient)
        assert saved.input is not None, "no part of it came before"
        self._pass_back(stage, microbatch, saved.input.grad)

    def _backward_input(self, stage: Stage, microbatch: int) -> None:
        saved = self._saved[stage.index, microbatch]
        assert saved.input is not None, "no part of it came before"
        assert isinstance(saved.output, Tensor), "kept for this"
        gradient = self._take_gradient(stage, microbatch)
        after = saved._replace(gradient=gradient)
        if not stage.is_first:
            edge = get_gradient_edge(saved.output)
            self.policy.prepare(stage.module, reduces=False, final=False)
            # The weights that were used: FSDP has the gathered ones as parameters for as long as they stay gathered.
            (of_input, *_), groups = stage_backward_input(
                [saved.output],
                None if gradient is None else [gradient],
                [saved.input],
                stage.module.parameters(),
            )
            _check_uses(groups, self.layout)
            self._pass_back(stage, microbatch, of_input)
            # The gradients of weights need nothing else: hidden states do not wait for them.
            after = _Saved(None, None, groups=groups, edge=edge)
        self._saved[stage.index, microbatch] = after

    def _backward_weight(self, stage: Stage, microbatch: int, final: bool) -> None:
        saved = self._saved.pop((stage.index, microbatch))
        if stage.is_first:
            # Nothing went ahead: tokens have no gradient.
            assert saved.output is not None, "nothing went ahead"
            self.policy.prepare(stage.module, reduces=True, final=final)
            torch.autograd.backward(saved.output, saved.gradient)
            return
        assert saved.groups is not None, "its first part came before"
        # One weight after the other: the reduction must wait for all, though some set off the hooks that do it.
        self.policy.prepare(stage.module, reduces=False, final=False)
        stage_backward_weight(stage.module.parameters(), saved.groups)
        self.policy.prepare(stage.module, reduces=True, final=final)
        self.policy.finish(stage.module)

    def _take_gradient(self, stage: Stage, microbatch: int) -> Tensor | None:
        return None if stage.is_last else self._take("B", stage.index, microbatch)

    def _pass_back(self, stage: Stage, microbatch: int, gradient: Tensor | None) -> None:
        if not stage.is_first:
            assert gradient is not None, "hidden states have a gradient"
            self._pass_on("B", stage.index, microbatch, gradient)

    # --- between stages ---

    def _pass_on(self, kind: str, stage: int, microbatch: int, tensor: Tensor) -> None:
        """Hand a tensor to the next stage (F) or to the one before (B): at once where that is here too."""
        neighbour = stage + 1 if kind == "F" else stage - 1
        if neighbour in self.stages:
            self._arrived[kind, neighbour, microbatch] = tensor, None
        else:
            self._departing[kind, stage, microbatch] = tensor

    def _take(self, kind: str, stage: int, microbatch: int) -> Tensor:
        """Return what was handed to a stage, and wait for it where it comes from another rank."""
        tensor, work = self._arrived.pop((kind, stage, microbatch))
        if work is not None:
            transfers.recv(work, tensor, self.group)
        return tensor

    def _send(self, action: Action) -> None:
        kind = action.kind[-1]
        tensor = self._departing.pop((kind, action.stage, action.microbatch)).contiguous()
        self.activations.check(tensor, self.microbatches[action.microbatch])
        peer = self.layout.ranks[action.stage + 1 if kind == "F" else action.stage - 1]
        work = dist.isend(tensor, group=self.group, group_dst=peer)
        assert work is not None, "this rank is in the group"
        # A tensor stays until it has left, no longer.
        self._sending = [entry for entry in self._sending if not entry[0].is_completed()]
        self._sending.append((work, tensor))

    def _receive(self, action: Action) -> None:
        kind = action.kind[-1]
        peer = self.layout.ranks[action.stage - 1 if kind == "F" else action.stage + 1]
        buffer = self.activations.allocate(self.microbatches[action.microbatch])
        work = dist.irecv(buffer, group=self.group, group_src=peer)
        self._arrived[kind, action.stage, action.microbatch] = buffer, work
