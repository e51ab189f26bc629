"""The cut of a model into stages: which modules make which, and the parts of the network that a rank is left with."""

import dataclasses
import itertools
import random

import pytest
import torch

from models.llama3.args import FLAVORS, LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from trainer.config.pipeline_layout import StageModule, cut_by_cost, list_stage_modules, plan_pipeline
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed.pipeline_stages import Stage, split_into_stages

ARGS = LlamaArgs(dim=18, n_layers=4, n_heads=3, n_kv_heads=1, vocab_size=67, ffn_hidden_dim=26, max_seq_len=16)


def make_modules(n_blocks: int, *, embedding: float = 0.0, output: float = 0.0) -> list[StageModule]:
    """embedding, output: what they cost, in blocks."""
    costs = (("tok_embeddings", embedding), ("layers.*", 1.0), ("norm", 0.0), ("output", output))
    return list_stage_modules(costs, blocks="layers.*", n_blocks=n_blocks)


def make_section(degree: int = 2, schedule: str = "1F1B", **options: object) -> ParallelismConfig:
    return ParallelismConfig(pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule, **options)


def count_blocks(stages: object) -> list[int]:
    return [sum(name.startswith("layers.") for name in stage) for stage in stages]


# --- by cost ---


def test_stages_are_contiguous_and_whole() -> None:
    modules = make_modules(7, output=2.0)
    for n_stages in range(1, 8):
        stages = cut_by_cost(modules, n_stages)
        assert [name for stage in stages for name in stage] == [module.name for module in modules]
        assert min(count_blocks(stages)) >= 1


@pytest.mark.parametrize(
    ("n_blocks", "n_stages", "embedding", "output", "expected"),
    [
        (32, 4, 0.0, 0.0, [8, 8, 8, 8]),
        (30, 8, 0.0, 0.0, [4, 4, 4, 4, 4, 4, 3, 3]),  # more in front
        (32, 4, 0.0, 2.1, [9, 9, 8, 6]),  # 6 + 2.1 is less than 9, 7 + 2.1 more
        (30, 4, 1.0, 1.0, [7, 8, 8, 7]),
        (4, 4, 0.0, 9.0, [1, 1, 1, 1]),  # a block each, whatever the output costs
        (5, 2, 9.0, 0.0, [1, 4]),
    ],
)
def test_cost_decides_the_cut(
    n_blocks: int, n_stages: int, embedding: float, output: float, expected: list[int]
) -> None:
    assert count_blocks(cut_by_cost(make_modules(n_blocks, embedding=embedding, output=output), n_stages)) == expected


def test_no_cut_is_cheaper_nor_as_cheap_and_more_even() -> None:
    """Against all cuts there are, for rows of uneven blocks."""
    generator = random.Random(0)
    for _ in range(40):
        costs = [generator.choice([1.0, 1.0, 1.5, 3.0]) for _ in range(8)]
        modules = [StageModule(f"layers.{i}", cost, is_block=True) for i, cost in enumerate(costs)]
        n_stages = generator.randint(1, 8)

        def measure(cuts: tuple[int, ...], costs: list[float] = costs) -> tuple[float, float, list[int]]:
            parts = [costs[begin:end] for begin, end in itertools.pairwise((0, *cuts, 8))]
            sums = [sum(part) for part in parts]
            return max(sums), sum(total**2 for total in sums), [-len(part) for part in parts]

        best = min(measure(cuts) for cuts in itertools.combinations(range(1, 8), n_stages - 1))
        assert count_blocks(cut_by_cost(modules, n_stages)) == [-size for size in best[2]]


def test_models_are_cut_quickly_enough_for_a_check_before_the_run() -> None:
    args = dataclasses.replace(FLAVORS["405B"], max_seq_len=8192)
    plan = build_plan(args)
    modules = list_stage_modules(plan.stages, blocks=plan.blocks, n_blocks=args.n_layers)
    layout = plan_pipeline(make_section(16, "Interleaved1F1B"), modules)
    assert count_blocks(layout.stages) == [*[4] * 30, 3, 3]  # the output costs about half a block
    assert layout.ranks == tuple(stage % 16 for stage in range(32))


