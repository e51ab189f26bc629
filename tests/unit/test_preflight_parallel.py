"""Parallelisms that do not fit the model, found before torch is loaded."""

import dataclasses
import json

import pytest

from models import registry
from models.llama3.args import FLAVORS
from models.llama3.plan import build_plan
from models.plan import ParallelPlan
from trainer.config.errors import ConfigError
from trainer.config.manager import load_config
from trainer.config.schema_parallel import ParallelismConfig
from trainer.preflight import check
from trainer.preflight_parallel import Model, find_parallel_model_problems

TP = "parallelism.tensor_parallel_degree"
CP = "parallelism.context_parallel_degree"
PP = "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
LAYERS = "parallelism.pipeline_parallel_layers_per_stage"
PARTS = "parallelism.module_fqns_per_model_part"
_BLOCKS = [f"layers.{i}" for i in range(32)]
THREE_STAGES = json.dumps([["tok_embeddings", *_BLOCKS[:10]], _BLOCKS[10:20], [*_BLOCKS[20:], "norm", "output"]])
ULYSSES = {"parallelism.context_parallel_method": "ulysses"}


def problems_of(settings, world_size=None):
    """Problems of Llama 3 8B, or of the flavor that `settings` name."""
    settings = {"model.flavor": "8B", "training.seq_len": 8192, **settings}
    try:
        check(load_config([f"--{key}={value}" for key, value in settings.items()]), world_size)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture
def register(monkeypatch):
    """Registers a family `mine` with one flavor, `tiny`."""

    def call(*, plan=build_plan, **sizes):
        args = dataclasses.replace(FLAVORS["debugmodel"], **sizes)
        spec = dataclasses.replace(
            registry.get_model_spec("llama3"), name="mine", flavors={"tiny": args}, build_plan=plan
        )
        monkeypatch.setattr(registry, "_registered", {"mine": spec})
        return {"model.name": "mine", "model.flavor": "tiny"}

    return call


@pytest.mark.parametrize(
    ("degree", "sizes", "remedy"),
    [
        (3, {"dim": 384, "n_heads": 16, "n_kv_heads": 4}, "Use 1, 2, 4, 8 or 16."),
        (32, {"dim": 384, "n_heads": 16, "n_kv_heads": 4}, "Use 1, 2, 4, 8 or 16."),
        (4, {"dim": 384, "n_heads": 12, "n_kv_heads": 6, "ffn_hidden_dim": 960}, "Use 1, 2, 3, 6 or 12."),
        (2, {"dim": 384, "n_heads": 12, "n_kv_heads": 12, "ffn_hidden_dim": 99}, "Use 1 or 3."),
    ],
)
def test_tensor_parallel_degree_that_does_not_fit_the_heads_is_refused(register, degree, sizes, remedy):
    (problem,) = problems_of({**register(**sizes), TP: degree, "training.seq_len": 96 * degree})
    assert problem.startswith(
        f"{TP} = {degree}: must divide n_heads = {sizes['n_heads']} of model.flavor = tiny of mine"
    )
    assert f"n_kv_heads = {sizes['n_kv_heads']}" in problem
    assert remedy in problem


@pytest.mark.parametrize(
    ("degree", "sizes"),
    [
        (4, {"n_heads": 16, "n_kv_heads": 4}),
        (2, {"n_heads": 16, "n_kv_heads": 4}),
        (16, {"n_heads": 16, "n_kv_heads": 4}),  # each key and value head on four ranks
        (16, {"n_heads": 16, "n_kv_heads": 1}),
        (3, {"dim": 384, "n_heads": 12, "n_kv_heads": 12, "ffn_hidden_dim": 99}),
        (8, {"vocab_size": 2049}),  # need not divide
        (8, {"tie_embeddings": True}),
    ],
)
def test_tensor_parallel_degree_that_fits_is_in_order(register, degree, sizes):
    assert problems_of({**register(**sizes), TP: degree, "training.seq_len": 96}) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({CP: 16}, ["32 query heads and 8 key and value heads.", "Use 2, 4 or 8, or "]),
        (
            {CP: 8, TP: 2},
            ["16 query heads and 4 key and value heads on each of 2 tensor-parallel ranks", "Use 2 or 4, or"],
        ),
        (
            {CP: 2, TP: 8},
            ["4 query heads and 1 key and value heads", ". Use parallelism.context_parallel_method = allgather"],
        ),
        ({CP: 2, TP: 16}, ["2 query heads and 1 key and value heads"]),
    ],
)
def test_ulysses_degree_that_does_not_divide_the_heads_is_refused(settings, expected):
    (problem,) = problems_of({**ULYSSES, **settings})
    assert problem.startswith(f"{CP} = {settings[CP]} with parallelism.context_parallel_method = ulysses: ")
    for words in (*expected, "allgather or ring"):
        assert words in problem


