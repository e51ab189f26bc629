"""Attention of some queries to some keys, with the log-sum-exp of the scores, by which such pieces are put together.

The kernels are those behind `F.scaled_dot_product_attention`, called one floor below it, where the log-sum-exp is handed out.
A query that sees its keys in several pieces has, with the log-sum-exp of all its scores, the exact softmax in each of them:
that is all that the backward pass of a piece needs (Dao, arXiv 2307.08691, section 3.1; Liu et al., arXiv 2310.01889).

Letters: B batch, S queries, T keys, N query heads, M key-value heads, H head_dim, V that of the values (H, but for latent
attention). Everything is laid out (B, S, N, H), and contiguous.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(H)) v, and the log-sum-exp of the scores.

    q: (B, S, N, H); k: (B, T, M, H); v: (B, T, M, V), N a multiple of M; causal: query s sees the keys up to s, and S = T
    -> (B, S, N, V), (B, N, S) fp32
    """
    assert not causal or q.shape[1] == k.shape[1], "causal attention is that of a sequence to itself"
    kernel, scale = _get_kernel(q, v), q.shape[-1] ** -0.5
    out, lse = kernel.forward(*_fit(kernel, q, k, v), causal, scale)
    return out[..., : v.shape[-1]].transpose(1, 2).contiguous(), lse.contiguous()


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these keys contribute to the gradients of `q`, and the gradients of `k` and `v` by these queries.

    out, lse: of all keys that the queries see, in this piece or another. Shapes as in `attend`; the gradients' dtypes are
    those of q, k and v.
    """
    kernel, scale = _get_kernel(q, v), q.shape[-1] ** -0.5
    gradients = kernel.backward(*_fit(kernel, grad_out, q, k, v, out), lse.contiguous(), causal, scale)
    dq, dk, dv = (
        gradient[..., : x.shape[-1]].transpose(1, 2).contiguous()
        for gradient, x in zip(gradients, (q, k, v), strict=True)
    )
    return dq, dk, dv


def merge_piece(out: Tensor, lse: Tensor, piece_out: Tensor, piece_lse: Tensor) -> None:
    """Put a further piece of the same queries into `out` and `lse`, in place. fp32 inside, whatever the dtype of `out`.

    out, piece_out: (B, S, N, H); lse, piece_lse: (B, N, S)
    """
    # Compiled it is one pass over memory; op by op it would be six, in fp32.
    merge = _compiled_merge() if out.is_cuda else _merge
    merge(out, lse, piece_out, piece_lse)


def _merge(out: Tensor, lse: Tensor, piece_out: Tensor, piece_lse: Tensor) -> None:
    # The share of the piece, written so that no exponential can overflow.
    share = torch.sigmoid(piece_lse - lse).transpose(1, 2).unsqueeze(-1)  # (B, S, N, 1)
    out.copy_(out + share * (piece_out.to(lse.dtype) - out))
    lse.copy_(torch.logaddexp(lse, piece_lse))


@functools.cache
def _compiled_merge() -> Callable[..., None]:
    return torch.compile(_merge, dynamic=True)


class _Kernel(NamedTuple):
    """Heads first, (B, N, S, H), as torch's operations have it; the log-sum-exp is (B, N, S)."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, v, causal, scale) -> out, lse"""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(grad_out, q, k, v, out, lse, causal, scale) -> dq, dk, dv"""
    needs_one_head_dim: bool = False
    """Whether keys and values must have one head_dim."""
    alignment: int = 8
    """What every head_dim must be a multiple of."""


def _get_kernel(q: Tensor, v: Tensor) -> _Kernel:
    return _KERNELS[choose_kernel(q.device, q.dtype, q.shape[-1], v.shape[-1])]


@functools.cache
def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str:
    """Return which kernel attends: "cuDNN", "flash" or "memory-efficient" on CUDA, "CPU" on the CPU.

    Chosen once for each dtype and head_dim, by torch's own conditions, so that forward, recomputation and backward agree
    throughout a run. cuDNN comes first from Hopper on (see `models.common.attention.attention_kernels`).
    """
    if device.type != "cuda":
        return "CPU"
    head_dim, v_head_dim = (_round_up(size, 8) for size in (head_dim, v_head_dim))
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    if hopper and can_use_cudnn_attention(_get_sample(device, dtype, head_dim, v_head_dim)):
        return "cuDNN"
    largest = max(head_dim, v_head_dim)
    if can_use_flash_attention(_get_sample(device, dtype, largest, largest)):
        return "flash"
    return "memory-efficient"


def _get_sample(device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> SDPAParams:
    """Return a call of attention that needs a backward pass, in which kernels can do less than forward."""
    with torch.enable_grad():
        q, v = (
            torch.empty(1, 1, 128, size, device=device, dtype=dtype, requires_grad=True)
            for size in (head_dim, v_head_dim)
        )
        return SDPAParams(q, q, v, None, 0.0, True, False)


def _fit(kernel: _Kernel, *tensors: Tensor) -> list[Tensor]:
    """Return tensors as a kernel takes them: heads first, and with zeros appended for a head_dim that it can work on.

    tensors: each (B, S, N, H or V) -> (B, N, S, ...)
    """
    largest = max(x.shape[-1] for x in tensors)
    fitted = []
    for x in tensors:
        size = _round_up(largest if kernel.needs_one_head_dim else x.shape[-1], kernel.alignment)
        fitted.append((x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))).transpose(1, 2))
    return fitted


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _no_randomness(q: Tensor, dtype: torch.dtype = torch.int64, *shape: int) -> tuple[Tensor, Tensor]:
    """Return seed and offset of a dropout that does not happen."""
    seed = torch.empty(shape, dtype=dtype, device=q.device)
    return seed, seed


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.view(out.shape[:3])  # it has a last dim of 1


def _cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad_out,
        *(q, k, v, out, lse.unsqueeze(-1)),
        *_no_randomness(q),
        *(None, None, None),  # bias, and lengths of ragged sequences
        *(q.shape[2], k.shape[2], 0.0, causal),
        scale=scale,
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        *(q, k, v, out, lse),
        *(None, None),  # lengths of ragged sequences
        *(q.shape[2], k.shape[2], 0.0, causal),
        *_no_randomness(q, torch.uint64, 2),
        scale=scale,
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # padded


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k.shape[1]
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    # The kernel's rows of log-sum-exps begin at multiples of 32. An infinite one stands for a query without any weight.
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad_out,
        *(q, k, v, None, out, lse),
        *_no_randomness(q),
        *(0.0, [True, True, True, False], causal),
        scale=scale,
    )
    return dq, _sum_repeated_heads(dk, kv_heads), _sum_repeated_heads(dv, kv_heads)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k.shape[1]
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, _sum_repeated_heads(dk, kv_heads), _sum_repeated_heads(dv, kv_heads)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key-value heads for a kernel that knows no groups. x: (B, M, T, H) -> (B, heads, T, H)"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_repeated_heads(gradient: Tensor, kv_heads: int) -> Tensor:
    """Add up the gradients of the copies. gradient: (B, N, T, H) -> (B, kv_heads, T, H)"""
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(dim=2)


_KERNELS = {
    "cuDNN": _Kernel(_cudnn_forward, _cudnn_backward),
    "flash": _Kernel(_flash_forward, _flash_backward, needs_one_head_dim=True),
    "memory-efficient": _Kernel(_efficient_forward, _efficient_backward),
    "CPU": _Kernel(_cpu_forward, _cpu_backward, needs_one_head_dim=True, alignment=1),
}