def test_blocks_of_different_cost_are_named_one_by_one() -> None:
    costs = (("tok_embeddings", 0.0), ("layers.0", 1.0), *((f"layers.{i}", 4.0) for i in range(1, 5)), ("output", 4.0))
    modules = list_stage_modules(costs, blocks="layers.*", n_blocks=5)
    assert [module.name for module in modules] == [name for name, _ in costs]
    assert count_blocks(cut_by_cost(modules, 2)) == [3, 2]


def make_predicting_modules() -> list[StageModule]:
    """Four blocks, and two of multi-token prediction that must stay with the output."""
    names = ("tok_embeddings", *(f"layers.{i}" for i in range(4)), "norm", "layers.4", "layers.5", "output")
    last_stage = ("layers.4", "layers.5", "output")
    return list_stage_modules([(name, 1.0) for name in names], blocks="layers.*", n_blocks=6, last_stage=last_stage)


@pytest.mark.parametrize("n_stages", [2, 3, 4, 5])
def test_what_the_last_stage_needs_stays_together(n_stages: int) -> None:
    stages = cut_by_cost(make_predicting_modules(), n_stages)
    assert len(stages) == n_stages
    assert stages[-1][-3:] == ["layers.4", "layers.5", "output"]


def test_last_stage_that_lacks_what_it_needs_is_refused() -> None:
    first = ["tok_embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "layers.4"]
    section = make_section(module_fqns_per_model_part=[first, ["layers.5", "output"]])
    with pytest.raises(ValueError, match=r"stage 1: layers.5 needs layers.4 in its stage. Name both in the last"):
        plan_pipeline(section, make_predicting_modules())
    with pytest.raises(ValueError, match=r"6 stages need a block each, but the model has 5"):
        cut_by_cost(make_predicting_modules(), 6)


def test_fewer_blocks_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 stages need a block each, but the model has 6.*lower .*_parallel_degree"):
        plan_pipeline(make_section(4, "Interleaved1F1B"), make_modules(6))


def test_ends_count_as_many_layers_as_the_section_says() -> None:
    modules = make_modules(14, output=9.0)
    section = make_section(4, pipeline_parallel_first_stage_less_layers=1, pipeline_parallel_last_stage_less_layers=1)
    assert count_blocks(plan_pipeline(section, modules).stages) == [3, 4, 4, 3]
    section = dataclasses.replace(section, pipeline_parallel_last_stage_less_layers=0)
    assert count_blocks(plan_pipeline(section, modules).stages) == [3, 4, 4, 3]
    section = dataclasses.replace(section, pipeline_parallel_first_stage_less_layers=0)
    assert count_blocks(plan_pipeline(section, modules).stages) == [4, 4, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [
        ("1F1B", (0, 1, 2)),
        ("GPipe", (0, 1, 2)),
        ("Interleaved1F1B", (0, 1, 2, 0, 1, 2)),
        ("ZBVZeroBubble", (0, 1, 2, 2, 1, 0)),
        ("DualPipeV", (0, 1, 2, 2, 1, 0)),
    ],
)
def test_schedule_gives_number_and_ranks_of_stages(schedule: str, ranks: tuple[int, ...]) -> None:
    layout = plan_pipeline(make_section(3, schedule), make_modules(6))
    assert layout.ranks == ranks
    assert len(layout.stages) == len(ranks)
    assert layout.n_ranks == 3
    assert layout.stages_of(0) == [stage for stage, rank in enumerate(ranks) if rank == 0]


def test_file_gives_number_and_ranks_of_stages(tmp_path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,2F0,4F0,4B0,2B0,0B0\n1F0,3F0,5F0,5B0,3B0,1B0\n")
    layout = plan_pipeline(
        make_section(schedule="no matter", pipeline_parallel_schedule_csv=str(path)), make_modules(6)
    )
    assert layout.ranks == (0, 1, 0, 1, 0, 1)
    assert count_blocks(layout.stages) == [1] * 6
    section = make_section(pipeline_parallel_schedule_csv=str(path), pipeline_parallel_layers_per_stage=3)
    with pytest.raises(ValueError, match=r"schedule_csv = .* has 6\. Use 1 layers a stage"):
        plan_pipeline(section, make_modules(6))


# --- by layers ---


def test_layers_a_stage_give_the_number_of_stages() -> None:
    section = make_section(4, "Interleaved1F1B", pipeline_parallel_layers_per_stage=4)
    layout = plan_pipeline(section, make_modules(32, output=9.0))
    assert count_blocks(layout.stages) == [4] * 8
    # As in torchtitan, whose default it is that either end counts as one.
    ends = {"pipeline_parallel_first_stage_less_layers": 1, "pipeline_parallel_last_stage_less_layers": 1}
    layout = plan_pipeline(dataclasses.replace(section, **ends), make_modules(30, output=9.0))
    assert count_blocks(layout.stages) == [3, *[4] * 6, 3]


@pytest.mark.parametrize(
    ("schedule", "layers", "message"),
    [
        (
            "1F1B",
            4,
            r"32 layers into 8 stages, but .*schedule = 1F1B with .*degree = 4 takes 4 stages.* Use 8 or 9 ",
        ),
        (
            "Interleaved1F1B",
            8,
            r"into 4 stages, but .* takes a multiple of 4 stages, at least 8, not 4\. Use 2 or 4 layers a stage",
        ),
        (
            "ZBV",
            2,
            r"into 16 stages, but .* takes 8 stages, not 16\. Use 4 layers a stage, or another schedule",
        ),
    ],
)
def test_layers_a_stage_that_do_not_come_out_are_refused_with_those_that_do(
    schedule: str, layers: int, message: str
) -> None:
    section = make_section(4, schedule, pipeline_parallel_layers_per_stage=layers)
    with pytest.raises(ValueError, match=r"parallelism.pipeline_parallel_layers_per_stage = \d cuts .*" + message):
        plan_pipeline(section, make_modules(32))


# --- by name ---

NAMED = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "output"]]


