"""Tensor parallelism, alone and under every kind of data parallelism, equals one process; a wrong plan is noticed."""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.llama3.args import LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from models.plan import ParallelPlan
from tests.distributed.cases import list_parameters
from tests.distributed.harness import RankFailedError, run_distributed
from trainer.components.loss import LinearCrossEntropy
from trainer.components.muon import ShardedMuon
from trainer.config.schema_parallel import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed import tensor_parallel
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.compile import apply_compile, compiles_model
from trainer.distributed.fsdp import apply_data_parallel, choose_accumulation, set_gradient_sync
from trainer.distributed.grad_norm import clip_grad_norm
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.tensor_collectives import TensorAxis, gather_sequence, scatter_sequence
from trainer.distributed.tensor_parallel import STYLES, Site, apply_tensor_parallel
from trainer.distributed.weight_init import init_weights

# FSDP cuts each part of wk, w1 and the vocabulary into unequal pieces. 4 ranks are more than there are KV heads.
ARGS = LlamaArgs(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=68, ffn_hidden_dim=28, max_seq_len=16)
GLOBAL_BATCH, SEQ_LEN, STEPS, SEED = 8, 16, 3, 7
COMPILING_SECONDS = 240.0


@dataclass(frozen=True)
class Case:
    """One way to run the same training. Keyword arguments are those of the config sections and of the model."""

    name: str
    world_size: int = 1
    tp: int = 1
    parallelism: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    activation_checkpoint: dict[str, Any] = field(default_factory=lambda: {"mode": "none"})
    compile: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    microbatches: int = 1
    loss: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    @property
    def llama_args(self) -> LlamaArgs:
        return dataclasses.replace(ARGS, **self.args)


TIED = {"tie_embeddings": True}
# Cut by rows over 2 ranks, and then by FSDP over 4, a matrix of 73 rows would not be where DTensor takes it to be.
UNEVEN = {"vocab_size": 73}
DDP2 = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}
HSDP = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
BF16 = {"training": {"mixed_precision_param": "bfloat16"}, "tolerance": 4e-2}
COMPILED = {"enable": True, "backend": "aot_eager"}
FULL, OP, SECOND = (
    {"mode": "full"},
    {"mode": "selective", "selective_ac_option": "op"},
    {"mode": "selective", "selective_ac_option": "2"},
)

# Beside those of the table.
CASES = [
    Case("tp2", 2, 2),
    Case("tp2_gathered_logits", 2, 2, args=UNEVEN, loss={"loss_parallel": False}),
    Case("tp4_replicated_kv", 4, 4),
    Case("tp4_one_kv_head_tied_uneven", 4, 4, args={"n_kv_heads": 1} | TIED | UNEVEN),
    Case("fsdp2_tp2_uneven", 4, 2, args=UNEVEN),
    Case("fsdp2_tp2_sharded", 4, 2, {"fsdp_accumulation": "sharded"}, microbatches=4),
    Case("fsdp2_tp2_unsharded", 4, 2, {"fsdp_accumulation": "unsharded"}, args=TIED, microbatches=2),
    Case("fsdp2_tp2_never", 4, 2, {"fsdp_reshard_after_forward": "never"}, microbatches=2),
    Case("fsdp2_tp2_offload", 4, 2, training={"enable_cpu_offload": True}),
    Case("fsdp2_tp2_second", 4, 2, activation_checkpoint=SECOND, args=UNEVEN),
    Case("tp2_compile_full", 2, 2, compile=COMPILED, activation_checkpoint=FULL, args=UNEVEN),
    Case("tp2_compile_op", 2, 2, compile=COMPILED, activation_checkpoint=OP, microbatches=8),
    Case("tp2_compile_one_kv_head", 2, 2, compile=COMPILED, args={"n_kv_heads": 1} | TIED),
    Case("ddp2_tp2", 4, 2, DDP2, args=TIED),
    Case("fsdp4_tp2_tied_uneven", 8, 2, args=TIED | UNEVEN),
    Case("fsdp2_tp4_bf16_full", 8, 4, args=UNEVEN, activation_checkpoint=FULL, **BF16),
    Case("tp8_two_kv_heads", 8, 8, args={"dim": 32, "n_heads": 8, "ffn_hidden_dim": 32}),
]


