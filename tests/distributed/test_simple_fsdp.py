"""SimpleFSDP against FSDP2: the same bits, the collectives that it means to have, and checkpoints for each other."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from models.llama3.plan import build_plan
from tests.distributed.cases import ARGS, BF16, DDP2, HSDP, Case, Outcome, make_batch, run_case, summed_loss
from tests.distributed.harness import run_distributed
from tests.distributed.test_fsdp import build_sharded
from trainer.components.checkpoint import CheckpointManager
from trainer.components.loss import LinearCrossEntropy
from trainer.components.optimizer import build_optimizer
from trainer.config.schema import CheckpointConfig
from trainer.config.schema_training import OptimizerConfig, TrainingConfig
from trainer.distributed import compile_backends
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.simple_fsdp import apply_simple_fsdp
from trainer.distributed.weight_passes import GATHER, REDUCE, SCATTER, WAIT

SIMPLE = {"data_parallel_implementation": "simple_fsdp"}
# Their compilers take long: as little as shows everything.
SHALLOWEST = dataclasses.replace(ARGS, n_layers=1)
SHALLOW = dataclasses.replace(ARGS, n_layers=2)
EVEN = dataclasses.replace(SHALLOW, dim=24, n_heads=4, n_kv_heads=2, vocab_size=68)
WHOLE = {"enable": True, "backend": "aot_eager", "scope": "model"}
JOINED = {**WHOLE, "graph_passes": "transformer_block_bucketing"}
COMPILING_SECONDS = 240.0


def _make_simple(case: Case, **more: Any) -> Case:
    return dataclasses.replace(case, parallelism={**case.parallelism, **SIMPLE}, **more)


# --- the same numbers ---


def _run_both(actual: Case, expected: Case) -> tuple[Outcome, Outcome]:
    return run_case(actual), run_case(expected)


def _find_differences(actual: Outcome, expected: Outcome) -> list[str]:
    """Return what differs in any bit."""
    different = [kind for kind in ("losses", "grad_norms") if getattr(actual, kind) != getattr(expected, kind)]
    for kind in ("gradients", "parameters"):
        tensors, references = getattr(actual, kind), getattr(expected, kind)
        assert tensors.keys() == references.keys()
        different += [f"{kind} {name}" for name in references if not torch.equal(tensors[name], references[name])]
    return different


TP = {"tensor_parallel_degree": 2}
BLOCKS = {"enable": True, "backend": "aot_eager"}
GATHER8 = {"emulate": True, "enable_fsdp_float8_all_gather": True}
PRECOMPUTE = {**GATHER8, "precompute_float8_dynamic_scale_for_fsdp": True}
WIDE = dataclasses.replace(ARGS, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden_dim=64)


def _case8(name: str, **float8: Any) -> Case:
    return Case(name, 2, training=BF16, base=WIDE, chunk_size=70, float8={"emulate": True, **float8})


# FSDP2 and what SimpleFSDP does otherwise. Of two summands each: of more, gloo adds up in an order that depends on where in a buffer
# they are.
CASES = [
    (Case("fp32", 2), {}),
    (Case("bf16", 2, training=BF16), {}),
    pytest.param(
        Case("bf16_both", 2, training={**BF16, "mixed_precision_reduce": "bfloat16"}), {}, marks=pytest.mark.exhaustive
    ),
    (Case("ddp", 2, DDP2), {}),
    pytest.param(
        Case("accumulation", 2, {"fsdp_accumulation": "sharded"}, microbatches=2), {}, marks=pytest.mark.exhaustive
    ),
    (Case("blocks", 2, training=BF16, base=SHALLOWEST), BLOCKS),
    (Case("whole", 2, base=SHALLOWEST, chunk_size=70), JOINED),
    pytest.param(_case8("float8"), {}, marks=pytest.mark.exhaustive),
    (_case8("float8_gather", **GATHER8), {}),
    pytest.param(_case8("float8_precompute", **PRECOMPUTE), JOINED, marks=pytest.mark.exhaustive),
    (_case8("float8_delayed", **GATHER8, recipe_name="delayed", delayed_warmup_steps=1), {}),
    (Case("hsdp", 4, HSDP), {}),
    (Case("tp", 4, TP, base=EVEN), {}),
    pytest.param(Case("hsdp_tp", 8, {**HSDP, **TP}, base=EVEN), {}, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("case", "compilation"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_every_bit_is_fsdp2s(case: Case, compilation: dict[str, Any]) -> None:
    simple = _make_simple(case, compile=compilation)
    outcomes = run_distributed(_run_both, case.world_size, simple, case, timeout=COMPILING_SECONDS, reuse=True)
    for actual, expected in outcomes:
        assert not _find_differences(actual, expected)


# --- the collectives ---


def _record_graphs(cases: list[Case]) -> tuple[list[list[list[str]]], list[str]]:
    """Return the collectives of each case's forward and backward graph, in their order, and what tags its cached graphs."""
    names = {GATHER: "gather", SCATTER: "scatter", REDUCE: "reduce", WAIT: "wait"}
    make_boxed = compile_backends.make_boxed_func
    recorded, tags = [], []
    for case in cases:
        graphs: list[list[str]] = []

        def record(forward: Any, graphs: list[list[str]] = graphs) -> Any:
            nodes = forward.__self__.graph.nodes
            graphs.append([names[node.target] for node in nodes if node.target in names])
            return make_boxed(forward)

        torch._dynamo.reset()
        with mock.patch.object(compile_backends, "make_boxed_func", record):
            tokens, labels = make_batch(0)
            build_sharded(case)(tokens, labels=labels, loss_fn=summed_loss).backward()
        recorded.append(graphs)
        tags.append(torch.compiler.config.cache_key_tag)
    return recorded, tags