def test_named_stages_are_taken() -> None:
    layout = plan_pipeline(make_section(module_fqns_per_model_part=NAMED), make_modules(4))
    assert layout.stages == tuple(map(tuple, NAMED))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [["tok_embeddings", "layers.0", "layer.1"], []],
            r"stage 0: layer.1 is no module .* tok_embeddings, layers.0, ",
        ),
        ([NAMED[0], ["layers.0", *NAMED[1]]], r"stage 1: layers.0 is in stage 0 already"),
        ([["tok_embeddings"], ["layers.0", *NAMED[1]]], r"stage 0: has no block"),
        ([NAMED[0], NAMED[1][:-1]], r"output is in no stage"),
        ([["layers.0", "tok_embeddings"], NAMED[1]], r"stage 0: layers.0 comes where tok_embeddings should"),
        (
            [["tok_embeddings", "layers.1"], ["layers.0", *NAMED[1][1:]]],
            r"stage 0: layers.1 comes where layers.0 should",
        ),
        ([[*NAMED[0], *NAMED[1]]], r"names 1 stages, but .*schedule = 1F1B with .* takes 2 stages, not 1"),
    ],
)
def test_named_stages_that_are_not_the_model_are_refused(parts: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=f"parallelism.module_fqns_per_model_part.*{message}"):
        plan_pipeline(make_section(module_fqns_per_model_part=parts), make_modules(4))


def test_two_ways_to_cut_are_refused() -> None:
    section = make_section(module_fqns_per_model_part=NAMED, pipeline_parallel_layers_per_stage=2)
    with pytest.raises(ValueError, match=r"module_fqns_per_model_part and .*layers_per_stage are two ways"):
        plan_pipeline(section, make_modules(4))


