"""A pipeline gives the losses, gradients and trained weights of one process, with every schedule, beside all else.

Several cases share their processes, since starting those is most of the work.
"""

import collections
import csv
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.llama3.args import LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from tests.distributed.harness import RankFailedError, run_distributed
from trainer.components.loss import LinearCrossEntropy
from trainer.config.pipeline_layout import list_stage_modules, plan_pipeline
from trainer.config.schema_parallel import ActivationCheckpointConfig, ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.fsdp import apply_data_parallel, reshard
from trainer.distributed.grad_norm import clip_grad_norm
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.pipeline_orders import build_order
from trainer.distributed.pipeline_parallel import Activations, Pipeline, build_pipeline
from trainer.distributed.pipeline_stages import split_into_stages
from trainer.distributed.weight_init import init_weights

ARGS = LlamaArgs(dim=18, n_layers=8, n_heads=3, n_kv_heads=1, vocab_size=67, ffn_hidden_dim=26, max_seq_len=16)
GLOBAL_BATCH = 16
SEQ_LEN = 12
STEPS = 3
SEED = 7

SCHEDULES = (
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)

DDP = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}
HSDP = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
BF16 = {"mixed_precision_param": "bfloat16"}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class PipelineCase:
    """One way to run the same training as a pipeline. Keyword arguments are those of the config sections."""

    schedule: str
    pp: int = 2
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    activation_checkpoint: dict[str, Any] = field(default_factory=dict)
    accumulation: Literal["sharded", "unsharded"] = "unsharded"
    passes: int = 1
    microbatch_size: int = 2

    @property
    def section(self) -> ParallelismConfig:
        return ParallelismConfig(
            pipeline_parallel_degree=self.pp, pipeline_parallel_schedule=self.schedule, **self.parallelism
        )


@dataclass(frozen=True)
class Outcome:
    """Loss and gradient norm of each step, the first gradients and the last parameters of this rank's stages, whole."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What a rank has of a case."""

    dims: ParallelDims
    model: Transformer
    pipeline: Pipeline

    def sum_over_ranks(self, value: torch.Tensor) -> float:
        total = value.clone()
        dist.all_reduce(total, group=self.dims.loss_group())
        return total.item()


def make_batch(step: int, *, batch: int = GLOBAL_BATCH, seq: int = SEQ_LEN) -> dict:
    """Return tokens and labels, (batch, seq). Sequences have different numbers of labels."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(ARGS.vocab_size, (batch, seq + 1), generator=generator)
    made = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].clone()}
    for row in range(batch):
        made["labels"][row, : row % 5] = -100
    return made


def split_batch(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, Any]]:
    return [
        dict(zip(batch, tensors, strict=True))
        for tensors in zip(*(t.chunk(parts) for t in batch.values()), strict=True)
    ]


def make_microbatches(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, Any]]:
    return split_batch(batch, len(batch["tokens"]) // size)


def summed_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "this parameter has no gradient"
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def build_reference() -> tuple[Transformer, torch.optim.Optimizer]:
    with torch.device("meta"):
        model = Transformer(ARGS)
    init_weights(model, seed=SEED, device="cpu")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


@functools.cache
def train_reference() -> Outcome:
    """The run of one process in fp32, without anything."""
    model, optimizer = build_reference()
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = make_batch(step)
        loss = model(batch["tokens"], labels=batch["labels"], loss_fn=summed_loss)
        loss = loss / (batch["labels"] >= 0).sum()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        norms.append(clip_grad_norm(model.parameters(), max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, norms, gradients, {name: _whole(p) for name, p in model.named_parameters()})


def build(case: PipelineCase) -> Run:
    """Do what `trainer.parallelize` does, for a pipeline and data parallelism."""
    section = case.section
    training = TrainingConfig(**{"mixed_precision_param": "float32", **case.training})
    recomputation = ActivationCheckpointConfig(**{"mode": "none", **case.activation_checkpoint})
    dims = ParallelDims.from_config(section, dist.get_world_size())
    dims.build_mesh("cpu")
    with torch.device("meta"):
        model = Transformer(ARGS)
    plan = build_plan(ARGS)
    group = dims.mesh("pp").get_group()
    stages = split_into_stages(model, plan=plan, parallelism=section, rank=group.rank())
    plan = plan.restrict_to([name for name, _ in model.named_modules()])
    apply_activation_checkpoint(model, plan=plan, section=recomputation)
    for stage in stages:
        its_plan = plan.restrict_to([name for name, _ in stage.module.named_modules()])
        apply_data_parallel(stage.module, plan=its_plan, dims=dims, parallelism=section, training=training)
    init_weights(model, seed=SEED, device="cpu")
    pipeline = build_pipeline(
        stages,
        group=group,
        activations=Activations(ARGS.dim, getattr(torch, training.mixed_precision_param), torch.device("cpu")),
        parallelism=section,
        accumulation=case.accumulation,
        splits_backward=recomputation.mode == "none",
    )
    return Run(dims, model, pipeline)


def forward_backward(case: PipelineCase, run: Run, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Add the gradients of this rank's part of a global batch."""
    valid_tokens = (batch["labels"] >= 0).sum()
    mine = split_batch(batch, run.dims.dp_degree)[run.dims.dp_rank]
    loss = torch.zeros(())
    for i, some in enumerate(split_batch(mine, case.passes)):
        loss += run.pipeline.forward_backward(
            make_microbatches(some, case.microbatch_size),
            loss_fn=LinearCrossEntropy(chunk_size=5),
            valid_tokens=valid_tokens,
            is_last=i == case.passes - 1,
        )
    return loss