N_WEIGHTS = 1 + SHALLOW.n_layers * 9 + 2
N_UNITS = SHALLOW.n_layers + 2
# Of the embeddings backward needs no weights.
ROWS = (
    # reshard after forward, settings, gathers forward, gathers backward, reductions
    ("default", WHOLE, N_WEIGHTS, SHALLOW.n_layers * 9, N_WEIGHTS),
    ("default", JOINED, N_UNITS, SHALLOW.n_layers, N_UNITS),
    ("never", JOINED, N_UNITS, 0, N_UNITS),
    # Torch 2.11 estimates no times without a GPU.
    *[("default", {**WHOLE, "backend": "aot_eager_autobucketing"}, None, None, None)][: torch.__version__ >= "2.13"],
    # One graph for all blocks.
    ("default", BLOCKS, 9, 9, 9),
)


@pytest.mark.exhaustive
def test_passes_free_join_and_order_collectives() -> None:
    cases = [
        Case("case", 2, {"fsdp_reshard_after_forward": reshard, **SIMPLE}, compile=settings, base=EVEN)
        for reshard, settings, *_ in ROWS
    ]
    results = run_distributed(_record_graphs, 2, cases, timeout=COMPILING_SECONDS)
    tags = [tag for _, its_tags in results for tag in its_tags]
    assert len(set(tags)) == 2 * len(cases), "no graph of another policy or rank comes from a cache"
    for recorded, _ in results:
        for (_, settings, *expected), graphs in zip(ROWS, recorded, strict=True):
            forward, backward = graphs
            counts = [forward.count("gather"), backward.count("gather"), backward.count("scatter")]
            if expected[0] is None:
                assert all(count < N_WEIGHTS // 2 for count in counts), "torch's own pass joins some"
                continue
            assert counts == expected
            if settings is JOINED:
                assert forward[:3] == ["gather", "gather", "wait"], (
                    "the second unit is under way before the first is used"
                )
                assert backward[-2:] == ["wait", "wait"], "a reduction is waited for once the next has started"


def _list_gradients(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    gradients = []
    for case in cases:
        model = build_sharded(case)
        tokens, labels = make_batch(dist.get_rank())
        model(tokens, labels=labels, loss_fn=summed_loss).backward()
        gradients.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    return gradients


@pytest.mark.exhaustive
def test_inductor_comes_as_near_as_rounding() -> None:
    compilation = {**JOINED, "backend": "inductor"}
    cases = [Case("simple", 2, SIMPLE, compile=compilation, base=SHALLOWEST), Case("fsdp2", 2, base=SHALLOWEST)]
    for actual, expected in run_distributed(_list_gradients, 2, cases, timeout=COMPILING_SECONDS):
        errors = {name: (actual[name] - x).norm().item() / x.norm().item() for name, x in expected.items()}
        assert max(errors.values()) < 1e-6, errors


# --- the same parameters ---


class _Run:
    """A model that has taken a step."""

    def __init__(self, parallelism: dict[str, Any], seed: int) -> None:
        case = Case("run", 4, {**TP, **parallelism}, base=EVEN)
        self.model = build_sharded(case)
        group = self.model.output.weight.device_mesh["tp"].get_group()
        self.loss_fn = LinearCrossEntropy(tp_group=group)
        self.optimizer = build_optimizer(self.model, section=OptimizerConfig())
        self.step(seed)

    def step(self, seed: int) -> None:
        tokens, labels = make_batch(seed)
        self.model(tokens, labels=labels, loss_fn=self.loss_fn).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def manage(self, folder: str) -> CheckpointManager:
        section = CheckpointConfig(enable=True, interval=1)
        return CheckpointManager(
            {"model": self.model, "optimizer": self.optimizer}, section=section, folder=Path(folder)
        )

    def list_state(self) -> dict[str, Any]:
        return {**dict(self.model.named_parameters()), **self.optimizer.state_dict()}


def _exchange_checkpoints(folder: str) -> list[str]:
    """Save with either implementation, load with the other, and return what differs."""
    runs = {"fsdp2": _Run({}, seed=1), "simple": _Run(SIMPLE, seed=2)}
    different = []
    for source, target in (("fsdp2", "simple"), ("simple", "fsdp2")):
        saver = runs[source].manage(f"{folder}/{source}")
        saver.save(1)
        saver.close()
        saver.release_folder()
        dist.barrier()
        loader = runs[target].manage(f"{folder}/{source}")
        assert loader.load() == 1
        loader.close()
        expected, actual = runs[source].list_state(), runs[target].list_state()
        assert expected.keys() == actual.keys()
        different += [name for name in expected if not _are_equal(expected[name], actual[name])]
        # On, so that the other way has something of its own to carry.
        runs[target].step(seed=3)
    return different


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, DTensor):
        return (a.placements, a.device_mesh.mesh_dim_names) == (b.placements, b.device_mesh.mesh_dim_names) and bool(
            torch.equal(a._local_tensor, b._local_tensor)
        )
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def test_checkpoints_serve_the_other_implementation(tmp_path: Path) -> None:
    for different in run_distributed(_exchange_checkpoints, 4, str(tmp_path)):
        assert different == []


# --- what fails ---


def _provoke() -> dict[str, str]:
    """Return what each mistake is told."""
    messages = {}

    def note(name: str, error: type[Exception], function: Any, *args: Any) -> None:
        with pytest.raises(error) as raised:
            function(*args)
        messages[name] = str(raised.value)

    automatic = Case("auto", 2, SIMPLE, compile={**WHOLE, "backend": "aot_eager_autobucketing"})
    note("uneven", ValueError, build_sharded, automatic)
    dims = ParallelDims(2, dp_shard=2)
    dims.build_mesh("cpu")
    plan = build_plan(ARGS)
    fp32 = TrainingConfig(mixed_precision_param="float32")

    def apply(model: nn.Module) -> nn.Module:
        apply_simple_fsdp(model, plan=plan, dims=dims, training=fp32)
        return model

    views = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    views[1].weight = nn.Parameter(views[0].weight.detach())
    note("views", ValueError, apply, views)
    scalar = nn.Module()
    scalar.scale = nn.Parameter(torch.ones(()))
    note("scalar", ValueError, apply, scalar)
    with torch.device("meta"):
        bare = apply(nn.Sequential(nn.Linear(4, 4)))
    note("bare", RuntimeError, bare, torch.ones(1, 4))
    return messages


def test_mistakes_are_told() -> None:
    for messages in run_distributed(_provoke, 2):
        assert "needs shards of equal size" in messages["uneven"]
        assert "tok_embeddings.weight over 2" in messages["uneven"]
        assert "share memory, but are two parameters" in messages["views"]
        assert "of no dims" in messages["scalar"]
        assert "was not initialized" in messages["bare"]
