"""Pieces of attention put together equal attention at once, and each kernel is called as torch has it."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from trainer.distributed import blockwise_attention
from trainer.distributed.blockwise_attention import attend, attend_backward, choose_kernel, merge_piece

CUDA_KERNELS = ("cuDNN", "flash", "memory-efficient")


def make_inputs(
    queries: int, keys: int, kv_heads: int = 2, v_head_dim: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, 4, 8), (keys, kv_heads, 8), (keys, kv_heads, v_head_dim), (queries, 4, v_head_dim))
    return tuple(torch.randn(2, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, S, N, H) and the log-sum-exp (B, N, S), from all scores."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return torch.einsum("bnst,btnh->bsnh", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize(("kv_heads", "v_head_dim"), [(4, 8), (2, 8), (1, 8), (4, 6), (2, 11)])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(6, 6, True), (6, 6, False), (3, 10, False), (10, 1, False)])
def test_attend_equals_reference_with_gradients(
    queries: int, keys: int, causal: bool, kv_heads: int, v_head_dim: int
) -> None:
    q, k, v, grad_out = make_inputs(queries, keys, kv_heads, v_head_dim)
    out, lse = attend(q, k, v, causal=causal)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attend_plainly(*leaves, causal=causal)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=0, atol=1e-12)
    gradients = attend_backward(grad_out, q.detach(), k.detach(), v.detach(), out, lse, causal=causal)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, grad_out), rtol=0, atol=1e-12)
    assert all(x.is_contiguous() for x in (out, lse, *gradients))


def test_pieces_put_together_equal_the_whole_with_gradients() -> None:
    q, k, v, grad_out = make_inputs(6, 12)
    bounds = list(itertools.pairwise((0, 2, 3, 12)))
    (out, lse), *others = [attend(q, k[:, a:b], v[:, a:b], causal=False) for a, b in bounds]
    for piece in others:
        merge_piece(out, lse, *piece)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attend_plainly(*leaves, causal=False)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=0, atol=1e-12)
    found = [attend_backward(grad_out, q, k[:, a:b], v[:, a:b], out, lse, causal=False) for a, b in bounds]
    dq, dk, dv = zip(*found, strict=True)
    gradients = (torch.stack(dq).sum(0), torch.cat(dk, dim=1), torch.cat(dv, dim=1))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, grad_out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_merge_of_some_rows_changes_no_others_whatever_the_scores(scale: float) -> None:
    q, k, v, _ = make_inputs(6, 12)
    out, lse = attend(q * scale, k[:, :4], v[:, :4], causal=False)
    before = out.clone(), lse.clone()
    merge_piece(out[:, 2:], lse[..., 2:], *attend(q[:, 2:].contiguous() * scale, k[:, 4:], v[:, 4:], causal=False))
    expected, expected_lse = attend_plainly(q * scale, k, v, causal=False)
    torch.testing.assert_close((out[:, 2:], lse[..., 2:]), (expected[:, 2:], expected_lse[..., 2:]))
    assert torch.equal(out[:, :2], before[0][:, :2])
    assert torch.equal(lse[..., :2], before[1][..., :2])


def test_merge_in_bf16_rounds_once() -> None:
    q, k, v, _ = make_inputs(6, 12, dtype=torch.bfloat16)
    pieces = [attend(q, k[:, a:b].contiguous(), v[:, a:b].contiguous(), causal=False) for a, b in ((0, 5), (5, 12))]
    out, lse = (x.clone() for x in pieces[0])
    merge_piece(out, lse, *pieces[1])
    exact, exact_lse = (x.double() for x in pieces[0])
    merge_piece(exact, exact_lse, *(x.double() for x in pieces[1]))
    assert lse.dtype == torch.float32
    assert torch.equal(out, exact.bfloat16())


def test_merge_compiled_equals_plain() -> None:
    q, k, v, _ = make_inputs(6, 12)
    for begin in (0, 2):  # the rows of a head and a tail, and of a tail: one graph for both
        results = []
        for merge in (blockwise_attention._merge, torch.compile(blockwise_attention._merge, backend="aot_eager")):
            out, lse = attend(q, k[:, :4], v[:, :4], causal=False)
            merge(
                out[:, begin:], lse[..., begin:], *attend(q[:, begin:].contiguous(), k[:, 4:], v[:, 4:], causal=False)
            )
            results.append((out, lse))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_choose_kernel_on_cpu() -> None:
    assert choose_kernel(torch.device("cpu"), torch.bfloat16, 64, 64) == "CPU"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dims", "usable", "kernel"),
    [
        ((9, 0), torch.bfloat16, (128, 128), {"cuDNN", "flash"}, "cuDNN"),
        ((9, 0), torch.bfloat16, (192, 128), {"cuDNN", "flash"}, "cuDNN"),
        ((9, 0), torch.bfloat16, (192, 128), {"flash"}, "flash"),
        ((9, 0), torch.bfloat16, (20, 20), {"cuDNN", "flash"}, "cuDNN"),
        ((8, 0), torch.bfloat16, (128, 128), {"cuDNN", "flash"}, "flash"),
        ((9, 0), torch.float32, (128, 128), set(), "memory-efficient"),
    ],
)
def test_choose_kernel_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    usable: set[str],
    kernel: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(blockwise_attention, "can_use_cudnn_attention", lambda _: "cuDNN" in usable)
    monkeypatch.setattr(blockwise_attention, "can_use_flash_attention", lambda _: "flash" in usable)
    monkeypatch.setattr(blockwise_attention, "_get_sample", lambda *_: None)
    assert choose_kernel.__wrapped__(torch.device("cuda", 0), dtype, *head_dims) == kernel


@pytest.mark.parametrize("v_head_dim", [8, 6])
@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_cuda_kernel_is_called_as_torch_declares_it(
    monkeypatch: pytest.MonkeyPatch, name: str, v_head_dim: int
) -> None:
    # On the meta device the operations run as declared, down to shapes and dtypes, without a GPU.
    monkeypatch.setattr(blockwise_attention, "choose_kernel", lambda *_: name)
    q, k, v, grad_out = (x.to("meta", torch.bfloat16) for x in make_inputs(40, 40, v_head_dim=v_head_dim))
    out, lse = attend(q, k, v, causal=True)
    assert out.shape == grad_out.shape
    assert lse.shape == (2, 4, 40)
    assert lse.dtype == torch.float32
    for gradient, x in zip(attend_backward(grad_out, q, k, v, out, lse, causal=True), (q, k, v), strict=True):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype


def test_get_sample_is_what_torch_asks_for() -> None:
    with torch.no_grad():
        sample = blockwise_attention._get_sample(torch.device("cpu"), torch.bfloat16, 24, 16)
    assert sample.query.shape == sample.key.shape == (1, 1, 128, 24)
    assert sample.value.shape == (1, 1, 128, 16)
    assert sample.query.requires_grad
    assert sample.value.requires_grad
    assert sample.is_causal


def test_repeated_heads_are_summed_again() -> None:
    _, k, _, _ = make_inputs(3, 5)
    repeated = blockwise_attention._repeat_heads(k.transpose(1, 2), 4)
    assert torch.equal(repeated[:, 1], repeated[:, 0])
    torch.testing.assert_close(blockwise_attention._sum_repeated_heads(repeated, 2), 2 * k.transpose(1, 2))


def test_attend_equals_torch_in_fp32() -> None:
    q, k, v, _ = make_inputs(16, 16, kv_heads=4, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(attend(q, k, v, causal=True)[0], expected.transpose(1, 2))