# --- parts of the network ---


def split(args: LlamaArgs = ARGS, *, schedule: str = "1F1B", rank: int = 0) -> tuple[Transformer, list[Stage]]:
    torch.manual_seed(0)
    model = Transformer(args)
    section = make_section(schedule=schedule)
    return model, split_into_stages(model, plan=build_plan(args), parallelism=section, rank=rank)


def test_model_keeps_what_the_rank_has_under_its_names() -> None:
    names = []
    for rank in (0, 1):
        model, stages = split(schedule="ZBV", rank=rank)
        assert [stage.index for stage in stages] == [[0, 3], [1, 2]][rank]
        mine = [name for name, _ in model.named_parameters()]
        assert sorted(mine) == sorted(name for stage in stages for name, _ in stage.module.named_parameters())
        assert model.param_inits().keys() == set(mine)
        assert (model.tok_embeddings is None) == (model.norm is None) == (model.output is None) == (rank == 1)
        names += mine
    assert sorted(names) == sorted(name for name, _ in Transformer(ARGS).named_parameters())


def test_distributions_go_by_the_number_in_the_whole_network() -> None:
    model, (stage,) = split(rank=1)
    whole = Transformer(ARGS).param_inits()
    assert list(model.layers) == ["2", "3"]
    for part in (model, stage.module):
        assert part.param_inits() == {name: whole[name] for name, _ in part.named_parameters()}


def test_stages_share_modules_and_buffers_of_the_model_and_no_hooks() -> None:
    model, stages = split(schedule="Interleaved1F1B")
    for stage in stages:
        own = dict(model.named_modules())
        for name, module in stage.module.named_modules():
            assert (own[name] is module) == (name not in ("", "layers"))
        stage.module.register_forward_hook(lambda *_: None)
    assert not model._forward_hooks
    assert len({id(stage.module.rope) for stage in stages}) == 1
    model.register_buffer("mine", torch.zeros(1, device="meta"))
    model._buffers["mine"] = torch.ones(1)  # as buffers of a model on meta are given memory
    assert all(dict(stage.module.named_buffers())["mine"] == 1 for stage in stages)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "DualPipeV"])
def test_stages_one_after_the_other_are_the_network(schedule: str) -> None:
    torch.manual_seed(0)
    whole = Transformer(ARGS)
    stages = sorted(
        (stage for rank in (0, 1) for stage in split(schedule=schedule, rank=rank)[1]), key=lambda stage: stage.index
    )
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(stages) - 1) + [True]
    tokens = torch.randint(ARGS.vocab_size, (2, 7))
    h = tokens
    for stage in stages[:-1]:
        h = stage.module(h)
        assert h.shape == (2, 7, ARGS.dim)
    assert torch.equal(stages[-1].module(h), whole(tokens))

    def count(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (hidden @ weight.t()).sum() + labels.sum()

    assert torch.equal(stages[-1].module(h, labels=tokens, loss_fn=count), whole(tokens, labels=tokens, loss_fn=count))


def test_stage_builds_its_mask_from_positions() -> None:
    args = dataclasses.replace(ARGS, attn_mask_type="block_causal")
    torch.manual_seed(0)
    whole = Transformer(args)
    (first,), (second,) = (split(args, rank=rank)[1] for rank in (0, 1))
    tokens, positions = torch.randint(args.vocab_size, (2, 7)), (torch.arange(7) % 3).expand(2, 7)
    assert torch.equal(
        second.module(first.module(tokens, positions=positions), positions=positions),
        whole(tokens, positions=positions),
    )


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output and tok_embeddings share a parameter.*without tied embeddings"):
        split(dataclasses.replace(ARGS, tie_embeddings=True))


def test_parameter_of_no_stage_is_refused() -> None:
    model = Transformer(ARGS)
    model.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="scale is in none of the plan's `stages`"):
        split_into_stages(model, plan=build_plan(ARGS), parallelism=make_section(), rank=0)