def train(case: PipelineCase) -> Outcome:
    run = build(case)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-2, eps=1e-4, fused=True)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        loss = forward_backward(case, run, make_batch(step))
        losses.append(run.sum_over_ranks(loss))
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in run.model.named_parameters()}
        norms.append(clip_grad_norm(run.model.parameters(), max_norm=0.5, pp_mesh=run.dims.mesh("pp")).item())
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, norms, gradients, {name: _whole(p) for name, p in run.model.named_parameters()})


def check_equal_to_one_process(world_size: int, cases: list[PipelineCase]) -> None:
    for case in cases:
        outcomes = run_distributed(train, world_size, case, reuse=True)
        expected = train_reference()
        seen = set()
        for rank, actual in enumerate(outcomes):
            where = f"rank {rank} of {case}"
            assert actual.losses == pytest.approx(expected.losses, rel=TOLERANCE), where
            assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE), where
            for kind in ("gradients", "parameters"):
                tensors, references = getattr(actual, kind), getattr(expected, kind)
                errors = {n: ((t - references[n]).norm() / references[n].norm()).item() for n, t in tensors.items()}
                wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
                assert not wrong, f"{kind} on {where}"
                seen |= {(kind, name) for name in tensors}
        assert seen == {(kind, name) for kind in ("gradients", "parameters") for name in expected.gradients}, case


@pytest.mark.exhaustive
def test_every_schedule_on_four_ranks() -> None:
    """On two, alone and beside each other technique, they are in the table."""
    check_equal_to_one_process(4, [PipelineCase(schedule, pp=4) for schedule in SCHEDULES])


@pytest.mark.parametrize(
    ("world_size", "degrees"),
    [
        pytest.param(4, DDP, id="ddp", marks=pytest.mark.exhaustive),
        pytest.param(8, HSDP, id="hsdp", marks=pytest.mark.exhaustive),
        pytest.param(4, {}, id="fsdp"),
    ],
)
def test_gradients_of_several_passes(world_size: int, degrees: dict[str, int]) -> None:
    cases = [
        PipelineCase(schedule, parallelism=degrees, passes=2, accumulation=accumulation, microbatch_size=size)
        for schedule, size in (("1F1B", 2), ("Interleaved1F1B", 1), ("ZBVZeroBubble", 1))
        for accumulation in ("sharded", "unsharded")
    ]
    check_equal_to_one_process(world_size, [cases[0], *cases[4:]] if degrees else cases)