@dataclass(frozen=True)
class Outcome:
    """Losses and norms of each step, then whole tensors by parameter: first weights, first gradients, last weights.

    logits: (GLOBAL_BATCH, S, V), zero but for the sequences of this rank.
    """

    losses: list[float]
    evaluation_loss: float
    logits: torch.Tensor
    norms: list[float]
    first: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]


def _build(
    case: Case, *, plan: ParallelPlan | None = None, styles: Mapping[str, Any] = STYLES
) -> tuple[Transformer, ParallelDims]:
    """Parallelize the model as `trainer/parallelize.py` does."""
    args = case.llama_args
    plan = build_plan(args) if plan is None else plan
    parallelism = ParallelismConfig(**case.parallelism, tensor_parallel_degree=case.tp)
    dims = ParallelDims.from_config(parallelism, dist.get_world_size() if dist.is_initialized() else 1)
    dims.build_mesh("cpu")
    section = CompileConfig(**case.compile)
    with torch.device("meta"):
        model = Transformer(args)
    compiles_blocks = compiles_model(section)
    if dims.tp > 1:
        apply_tensor_parallel(
            model, plan=plan, mesh=dims.mesh("tp"), compiles_blocks=compiles_blocks, async_tp=False, styles=styles
        )
    checkpointing = ActivationCheckpointConfig(**case.activation_checkpoint)
    apply_activation_checkpoint(model, plan=plan, section=checkpointing, compiles_blocks=compiles_blocks)
    apply_compile(model, plan=plan, section=section)
    training = TrainingConfig(**{"mixed_precision_param": "float32", **case.training})
    apply_data_parallel(model, plan=plan, dims=dims, parallelism=parallelism, training=training)
    init_weights(model, seed=SEED, device="cpu")
    assert (model.tok_embeddings.weight is model.output.weight) == args.tie_embeddings
    return model, dims


def _make_batch(case: Case, step: int) -> dict[str, torch.Tensor]:
    """What the model takes of the global batch, (B, S) each. Sequences have different numbers of labels."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(case.llama_args.vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    labels = text[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        labels[row, : row % 5] = -100
    positions = torch.arange(SEQ_LEN).expand(GLOBAL_BATCH, -1) % 7
    return {"inputs": text[:, :-1], "labels": labels, "positions": positions}


def _train(case: Case, styles: Mapping[str, Any] = STYLES) -> Outcome:
    model, dims = _build(case, styles=styles)
    loss_fn = LinearCrossEntropy(
        chunk_size=10, tp_group=dims.mesh("tp").get_group() if dims.tp > 1 else None, **case.loss
    )
    parallelism, training = ParallelismConfig(**case.parallelism), TrainingConfig()
    accumulation = choose_accumulation(model, parallelism=parallelism, training=training, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=True)
    first, gradients, losses, norms = _wholes(model), {}, [], []
    for step in range(STEPS):
        parts, n_valid = _cut_batch(case, dims, step)
        total = torch.zeros(())
        for i, part in enumerate(parts):
            set_gradient_sync(
                model,
                i == len(parts) - 1,
                accumulation=accumulation,
                reshard_after_forward=parallelism.fsdp_reshard_after_forward,
            )
            loss = model(**part, loss_fn=loss_fn) / n_valid
            loss.backward()
            total += loss.detach()
        losses.append(_sum(total, dims))
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        norms.append(clip_grad_norm(model.parameters(), max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        evaluation_loss = _sum(sum(model(**part, loss_fn=loss_fn) for part in parts) / n_valid, dims)
        logits = torch.cat([model(part["inputs"], positions=part["positions"]) for part in parts]).float()
        rows = logits.new_zeros(dims.dp_degree, *logits.shape)
        rows[dims.dp_rank] = logits
    return Outcome(losses, evaluation_loss, rows.flatten(0, 1), norms, first, gradients, _wholes(model))


def _cut_batch(case: Case, dims: ParallelDims, step: int) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Return this rank's microbatches, and the number of valid labels in the global batch."""
    batch = _make_batch(case, step)
    mine = {name: tensor.chunk(dims.dp_degree)[dims.dp_rank] for name, tensor in batch.items()}
    parts = [{name: t.chunk(case.microbatches)[i] for name, t in mine.items()} for i in range(case.microbatches)]
    return parts, (batch["labels"] >= 0).sum()


