"""Sizes, counts and FLOPs of Llama 3."""

import dataclasses

import pytest
import torch

from models.llama3.args import FLAVORS, LlamaArgs, RopeScaling
from models.llama3.model import Transformer

PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


@pytest.mark.parametrize(("flavor", "count"), PUBLISHED.items())
def test_n_params_equals_published(flavor: str, count: int) -> None:
    assert FLAVORS[flavor].n_params() == count


@pytest.mark.parametrize("flavor", FLAVORS)
def test_n_params_equals_model(flavor: str) -> None:
    args = FLAVORS[flavor]
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == args.n_params()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("tok_embeddings")]
    output = args.dim * args.vocab_size if args.tie_embeddings else 0
    assert sum(p.numel() for p in matrices) + output == args.n_matmul_params()


@pytest.mark.parametrize(
    ("flavor", "hidden_dim", "factor"),
    [("1B", 8192, 32), ("3B", 8192, 32), ("8B", 14336, 8), ("70B", 28672, 8), ("405B", 53248, 8)],
)
def test_flavor_has_published_shapes(flavor: str, hidden_dim: int, factor: float) -> None:
    args = FLAVORS[flavor]
    assert (args.hidden_dim, args.vocab_size, args.rope_theta, args.n_kv_heads) == (hidden_dim, 128256, 500000.0, 8)
    assert args.head_dim == (64 if flavor == "1B" else 128)
    assert args.rope_scaling == RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    assert args.tie_embeddings == (flavor in ("1B", "3B"))


@pytest.mark.parametrize(("convention", "gflop"), [("causal", 51.47), ("full", 57.91)])
def test_flops_per_token_8b_at_8192(convention: str, gflop: float) -> None:
    assert FLAVORS["8B"].flops_per_token(8192, convention) / 1e9 == pytest.approx(gflop, abs=0.005)


@pytest.mark.parametrize(("convention", "pairs"), [("causal", 1 + 2 + 3 + 4), ("full", 16)])
def test_flops_per_token_counts_each_query_and_key(convention: str, pairs: int) -> None:
    args = LlamaArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100)
    products = 3 * 4 * args.dim * pairs * args.n_layers  # scores and values, a multiply and an add each, three times
    assert 4 * args.flops_per_token(4, convention) == 4 * 6 * args.n_matmul_params() + products


def test_flops_per_token_unknown_convention_raises() -> None:
    with pytest.raises(ValueError, match="convention = 'exact'"):
        FLAVORS["8B"].flops_per_token(8192, "exact")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 7}, "dim = 256 must be a multiple of n_heads = 7"),
        ({"n_kv_heads": 5}, "n_heads = 16 must be a multiple of n_kv_heads = 5"),
        ({"dim": 48}, "must be even"),
        ({"n_layers": 0}, "n_layers = 0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size = -1 must be at least 1"),
        ({"ffn_hidden_dim": 0}, "ffn_hidden_dim = 0 must be at least 1"),
        ({"attn_mask_type": "document"}, "attn_mask_type = 'document' must be"),
    ],
)
def test_args_refuse_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FLAVORS["debugmodel"], **changes)


@pytest.mark.parametrize("changes", [{"factor": 0.5}, {"low_freq_factor": 4.0}, {"low_freq_factor": 0.0}])
def test_rope_scaling_refuses_what_does_not_fit(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rope_scaling needs"):
        RopeScaling(**changes)