@pytest.mark.parametrize(
    "settings", [{CP: 8, **ULYSSES}, {CP: 4, TP: 2, **ULYSSES}, {CP: 16}, {CP: 16, TP: 8}, {CP: 1, TP: 16, **ULYSSES}]
)
def test_context_parallel_degree_that_fits_is_in_order(settings):
    assert problems_of(settings) == []


@pytest.mark.parametrize(("key", "attribute"), [(TP, "tp"), (CP, "attention"), (PP, "stages")])
def test_model_whose_plan_leaves_a_parallelism_out_is_refused(register, key, attribute):
    names = register(plan=lambda args: ParallelPlan(fsdp_units=(), blocks="layers.*"))
    (problem,) = problems_of({**names, key: 2})
    assert problem.startswith(f"{key} = 2: model.flavor = tiny of mine ")
    assert f"`{attribute}`" in problem
    assert "Use 1, and " in problem
    assert problems_of(names) == []


def test_model_with_args_of_its_own_is_left_to_itself(register, monkeypatch):
    names = register()

    @dataclasses.dataclass(frozen=True)
    class Args:
        vocab_size: int = 4096
        max_seq_len: int = 64
        attn_mask_type: str = "causal"

    def plan(args):
        return ParallelPlan(fsdp_units=(), blocks="layers.*", tp={"layers.*": "colwise"}, attention="layers.*")

    spec = dataclasses.replace(registry.get_model_spec("mine"), flavors={"tiny": Args()}, build_plan=plan)
    monkeypatch.setattr(registry, "_registered", {"mine": spec})
    assert problems_of({**names, **ULYSSES, TP: 4, CP: 2}) == []


def test_tied_embeddings_under_a_pipeline_are_refused():
    (problem,) = problems_of({"model.flavor": "1B", PP: 2})
    assert problem.startswith(f"{PP} = 2: model.flavor = 1B of llama3 has tied embeddings")
    assert "Use 1, and shard with" in problem
    assert problems_of({"model.flavor": "1B", TP: 2, CP: 2}) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({PP: 33, "training.local_batch_size": 33}, ["33 stages", "the model has 32", f"lower {PP}"]),
        ({PP: 17, SCHEDULE: "ZBVZeroBubble", "training.local_batch_size": 34}, ["34 stages", "the model has 32"]),
        ({PP: 4, LAYERS: 4}, [f"{LAYERS} = 4", "32 layers", "8 stages", f"{SCHEDULE} = 1F1B", "takes 4 stages"]),
        ({PP: 2, LAYERS: 4, PARTS: '[["a"], ["b"]]'}, [LAYERS, PARTS, "Set one of them"]),
        ({PP: 2, PARTS: '[["tok_embeddings"], ["layers.0"]]'}, [PARTS, "has no block"]),
        ({PP: 2, PARTS: '[["layers.0"], ["layer.1"]]'}, [PARTS, "layer.1 is no module"]),
        ({PP: 2, PARTS: '[["layers.0"], ["layers.1"]]'}, [PARTS, "tok_embeddings", "is in no stage"]),
        ({PP: 2, PARTS: THREE_STAGES}, [PARTS, "3 stages", f"{SCHEDULE} = 1F1B", "takes 2 stages"]),
    ],
)
def test_stages_that_cannot_be_made_are_refused(settings, expected):
    (problem,) = problems_of(settings)
    assert problem.startswith("parallelism.")
    for words in expected:
        assert words in problem


@pytest.mark.parametrize(
    "settings",
    [
        {PP: 32, "training.local_batch_size": 32},
        {PP: 16, SCHEDULE: "ZBVZeroBubble", "training.local_batch_size": 32},
        {PP: 4, SCHEDULE: "Interleaved1F1B", LAYERS: 4},
        {PP: 4, LAYERS: 8},
        {PP: 3, PARTS: THREE_STAGES},
    ],
)
def test_stages_that_can_be_made_are_in_order(settings):
    assert problems_of(settings) == []


