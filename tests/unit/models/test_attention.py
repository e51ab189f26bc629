"""Attention against a plain reference, document masks, and the choice of a kernel."""

import dataclasses
import itertools
import math
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from models.common.attention import (
    Attention,
    DotProductAttention,
    attention_kernels,
    build_document_mask,
    describe_attention_kernel,
    get_slow_attention_reason,
)
from models.common.rope import RotaryEmbedding
from models.llama3.args import FLAVORS

DOCUMENTS = ((5, 1, 10), (16,), (3, 13))


def make_positions(documents: tuple[tuple[int, ...], ...] = DOCUMENTS) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])


def attend_plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """One query head at a time. q: (B, N, S, H); k, v: (B, M, S, H); visible: (B, S, S)"""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v[:, head // group])
    return torch.stack(heads, dim=1)


def see_documents(positions: torch.Tensor) -> torch.Tensor:
    """(B, S) -> (B, S, S), by looking for a beginning between key and query."""
    batch, seq = positions.shape
    visible = torch.zeros(batch, seq, seq, dtype=torch.bool)
    for b in range(batch):
        for query in range(seq):
            for key in range(query + 1):
                visible[b, query, key] = bool((positions[b, key + 1 : query + 1] != 0).all())
    return visible


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_dot_product_attention_equals_reference_with_gradients(n_kv_heads: int, documents: bool) -> None:
    torch.manual_seed(0)
    positions = make_positions()
    q = torch.randn(3, 4, 16, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, n_kv_heads, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = build_document_mask(positions, device_type="cpu") if documents else None
    visible = see_documents(positions) if documents else torch.ones(3, 16, 16, dtype=torch.bool).tril()
    ours, plain = DotProductAttention()(q, k, v, mask=mask), attend_plainly(q, k, v, visible)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((plain * weights).sum(), (q, k, v))
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
def test_dot_product_attention_passes_gradcheck(documents: bool) -> None:
    torch.manual_seed(0)
    mask = build_document_mask(make_positions(((2, 3),)), device_type="cpu") if documents else None
    inputs = [torch.randn(1, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: DotProductAttention()(q, k, v, mask=mask), inputs)


def test_build_document_mask_dense_equals_search() -> None:
    positions = make_positions()
    mask = build_document_mask(positions, device_type="cpu")
    assert mask.shape == (3, 1, 16, 16)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[:, 0], see_documents(positions))


def test_build_document_mask_row_that_begins_inside_a_document() -> None:
    mask = build_document_mask(torch.tensor([[7, 8, 0, 1]]), device_type="cpu")
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


QUERIES = torch.tensor([2, 3, 0, 12, 15, 14])


def test_build_document_mask_for_some_queries_has_their_rows() -> None:
    positions = make_positions()
    mask = build_document_mask(positions, device_type="cpu", queries=QUERIES)
    assert torch.equal(mask, build_document_mask(positions, device_type="cpu")[:, :, QUERIES])


@pytest.mark.parametrize("queries", [None, QUERIES])
def test_build_document_mask_as_block_mask_equals_dense(
    monkeypatch: pytest.MonkeyPatch, queries: torch.Tensor | None
) -> None:
    monkeypatch.setattr("models.common.attention._compiled_create_block_mask", lambda: create_block_mask)
    positions = make_positions()
    dense = build_document_mask(positions, device_type="cpu", queries=queries)
    blocks = build_document_mask(positions, device_type="cuda", queries=queries)
    assert blocks.shape == dense.shape
    for b, query, key in itertools.product(*(range(n) for n in (3, *dense.shape[2:]))):
        places = (torch.tensor(place) for place in (b, 0, query, key))
        assert blocks.mask_mod(*places) == dense[b, 0, query, key]


def test_packed_documents_equal_separate_passes_with_gradients() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4, 2, RotaryEmbedding(8, 16, theta=10000.0))
    lengths = (5, 1, 10)
    positions = make_positions((lengths,))
    x = torch.randn(1, 16, 32, requires_grad=True)
    weights = torch.randn(1, 16, 32)
    packed = attention(x, positions=positions, mask=build_document_mask(positions, device_type="cpu"))
    separate = torch.cat([attention(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    wanted = (x, *attention.parameters())
    gradients = torch.autograd.grad((packed * weights).sum(), wanted)
    expected = torch.autograd.grad((separate * weights).sum(), wanted)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flavor", ["debugmodel", "8B"])
@pytest.mark.parametrize("attn_mask_type", ["causal", "block_causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_describe_attention_kernel_on_cpu_is_fused(flavor: str, attn_mask_type: str, dtype: torch.dtype) -> None:
    args = dataclasses.replace(FLAVORS[flavor], attn_mask_type=attn_mask_type)
    description = describe_attention_kernel(args, 2, 64, "cpu", dtype)
    assert description == "flash"
    assert get_slow_attention_reason(description, "cpu") is None


def test_describe_attention_kernel_notices_the_slow_one() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        description = describe_attention_kernel(FLAVORS["8B"], 1, 64, "cpu", torch.bfloat16)
    assert description == "math"
    assert "holds all scores" in get_slow_attention_reason(description, "cuda")
    assert get_slow_attention_reason(description, "cpu") is None, "there is no remedy"


def test_attention_kernels_on_cpu_changes_nothing() -> None:
    before = torch._C._get_sdp_priority_order()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attention_kernels("cpu"):
            assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize(("capability", "first"), [((9, 0), SDPBackend.CUDNN_ATTENTION), ((8, 0), None)])
def test_attention_kernels_puts_cudnn_first_from_hopper_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: SDPBackend | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    before = list(torch._C._get_sdp_priority_order())
    with attention_kernels("cuda"):
        inside = list(torch._C._get_sdp_priority_order())
    assert inside[0] == (before[0] if first is None else first.value)
    assert list(torch._C._get_sdp_priority_order()) == before


@pytest.mark.parametrize(
    ("description", "is_slow"),
    [
        ("cuDNN: cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", False),
        ("flash: void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", True),
        ("flash: void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<...>>>", False),
        ("memory-efficient: fmha_cutlassB_bf16_aligned_128x64_k128_sm80", True),
        ("math: ampere_sgemm_128x64_nn", True),
        ("FlexAttention", False),
    ],
)
def test_get_slow_attention_reason_on_hopper(monkeypatch: pytest.MonkeyPatch, description: str, is_slow: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert (get_slow_attention_reason(description, "cuda") is not None) == is_slow
