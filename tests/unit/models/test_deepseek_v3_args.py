"""Sizes, counts, FLOPs and plan of DeepSeek-V3."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from models.common.attention import AttentionShape
from models.deepseek_v3.args import FLAVORS, DeepSeekV3Args, YarnScaling
from models.deepseek_v3.model import Transformer
from models.deepseek_v3.plan import build_plan
from models.plan import match_modules

# Of the published weights; those of V3 without the 58 x 256 biases of its router and without multi-token prediction.
PUBLISHED = {"16B": 15_706_484_224, "236B": 235_741_434_880, "671B": 671_026_419_200 - 58 * 256}
# Billions, as the papers round them.
PUBLISHED_ACTIVE = {"16B": 2.7, "236B": 21.4, "671B": 37.6}
SHAPES = {
    "16B": {"dim": 2048, "n_layers": 27, "n_dense_layers": 1, "n_heads": 16, "hidden_dim": 10944, "q_lora_rank": 0},
    "236B": {
        "dim": 5120,
        "n_layers": 60,
        "n_dense_layers": 1,
        "n_heads": 128,
        "hidden_dim": 12288,
        "q_lora_rank": 1536,
    },
    "671B": {
        "dim": 7168,
        "n_layers": 61,
        "n_dense_layers": 3,
        "n_heads": 128,
        "hidden_dim": 18432,
        "q_lora_rank": 1536,
    },
}
ROUTING = {
    "16B": {"n_experts": 64, "top_k": 6, "n_shared_experts": 2, "moe_hidden_dim": 1408, "vocab_size": 102400},
    "236B": {"n_experts": 160, "top_k": 6, "n_shared_experts": 2, "moe_hidden_dim": 1536, "vocab_size": 102400},
    "671B": {"n_experts": 256, "top_k": 8, "n_shared_experts": 1, "moe_hidden_dim": 2048, "vocab_size": 129280},
}


def build_on_meta(args: DeepSeekV3Args) -> Transformer:
    with torch.device("meta"):
        return Transformer(args)


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_n_params_equals_published(flavor: str) -> None:
    assert FLAVORS[flavor].n_params() == PUBLISHED[flavor]
    assert FLAVORS[flavor].n_active_params() / 1e9 == pytest.approx(PUBLISHED_ACTIVE[flavor], abs=0.05)


@pytest.mark.parametrize("mtp_depth", [0, 2])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_counts_equal_model(flavor: str, mtp_depth: int) -> None:
    args = dataclasses.replace(FLAVORS[flavor], mtp_depth=mtp_depth)
    model = build_on_meta(args)
    assert sum(p.numel() for p in model.parameters()) == args.n_params()
    idle = (args.n_experts - args.top_k) * 3 * args.dim * args.moe_hidden_dim
    n_mixtures = args.n_layers - args.n_dense_layers + mtp_depth
    assert args.n_params() - args.n_active_params() == n_mixtures * idle
    for layer, block in model.layers.items():
        matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
        assert args.count_matmul_params(int(layer), active=False) == matrices


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_flavor_has_published_shapes(flavor: str) -> None:
    args = FLAVORS[flavor]
    for name, value in (SHAPES[flavor] | ROUTING[flavor]).items():
        assert getattr(args, name) == value, name
    assert (args.kv_lora_rank, args.head_dim, args.v_head_dim, args.rope_theta) == (512, 192, 128, 10000.0)
    assert isinstance(args, AttentionShape)
    groups = {"16B": (1, 1), "236B": (8, 3), "671B": (8, 4)}[flavor]
    assert (args.n_expert_groups, args.n_limited_groups) == groups
    scores = {"16B": ("sigmoid", True, 1.0), "236B": ("softmax", False, 16.0), "671B": ("sigmoid", True, 2.5)}[flavor]
    assert (args.score_func, args.normalizes_gates, args.route_scale) == scores
    assert args.yarn == YarnScaling(mscale=0.707 if flavor == "16B" else 1.0)


def test_yarn_applies_beyond_the_original_length_or_always() -> None:
    args = FLAVORS["671B"]
    assert dataclasses.replace(args, max_seq_len=4096).yarn is None
    assert dataclasses.replace(args, max_seq_len=4097).yarn is args.rope_scaling
    always = YarnScaling(always=True)
    assert dataclasses.replace(args, max_seq_len=4096, rope_scaling=always).yarn is always
    assert dataclasses.replace(args, rope_scaling=None).yarn is None


# Those of the 16B model were worked out apart from this code.
@pytest.mark.parametrize(("convention", "gflop"), [("causal", 16.41), ("full", 18.11)])
def test_flops_per_token_16b_at_4096(convention: Any, gflop: float) -> None:
    assert FLAVORS["16B"].flops_per_token(4096, convention) / 1e9 == pytest.approx(gflop, abs=0.005)


@pytest.mark.parametrize(("convention", "pairs"), [("causal", 1 + 2 + 3 + 4), ("full", 16)])
def test_flops_per_token_counts_each_matrix_query_and_key(convention: Any, pairs: int) -> None:
    args = dataclasses.replace(FLAVORS["debugmodel"], mtp_depth=1)
    attention = 256 * 96 + 96 * 8 * 48 + 256 * (64 + 16) + 64 * 8 * (32 + 32) + 8 * 32 * 256
    dense, mixture = 3 * 256 * 768, 256 * 16 + (4 + 1) * 3 * 256 * 128
    output, projection = 256 * 2048, 2 * 256 * 256
    blocks = 7 * attention + dense + 6 * mixture
    # Forward and twice backward, a multiply and an add each: per pair of query and key a product of 48 and one of 32.
    per_sequence = 4 * 6 * (blocks + projection + 2 * output) + 3 * 2 * 8 * (48 + 32) * pairs * 7
    assert 4 * args.flops_per_token(4, convention) == per_sequence


def test_flops_per_token_unknown_convention_raises() -> None:
    with pytest.raises(ValueError, match="convention = 'exact'"):
        FLAVORS["16B"].flops_per_token(4096, "exact")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers = 0 must be at least 1"),
        ({"v_head_dim": 0}, "v_head_dim = 0 must be at least 1"),
        ({"q_lora_rank": -1}, "q_lora_rank = -1 must be at least 0"),
        ({"mtp_depth": -1}, "mtp_depth = -1 must be at least 0"),
        ({"balance_loss_alpha": -0.1}, "balance_loss_alpha = -0.1 must be at least 0"),
        ({"bias_update": "fast"}, "bias_update = 'fast' must be 'sign' or 'proportional'"),
        ({"n_dense_layers": 7}, "n_dense_layers = 7 must be at most n_layers = 6"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim = 15 must be even"),
        ({"moe_hidden_dim": 100}, "moe_hidden_dim = 100 must be a multiple of 8"),
        ({"dim": 252}, "dim = 252 must be a multiple of 8"),
        ({"top_k": 17}, "top_k = 17 must be at most n_experts = 16"),
        ({"n_experts": 40000, "n_expert_groups": 1, "n_limited_groups": 1}, "n_experts = 40000 must be at most 32767"),
        ({"n_expert_groups": 3}, "n_experts = 16 must be a multiple of n_expert_groups = 3"),
        ({"n_limited_groups": 5}, "n_limited_groups = 5 must be at most n_expert_groups = 4"),
        ({"n_limited_groups": 0}, "n_limited_groups = 0 must be at least 1"),
        ({"top_k": 9}, "top_k = 9 experts cannot come from n_limited_groups = 2 groups of 4"),
        ({"n_expert_groups": 16, "n_limited_groups": 4}, "n_expert_groups = 16 leaves groups of one expert"),
        ({"score_func": "relu"}, "score_func = 'relu' must be"),
        ({"attn_mask_type": "document"}, "attn_mask_type = 'document' must be"),
    ],
)
def test_args_refuse_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(FLAVORS["debugmodel"], **changes)


@pytest.mark.parametrize("changes", [{"factor": 0.5}, {"beta_slow": 32.0}, {"beta_slow": 0.0}, {"mscale": 0.0}])
def test_yarn_scaling_refuses_what_does_not_fit(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rope_scaling needs"):
        YarnScaling(**changes)


@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_plan_covers_the_model(mtp_depth: int) -> None:
    args = dataclasses.replace(FLAVORS["debugmodel"], mtp_depth=mtp_depth)
    model, plan = build_on_meta(args), build_plan(args)
    names = [name for name, _ in model.named_modules()]
    plan.check(names)
    n_blocks = args.n_layers + mtp_depth
    assert match_modules(plan.blocks, names) == [f"layers.{i}" for i in range(n_blocks)]
    assert len(match_modules(plan.attention, names)) == n_blocks
    units = [name for unit in plan.fsdp_units for glob in unit for name in match_modules(glob, names)]
    in_units = [name for unit in units for name, _ in model.get_submodule(unit).named_parameters(prefix=unit)]
    assert sorted(in_units) == sorted(name for name, _ in model.named_parameters())
    # Each parameter is in one of the modules that a pipeline may cut between, and these cost what the whole does.
    cuts = [name for glob, _ in plan.stages for name in match_modules(glob, names)]
    in_cuts = [name for cut in cuts for name, _ in model.get_submodule(cut).named_parameters(prefix=cut)]
    assert sorted(in_cuts) == sorted(in_units)
    assert sum(cost for _, cost in plan.stages) == args.flops_per_token(args.max_seq_len)
    costs = dict(plan.stages)
    assert costs["layers.0"] > costs["layers.1"] == costs["layers.5"]