def test_schedule_that_is_not_there_is_told_once():
    (problem,) = problems_of({PP: 2, SCHEDULE: "none"})
    assert problem.startswith(f"{SCHEDULE} = none: unknown schedule")
    (problem,) = problems_of({PP: 2, "parallelism.pipeline_parallel_schedule_csv": "/no/where.csv"})
    assert "/no/where.csv" in problem


def test_combination_found_without_the_model_does_not_hide_what_the_model_refuses():
    problems = problems_of({TP: 3}, world_size=8)
    starts = [
        "training.seq_len = 8192: must be a multiple of",
        "parallelism.data_parallel_shard",
        f"{TP} = 3: must divide",
    ]
    assert [p.startswith(start) for p, start in zip(problems, starts, strict=True)] == [True] * 3


def test_degree_that_is_wrong_in_itself_is_told_once():
    (problem,) = problems_of({TP: -3, CP: 2, **ULYSSES})
    assert problem.startswith(f"{TP} = -3: must be at least 1")


# --- experts ---

EP = "parallelism.expert_parallel_degree"
ETP = "parallelism.expert_tensor_parallel_degree"
EXPERTS = {"model.name": "deepseek_v3", "model.flavor": "debugmodel", "training.seq_len": 2048}


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({EP: 3}, 3, [f"{EP} = 3: must divide n_experts = 16 of model.flavor = debugmodel", "Use 1, 2, 4, 8 or 16."]),
        ({EP: 32}, 32, [f"{EP} = 32: must divide n_experts = 16", "Use 1, 2, 4, 8 or 16."]),
        ({"model.flavor": "16B", TP: 3}, 3, [f"{TP} = 3", "divide n_shared_experts x moe_hidden_dim = 2816"]),
        ({"model.name": "llama3", EP: 2}, 2, [f"{EP} = 2: model.flavor = debugmodel of llama3 has no experts. Use 1."]),
        ({"model.name": "llama3", TP: 2, ETP: 2}, 2, [f"{ETP} = 2: model.flavor", "has no experts"]),
    ],
    ids=str,
)
def test_experts_that_ranks_cannot_share_are_refused(settings, world_size, expected):
    problems = problems_of({**EXPERTS, **settings, "training.seq_len": 2064}, world_size)
    (problem,) = [problem for problem in problems if "seq_len = " not in problem.split(":")[0]]
    assert all(part in problem for part in expected)


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [({EP: 16}, 16), ({EP: 4, TP: 2, ETP: 2}, 8), ({EP: 8, TP: 2, CP: 2}, 8), ({EP: 4, PP: 2}, 8), ({TP: 4}, 8)],
    ids=str,
)
def test_experts_that_ranks_can_share_are_in_order(settings, world_size):
    assert problems_of({**EXPERTS, **settings}, world_size) == []


def test_experts_too_narrow_to_be_cut_are_refused():
    spec = registry.get_model_spec("deepseek_v3")
    args = dataclasses.replace(spec.get_args("debugmodel"), moe_hidden_dim=24)
    degrees = ParallelismConfig(tensor_parallel_degree=2, expert_tensor_parallel_degree=2)
    (problem,) = find_parallel_model_problems(Model(args, spec.build_plan(args), "it"), degrees)
    assert str(problem).startswith(f"{ETP} = 2: moe_hidden_dim = 24 of it must be a multiple of 2 x 8")


def test_vocabulary_that_can_be_cut_neither_by_rows_nor_by_columns_is_refused():
    spec = registry.get_model_spec("deepseek_v3")
    args = dataclasses.replace(spec.get_args("debugmodel"), dim=264, n_heads=16, vocab_size=2056)
    (problem,) = find_parallel_model_problems(
        Model(args, spec.build_plan(args), "it"), ParallelismConfig(tensor_parallel_degree=16)
    )
    assert "divide vocab_size = 2056 or dim = 264" in str(problem)
    assert str(problem).endswith("Use 1, 2, 4 or 8.")


def test_group_limits_that_cannot_hold_are_refused(register):
    with pytest.raises(ValueError, match="n_limited_groups"):
        dataclasses.replace(registry.get_model_spec("deepseek_v3").get_args("debugmodel"), n_limited_groups=5)
