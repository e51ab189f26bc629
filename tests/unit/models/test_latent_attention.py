"""Latent attention against a plain reference, head by head."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.common.attention import build_document_mask
from models.common.latent_attention import LatentAttention
from models.common.rope import RotaryEmbedding, rotate

DIM, HEADS, NOPE, ROPE, VALUE, RANK = 32, 3, 8, 4, 6, 10


def build_attention(q_lora_rank: int, query_scale: float = 1.0) -> LatentAttention:
    torch.manual_seed(0)
    attention = LatentAttention(
        DIM,
        HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        rope=RotaryEmbedding(ROPE, 64, theta=10000.0),
        query_scale=query_scale,
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return attention


def attend_plainly(attention: LatentAttention, x: torch.Tensor, scale: float, visible: torch.Tensor) -> torch.Tensor:
    """visible: (B, S, S)"""

    def norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    table = attention.rope.table[: x.shape[1]]
    compressed = attention.is_query_compressed
    q_latent = norm(x @ attention.wq_a.weight.t(), attention.q_norm.weight) if compressed else x
    wq = (attention.wq_b if compressed else attention.wq).weight
    latent = norm(x @ attention.wkv_a.weight[:RANK].t(), attention.kv_norm.weight)
    k_rope = rotate((x @ attention.wkv_a.weight[RANK:].t()).unsqueeze(2), table).squeeze(2)
    out = torch.zeros_like(x)
    for head in range(HEADS):
        q = q_latent @ wq[head * (NOPE + ROPE) : (head + 1) * (NOPE + ROPE)].t()
        q_rope = rotate(q[..., NOPE:].unsqueeze(2), table).squeeze(2)
        kv = latent @ attention.wkv_b.weight[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)].t()
        scores = q[..., :NOPE] @ kv[..., :NOPE].transpose(1, 2) + q_rope @ k_rope.transpose(1, 2)
        scores = (scores * scale).masked_fill(~visible, float("-inf"))
        heads = scores.softmax(-1) @ kv[..., NOPE:]
        out = out + heads @ attention.wo.weight[:, head * VALUE : (head + 1) * VALUE].t()
    return out


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("query_scale", [1.0, 1.87])
@pytest.mark.parametrize("q_lora_rank", [0, 12])
def test_forward_equals_reference_with_gradients(q_lora_rank: int, query_scale: float, documents: bool) -> None:
    attention = build_attention(q_lora_rank, query_scale)
    x = torch.randn(2, 16, DIM, requires_grad=True)
    mask, visible = None, torch.ones(2, 16, 16, dtype=torch.bool).tril()
    if documents:
        positions = torch.cat([torch.arange(5), torch.arange(11)]).repeat(2, 1)
        mask = build_document_mask(positions, device_type="cpu")
        visible = mask[:, 0]
    found = attention(x, mask=mask)
    expected = attend_plainly(attention, x, query_scale / math.sqrt(NOPE + ROPE), visible)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(x)
    wanted = (x, *attention.parameters())
    gradients = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    torch.testing.assert_close(gradients, theirs, rtol=1e-4, atol=1e-4)


def test_positions_turn_queries_and_keys() -> None:
    attention, x = build_attention(12), torch.randn(1, 16, DIM)
    plain = attention(x)
    shifted = attention(x, positions=torch.arange(16).unsqueeze(0) + 40)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-5)  # only distances count
    stretched = attention(x, positions=torch.arange(16).unsqueeze(0) * 3)
    assert (stretched - plain).abs().max() > 1e-2


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_takes_the_head_sizes_of_deepseek(dtype: torch.dtype, is_masked: bool) -> None:
    """192 for queries and keys, 128 for values, without padding."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, width, dtype=dtype, requires_grad=True) for width in (192, 192, 128))
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril() if is_masked else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    out.float().square().sum().backward()
    scores = (q.float() @ k.float().transpose(2, 3) / math.sqrt(192)).masked_fill(
        torch.ones(24, 24, dtype=torch.bool).triu(1), float("-inf")
    )
    expected = scores.softmax(-1) @ v.float()
    assert out.shape == (1, 2, 24, 128)
    assert (out - expected).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()
    assert v.grad.norm() > 0