def _sum(loss: torch.Tensor, dims: ParallelDims) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss, group=dims.loss_group())
    return loss.item()


def _whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "this parameter has no gradient"
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _wholes(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: _whole(parameter) for name, parameter in model.named_parameters()}


@functools.cache
def _reference(args: LlamaArgs) -> Outcome:
    return _train(Case("reference", args=dataclasses.asdict(args) | {"rope_scaling": None}))


def _find_wrong(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> dict:
    """Return the relative errors, in the 2-norm, of the tensors that are off by more than the tolerance."""
    assert actual.keys() == expected.keys()
    errors = {name: ((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}
    return {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize(
    "case", list_parameters(CASES, exhaustive=("tp2_compile_op", "tp2_compile_full", "fsdp2_tp4_bf16_full"))
)
def test_run_equals_one_process(case: Case) -> None:
    expected = _reference(case.llama_args)
    for actual in run_distributed(_train, case.world_size, case, timeout=COMPILING_SECONDS, reuse=True):
        assert actual.losses == pytest.approx(expected.losses, rel=case.tolerance)
        assert actual.evaluation_loss == pytest.approx(expected.evaluation_loss, rel=case.tolerance)
        assert actual.norms == pytest.approx(expected.norms, rel=case.tolerance)
        assert all(torch.equal(actual.first[name], expected.first[name]) for name in expected.first)
        assert not _find_wrong(actual.gradients, expected.gradients, case.tolerance)
        assert not _find_wrong(actual.last, expected.last, case.tolerance)
        is_mine = actual.logits.abs().amax(dim=(1, 2), keepdim=True) > 0
        assert is_mine.sum() * case.world_size >= GLOBAL_BATCH * case.tp
        assert not _find_wrong({"": actual.logits}, {"": expected.logits * is_mine}, case.tolerance)


# A wrong plan.


def _change(**styles: str | None) -> ParallelPlan:
    """The plan with other styles for some modules, by the last part of their glob; None takes them out."""
    plan = build_plan(ARGS)
    tp = {glob: styles.get(glob.rpartition(".")[2], style) for glob, style in plan.tp.items()}
    return dataclasses.replace(plan, tp={glob: style for glob, style in tp.items() if style is not None})


WRONG_PLANS = {
    "wo is colwise": _change(wo="colwise"),
    "w2 is colwise": _change(w2="colwise"),
    "wq is rowwise": _change(wq="rowwise"),
    "no gather before attention": _change(attention=None),
    "no gather before feed_forward": _change(feed_forward=None),
}


def _compute_gradients(case: Case, plan: ParallelPlan, styles: Mapping[str, Any]) -> dict[str, torch.Tensor] | str:
    """Gradients of one step, or what went wrong on the way."""
    model, dims = _build(case, plan=plan, styles=styles)
    batch = _make_batch(case, 0)
    n_valid = (batch["labels"] >= 0).sum()
    try:
        loss_fn = LinearCrossEntropy(tp_group=dims.mesh("tp").get_group())
        (model(**batch, loss_fn=loss_fn) / n_valid).backward()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return {name: _whole(p.grad) for name, p in model.named_parameters()}


def _compute_gradients_of_plans() -> list[dict[str, torch.Tensor] | str]:
    return [_compute_gradients(Case("wrong", 2, 2), plan, STYLES) for plan in WRONG_PLANS.values()]


def test_wrong_plan_raises_or_gives_other_gradients() -> None:
    expected = _reference(ARGS).gradients
    for actual, name in zip(run_distributed(_compute_gradients_of_plans, 2)[0], WRONG_PLANS, strict=True):
        assert isinstance(actual, str) or _find_wrong(actual, expected, 1e-5), name


def _compute_gradients_without(name: str, replacement: Any) -> dict[str, torch.Tensor] | str:
    setattr(tensor_parallel, name, replacement)
    return _compute_gradients(Case("broken", 4, 4), build_plan(ARGS), STYLES)


def _keep_gradient(weight: torch.Tensor, axis: Any) -> torch.Tensor:
    return weight


def test_gradient_that_is_not_summed_is_noticed() -> None:
    expected = _reference(ARGS).gradients
    right = run_distributed(_compute_gradients_without, 4, "sum_gradient", tensor_parallel.sum_gradient)[0]
    broken = run_distributed(_compute_gradients_without, 4, "sum_gradient", _keep_gradient)[0]
    assert not _find_wrong(right, expected, 1e-5)
    kept = ("attention_norm", "ffn_norm", "norm", "wk", "wv")
    assert set(_find_wrong(broken, expected, 1e-5)) == {n for n in expected if n.split(".")[-2] in kept}


def _place_by_columns(site: Site) -> None:
    site.place_weight(Shard(1))


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown_style": (
        {"plan": _change(wo="rowise")},
        "unknown styles: rowise. Known are: embedding, sequence, gather_seq",
    ),
    "no_match": ({"plan": dataclasses.replace(build_plan(ARGS), tp={"layers.*.wz": "colwise"})}, "matches no module"),
    "no_style": (
        {"plan": _change(w2=None)},
        "no style.* layers.0.feed_forward.w2.weight, layers.1.feed_forward.w2.weight",
    ),
    "other_module": ({"plan": _change(norm="colwise")}, "norm is a RMSNorm, but its style is for Linear"),
    "heads": ({"args": {"n_heads": 3, "n_kv_heads": 3}}, "tensor_parallel_degree = 2 must divide n_heads = 3"),
    "kv_heads": ({"args": {"n_heads": 6, "n_kv_heads": 3}}, "must divide n_kv_heads = 3 .*, or be a multiple of it"),
    "width": ({"args": {"ffn_hidden_dim": 27}}, "must divide 27, dim 0 of layers.0.feed_forward.w1.weight"),
    "shared": ({"args": TIED, "styles": {**STYLES, "output": _place_by_columns}}, "output.weight is shared"),
    "async": ({"async_tp": True, "compiles_blocks": True}, "enable_async_tensor_parallel = true .* on CUDA only"),
}


def _provoke_errors() -> dict[str, str]:
    mesh = ParallelDims(world_size=2, tp=2)
    mesh.build_mesh("cpu")
    messages = {}
    for name, (wrong, _) in ERRORS.items():
        args = dataclasses.replace(ARGS, **wrong.get("args", {}))
        with torch.device("meta"):
            model = Transformer(args)
        settings = {"plan": build_plan(args), "compiles_blocks": False, "async_tp": False, **wrong}
        settings.pop("args", None)
        try:
            apply_tensor_parallel(model, mesh=mesh.mesh("tp"), **settings)
        except ValueError as error:
            messages[name] = str(error)
    return messages


@functools.cache
def _get_errors() -> dict[str, str]:
    return run_distributed(_provoke_errors, 2)[0]


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_cut_is_refused(name: str) -> None:
    assert re.search(ERRORS[name][1], _get_errors()[name])


def _run_odd_sequence() -> None:
    model, _ = _build(Case("odd", 2, 2))
    model(torch.zeros(1, 7, dtype=torch.int64))


def test_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RankFailedError, match="7 tokens are no multiple of the degree 2"):
        run_distributed(_run_odd_sequence, 2)


# What it communicates, compiles and hands out.


class _CountCollectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional":
            self.counts[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def _watch() -> tuple[dict[str, int], set[type]]:
    """The collectives of one forward and backward pass, and the types of what modules take and return."""
    model, dims = _build(Case("watched", 2, 2))
    types: set[type] = set()

    def note(module: torch.nn.Module, args: tuple, output: Any) -> None:
        types.update(type(leaf) for leaf in tree_leaves((args, output)))

    for module in model.modules():
        module.register_forward_hook(note)
    batch = _make_batch(Case("watched"), 0)
    loss_fn = LinearCrossEntropy(chunk_size=0, tp_group=dims.mesh("tp").get_group())
    with _CountCollectives() as collectives:
        model(batch["inputs"], labels=batch["labels"], loss_fn=loss_fn).backward()
    return dict(collectives.counts), types


def test_collectives_are_few_and_activations_plain_tensors() -> None:
    counts, types = run_distributed(_watch, 2)[0]
    assert types == {torch.Tensor}, "an AsyncCollectiveTensor loses its gradient in a compiled block"
    parts = 2 * ARGS.n_layers  # attention and feed-forward: gathered before and scattered after, forward and backward
    ends = 1
    expected = {
        "all_gather_into_tensor": 2 * parts + 2 * ends + 1,  # the last for the loss
        "reduce_scatter_tensor": 2 * parts + 2 * ends,
        "all_reduce": parts + 1,  # gradients of norms
    }
    assert {name: counts[name] for name in expected} == expected
    assert counts["wait_tensor"] == sum(expected.values())


def _count_graphs() -> int:
    _train(Case("compiled", 2, 2, compile=COMPILED, args={"n_layers": 4}))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_blocks_share_one_graph() -> None:
    with_and_without_gradients = 2
    assert run_distributed(_count_graphs, 2, timeout=COMPILING_SECONDS)[0] == with_and_without_gradients


# Optimizers and checkpoints.


def _step_with_muon(world_size: int, tp: int) -> dict[str, torch.Tensor]:
    """Two steps with gradients that are made up, so that they are the same bit for bit however they are cut."""
    model, _ = _build(Case("muon", world_size, tp, args={"n_kv_heads": 1}))
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    optimizer = ShardedMuon(matrices.values(), lr=0.1, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in matrices.values():
            parameter.grad = _cut_like(parameter, torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return _wholes(model)


def _cut_like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    local = whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))].clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


@pytest.mark.parametrize(("world_size", "tp"), [(2, 2), (4, 2), (4, 4)])
def test_muon_equals_one_process(world_size: int, tp: int) -> None:
    expected = _step_with_muon(1, 1)
    for actual in run_distributed(_step_with_muon, world_size, world_size, tp):
        assert not _find_wrong(actual, expected, 1e-5)


def _save(case: Case, folder: str) -> None:
    model, _ = _build(case)
    dcp.save(model.state_dict(), checkpoint_id=folder)


def _load(case: Case, folder: str) -> dict[str, torch.Tensor]:
    model, _ = _build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dcp.load(model.state_dict(), checkpoint_id=folder)
    return _wholes(model)


@pytest.mark.parametrize(("ranks", "args"), [(4, {}), (8, UNEVEN), (4, TIED | UNEVEN)])
def test_checkpoint_of_fsdp_and_tp_loads_under_fsdp_and_under_tp(ranks: int, args: dict, tmp_path: Path) -> None:
    expected = _reference(dataclasses.replace(ARGS, **args)).first
    run_distributed(_save, ranks, Case("saved", ranks, 2, args=args), str(tmp_path))
    for tp in (1, 2):
        for actual in run_distributed(_load, 2, Case("loaded", 2, tp, args=args), str(tmp_path)):
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


def _scatter_and_gather_permuted() -> tuple[torch.Tensor, torch.Tensor]:
    """Collectives of one sequence that lies in memory in another order than its shape says."""
    axis = TensorAxis.from_group(dist.group.WORLD)
    whole = torch.arange(24.0).view(1, 6, 4).transpose(1, 2)  # (1, 4, 6)
    part = scatter_sequence(whole, axis)
    assert not part._is_view(), "FSDP2 warns of a view that one of its units returns"
    return part, gather_sequence(part.transpose(1, 2).contiguous().transpose(1, 2), axis)


def test_collectives_take_tensors_of_any_layout() -> None:
    """With one sequence nothing has to move within memory, and torch 2.11 refuses what is not contiguous."""
    expected = 2 * torch.arange(24.0).view(1, 6, 4).transpose(1, 2)
    for rank, (part, gathered) in enumerate(run_distributed(_scatter_and_gather_permuted, 2)):
        torch.testing.assert_close(part, expected[:, 2 * rank : 2 * rank + 2])
        torch.testing.assert_close(gathered, expected)
