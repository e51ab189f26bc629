"""Rotary embeddings against complex arithmetic and the published formula."""

import math

import pytest
import torch

from models.common.rope import (
    RotaryEmbedding,
    get_yarn_mscale,
    rotate,
    scale_frequencies,
    scale_frequencies_yarn,
)

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}


def turn_complex(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """x: (B, S, N, H), positions: (B, S); in fp64."""
    head_dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = positions[:, :, None, None].double() * frequencies
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize("given", [False, True])
def test_forward_equals_complex_product(given: bool) -> None:
    torch.manual_seed(0)
    rope = RotaryEmbedding(16, 64, theta=10000.0)
    q, k = torch.randn(2, 24, 4, 16), torch.randn(2, 24, 2, 16)
    positions = torch.arange(24).repeat(2, 1)
    if given:
        positions = torch.stack((torch.arange(40, 64), torch.cat((torch.arange(10), torch.arange(14)))))
    turned = rope(q, k, positions=positions if given else None)
    for ours, x in zip(turned, (q, k), strict=True):
        torch.testing.assert_close(ours.double(), turn_complex(x, positions, 10000.0), rtol=0, atol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    rope = RotaryEmbedding(32, 256, theta=10000.0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    scores = [
        rotate(q, rope.table[at + 7][None]).mul(rotate(k, rope.table[at][None])).sum().item() for at in (0, 50, 200)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)


def test_rotate_bf16_computes_in_fp32_and_returns_bf16() -> None:
    torch.manual_seed(0)
    table = RotaryEmbedding(16, 64, theta=10000.0).table
    x = torch.randn(2, 64, 4, 16).bfloat16()
    turned = rotate(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), table).bfloat16())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_table_stays_fp32_and_in_no_state_dict(device: str) -> None:
    with torch.device(device):
        rope = RotaryEmbedding(16, 64, theta=10000.0)
    if device == "cpu":
        before = rope.table.clone()
        assert torch.equal(rope.to(torch.bfloat16).table, before)
    rope.to(torch.bfloat16)
    assert rope.table.shape == (64, 8, 2)
    assert rope.table.dtype == torch.float32
    assert rope.state_dict() == {}


def test_init_buffers_after_meta_equals_direct() -> None:
    direct = RotaryEmbedding(16, 64, theta=10000.0)
    with torch.device("meta"):
        rope = RotaryEmbedding(16, 64, theta=10000.0)
        assert rope.table.is_meta
        rope.init_buffers("cpu")  # the ambient device must not matter
    assert torch.equal(rope.table, direct.table)


def test_scale_frequencies_follows_the_three_bands() -> None:
    wavelengths = torch.tensor([10.0, 2047.0, 2048.0, 4096.0, 8192.0, 100000.0])
    scaled = scale_frequencies(2 * math.pi / wavelengths, **LLAMA31)
    ratio = (scaled * wavelengths / (2 * math.pi)).tolist()
    # At 4096 tokens a wave turns twice in the original length: a third of the way from 1 to 4 turns.
    between = 1 / 3 + (2 / 3) / 8
    assert ratio == pytest.approx([1.0, 1.0, 1.0, between, 1 / 8, 1 / 8], rel=1e-5)


YARN = {"theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 4096}


def test_scale_frequencies_yarn_follows_the_three_bands() -> None:
    frequencies = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    ratio = scale_frequencies_yarn(frequencies, **YARN) / frequencies
    turns = 4096 * frequencies / (2 * math.pi)
    # Of DeepSeek-V3's 32 pairs those up to 10 turn more than 32 times, and those from 23 on less than once.
    first, last = 10, 23
    assert (turns > 32).sum() == 11
    assert (turns < 1).sum() == 9
    assert ratio[: first + 1].tolist() == [1.0] * 11
    assert ratio[last:].tolist() == pytest.approx([1 / 40] * 9)
    between = [1 - (i - first) / (last - first) * (1 - 1 / 40) for i in range(first, last)]
    assert ratio[first:last].tolist() == pytest.approx(between, rel=1e-5)


def test_scale_frequencies_yarn_with_an_empty_band_divides_by_nothing() -> None:
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    scaled = scale_frequencies_yarn(
        frequencies, **YARN | {"original_max_seq_len": 4, "beta_fast": 1.0, "beta_slow": 0.9}
    )
    assert scaled.isfinite().all()
    assert (scaled / frequencies)[1:].tolist() == pytest.approx([1 / 40] * 3)


@pytest.mark.parametrize(
    ("factor", "mscale", "expected"), [(40.0, 1.0, 1.36888), (40.0, 0.707, 1.26080), (1.0, 1.0, 1.0)]
)
def test_get_yarn_mscale_of_published_models(factor: float, mscale: float, expected: float) -> None:
    assert get_yarn_mscale(factor, mscale) == pytest.approx(expected, abs=1e-5)
