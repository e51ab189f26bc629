"""Attention on a GPU: the kernels that really run, and FlexAttention against the dense mask."""

import dataclasses

import pytest
import torch

from models.common.attention import (
    DotProductAttention,
    attention_kernels,
    build_document_mask,
    describe_attention_kernel,
    get_slow_attention_reason,
)
from models.llama3.args import FLAVORS, LlamaArgs
from models.llama3.model import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = LlamaArgs(dim=512, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=256, max_seq_len=512)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is preferred from Hopper on")


@pytest.mark.parametrize("flavor", ["debugmodel", "1B", "8B"])
def test_describe_attention_kernel_is_cudnn_on_hopper(flavor: str) -> None:
    needs_hopper()
    with attention_kernels("cuda"):
        description = describe_attention_kernel(FLAVORS[flavor], 1, 2048, "cuda", torch.bfloat16)
    assert description.startswith("cuDNN: ")
    assert "sdpa" in description
    assert get_slow_attention_reason(description, "cuda") is None


def test_describe_attention_kernel_fp32_avoids_the_math_kernel_with_grouped_heads() -> None:
    with attention_kernels("cuda"):
        description = describe_attention_kernel(FLAVORS["8B"], 1, 1024, "cuda", torch.float32)
    assert description.startswith("memory-efficient: ")
    assert get_slow_attention_reason(description, "cuda") is not None


def test_compiled_block_runs_the_kernel_of_the_run() -> None:
    needs_hopper()
    torch._dynamo.reset()
    with torch.device("cuda"):
        block = Transformer(SMALL).layers["0"].to(torch.bfloat16)
        x = torch.randn(2, 512, 512, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    with attention_kernels("cuda"):
        compiled(x).sum().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(x).sum().backward()
            torch.cuda.synchronize()
    attention = [event.key for event in profile.key_averages() if "sdpa" in event.key or "flash_" in event.key]
    assert attention
    assert all(name.startswith("cudnn") for name in attention), attention


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_fp32_attention_equals_double(n_kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 8, 256, 64, device="cuda")
    k, v = (torch.randn(2, n_kv_heads, 256, 64, device="cuda") for _ in range(2))
    with attention_kernels("cuda"):
        ours = DotProductAttention()(q, k, v)
    exact = DotProductAttention()(*(x.double().cpu() for x in (q, k, v)))
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_document_mask_equals_dense(compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    args = dataclasses.replace(SMALL, attn_mask_type="block_causal")
    with torch.device("cuda"):
        flex, dense = Transformer(args), Transformer(args)
    dense.load_state_dict(flex.state_dict())
    if compiled:
        for block in flex.layers.values():
            block.compile(fullgraph=True)
    tokens = torch.randint(0, 256, (2, 512), device="cuda")
    for lengths in ((100, 300, 112), (1, 511), (512,)):
        rows = [torch.cat([torch.arange(n) for n in row]) for row in (lengths, lengths[::-1])]
        positions = torch.stack(rows).cuda()
        results = []
        # A later mask must not need a new graph.
        with torch._dynamo.config.patch(error_on_recompile=bool(lengths[0] != 100)):
            for model, device_type in ((flex, "cuda"), (dense, "cpu")):
                model.zero_grad()
                mask = build_document_mask(positions, device_type=device_type)
                logits = model(tokens, positions=positions, mask=mask)
                logits.logsumexp(-1).sum().backward()
                results.append((logits.detach(), [p.grad for p in model.parameters()]))
        (ours, gradients), (theirs, expected) = results
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        for ours_grad, theirs_grad in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours_grad, theirs_grad, rtol=0, atol=1e-4 * theirs_grad.abs().max().item())