@pytest.mark.exhaustive
def test_weights_that_are_freed_after_forward_or_never() -> None:
    cases = [
        PipelineCase("1F1B", parallelism={"fsdp_reshard_after_forward": "always"}, passes=2),
        PipelineCase("LoopedBFS", parallelism={"fsdp_reshard_after_forward": "always"}, accumulation="sharded"),
        PipelineCase(
            "ZBVZeroBubble",
            parallelism={"fsdp_reshard_after_forward": "always"},
            activation_checkpoint={"mode": "full"},
        ),
        PipelineCase("1F1B", parallelism={"fsdp_reshard_after_forward": "never"}, passes=2),
    ]
    check_equal_to_one_process(4, cases)


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "DualPipeV"])
def test_schedule_from_a_file(schedule: str, tmp_path: Path) -> None:
    modules = list_stage_modules(build_plan(ARGS).stages, blocks="layers.*", n_blocks=ARGS.n_layers)
    order = build_order(plan_pipeline(PipelineCase(schedule).section, modules), GLOBAL_BATCH // 2)
    path = tmp_path / "schedule.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(order)
    case = PipelineCase("nothing", parallelism={"pipeline_parallel_schedule_csv": str(path)})
    check_equal_to_one_process(2, [case])


def _find_gradients_in_bf16() -> list[str]:
    """Parameters whose gradient still is where the next microbatch's would be added to it, in bf16."""
    case = PipelineCase("ZBVZeroBubble", training=BF16)
    run = build(case)
    microbatches = make_microbatches(make_batch(0), size=2)
    run.pipeline.forward_backward(microbatches, loss_fn=summed_loss, valid_tokens=torch.tensor(1), is_last=False)
    gathered = dict(run.model.named_parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in gathered.values())
    return [name for name, parameter in gathered.items() if parameter.grad is not None]


def test_gradients_of_weights_computed_apart_add_up_in_the_precision_of_the_reduction() -> None:
    assert run_distributed(_find_gradients_in_bf16, 2, reuse=True) == [[], []]


# --- evaluation ---

EVALUATIONS = ((GLOBAL_BATCH, SEQ_LEN, 1), (6, 16, 2), (5, 4, 5))


def _evaluate(schedules: list[str]) -> list[list[float]]:
    losses = []
    for schedule in schedules:
        case = PipelineCase(schedule)
        run = build(case)
        modes = []
        hook = next(iter(run.model.layers.values())).register_forward_pre_hook(
            lambda module, _, modes=modes: modes.append(module.training)
        )
        run.model.eval()
        values = []
        for batch, seq, size in EVALUATIONS:
            data = make_batch(100, batch=batch * run.dims.dp_degree, seq=seq)
            mine = split_batch(data, run.dims.dp_degree)[run.dims.dp_rank]
            microbatches = make_microbatches(mine, size)
            values.append(run.sum_over_ranks(run.pipeline.evaluate(microbatches, loss_fn=summed_loss)))
        assert not any(stage.module.training for stage in run.pipeline.stages.values())
        assert not any(modes)
        run.model.train()
        reshard(run.model)
        hook.remove()
        assert all(p.grad is None for p in run.model.parameters())
        values.append(run.sum_over_ranks(forward_backward(case, run, make_batch(0))))
        assert all(stage.module.training for stage in run.pipeline.stages.values())
        losses.append(values)
    return losses


def test_evaluation_of_other_lengths_and_numbers_with_every_schedule() -> None:
    model, _ = build_reference()
    expected = []
    for batch, seq, _ in EVALUATIONS:
        data = make_batch(100, batch=2 * batch, seq=seq)
        expected.append(model(data["tokens"], labels=data["labels"], loss_fn=summed_loss).item())
    expected.append(train_reference().losses[0])
    for losses in run_distributed(_evaluate, 4, list(SCHEDULES), reuse=True):
        for schedule, values in zip(SCHEDULES, losses, strict=True):
            assert values == pytest.approx(expected, rel=1e-5), schedule


# --- what is communicated, and what is refused ---


class _CountCollectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::").strip("_")] += 1
        return func(*args, **(kwargs or {}))


def _count_collectives(cases: list[PipelineCase]) -> list[tuple[int, dict[str, int]]]:
    """How many communication groups this rank has, and the collectives of one step by name."""
    counts = []
    for case in cases:
        run = build(case)
        forward_backward(case, run, make_batch(0))  # sets things up
        with _CountCollectives() as collectives:
            forward_backward(case, run, make_batch(1))
        units = len(run.model.layers) + (run.model.tok_embeddings is not None) + (run.model.output is not None)
        counts.append((units, dict(collectives.counts)))
    return counts


def test_weights_are_gathered_and_gradients_reduced_once_a_step() -> None:
    cases = [PipelineCase(schedule, passes=2, microbatch_size=1) for schedule in SCHEDULES]
    transfers_of = {"single": 8, "loop": 3 * 8, "v": 2 * 8}
    for counts in run_distributed(_count_collectives, 4, cases, reuse=True):
        for case, (units, by_name) in zip(cases, counts, strict=True):
            transfers = transfers_of[run_style(case)]
            expected = {"allgather_base": units, "reduce_scatter_base": units, "send": transfers, "recv": transfers}
            assert by_name == expected, case.schedule
    case = PipelineCase("1F1B", passes=2, microbatch_size=1, accumulation="sharded")
    for ((units, by_name),) in run_distributed(_count_collectives, 4, [case], reuse=True):
        assert by_name["reduce_scatter_base"] == units * 8
        assert by_name["allgather_base"] == units


def run_style(case: PipelineCase) -> str:
    modules = list_stage_modules(build_plan(ARGS).stages, blocks="layers.*", n_blocks=ARGS.n_layers)
    return plan_pipeline(case.section, modules).schedule.style


def _train_with_twice_used_weight() -> None:
    case = PipelineCase("ZBVZeroBubble")
    run = build(case)
    for block in run.model.layers.values():
        block.ffn_norm = block.attention_norm
    forward_backward(case, run, make_batch(0))


def test_refusals() -> None:
    with pytest.raises(RankFailedError, match="DualPipeV needs at least 4, one for each stage"):
        run_distributed(train, 2, PipelineCase("DualPipeV", microbatch_size=8))
    with pytest.raises(RankFailedError, match=r"fsdp_reshard_after_forward = 'always' frees weights .* ZBVZeroBubble"):
        run_distributed(train, 2, PipelineCase("ZBV", parallelism={"fsdp_reshard_after_forward": "always"}))
    with pytest.raises(
        RankFailedError, match=r"a weight that a stage uses in several places(.|\n)*in 3I0 of pipeline rank 0"
    ):
        run_distributed(_train_with_twice_used_weight, 2)


# --- checkpoints ---


def _save(folder: str) -> None:
    case = PipelineCase("ZBVZeroBubble")
    run = build(case)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-2, eps=1e-4, fused=True)
    for step in range(STEPS):
        forward_backward(case, run, make_batch(step))
        clip_grad_norm(run.model.parameters(), max_norm=0.5, pp_mesh=run.dims.mesh("pp"))
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, optimizer)["state"]}
    dcp.save(state, checkpoint_id=folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the checkpoint is read by one process
def test_checkpoint_of_a_pipeline_is_that_of_one_process(tmp_path: Path) -> None:
    run_distributed(_save, 4, str(tmp_path))
    model, optimizer = build_reference()
    for step in range(STEPS):
        batch = make_batch(step)
        loss = model(batch["tokens"], labels=batch["labels"], loss_fn=summed_loss) / (batch["labels"] >= 0).sum()
        loss.backward()
        clip_grad_norm(model.parameters(), max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)["state"]}
    loaded = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in expected["model"].items()},
        "optimizer": {
            name: {key: torch.zeros_like(tensor) for key, tensor in state.items()}
            for name, state in expected["optimizer"].items()
        },
    }
    dcp.load(loaded, checkpoint_id=str(tmp_path))
    for name, tensor in expected["model"].items():
        torch.testing.assert_close(loaded["model"][name], tensor, rtol=1e-4, atol=1e-6)
        for key, value in expected["optimizer"][name].items():
            torch.testing.assert_close(loaded["optimizer"][name][key], value, rtol=1e-4, atol=1e-6)
