"""Grouped-query attention, its masks, and the kernels that compute it.

Letters: B batch, S seq, D dim, N query heads, M key-value heads, H head_dim.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.common.rope import RotaryEmbedding

AttentionMask = torch.Tensor | BlockMask | None
"""None: causal. A bool tensor (B, 1, queries, keys), True where a query sees a key. A BlockMask, for FlexAttention."""


class DotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(H)) v, by the kernel that fits the mask. No parameters; a seam for context parallelism."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: AttentionMask = None) -> torch.Tensor:
        """Attend causally, or as `mask` says.

        q: (B, N, S, H); k, v: (B, M, S, H), N a multiple of M -> (B, N, S, H)
        """
        grouped = q.shape[1] != k.shape[1]
        if isinstance(mask, BlockMask):
            # A compiled block takes the plain call into its own graph. In eager mode that call would hold all scores.
            if torch.compiler.is_compiling():
                return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
            return _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
        if grouped and q.is_cuda and q.dtype == torch.float32:
            # In fp32 only the memory-efficient kernel is left, and it takes no groups: SDPA would hold all scores instead.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class Attention(nn.Module):
    """Multi-head attention with rotary positions and grouped keys and values (Ainslie et al., arXiv 2305.13245).

    `rope` is shared among the blocks. The number of heads is read from the projections' outputs, which tensor parallelism
    splits.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)
        self.rope = rope
        self.inner_attention = DotProductAttention()

    def forward(
        self, x: torch.Tensor, *, positions: torch.Tensor | None = None, mask: AttentionMask = None
    ) -> torch.Tensor:
        """Return the attention's part of the residual stream.

        x: (B, S, D); positions: (B, S) int64, by default 0 to S-1; mask: see `AttentionMask` -> (B, S, D)
        """
        batch, seq, _ = x.shape
        q = self.wq(x).view(batch, seq, -1, self.head_dim)  # (B, S, N, H)
        k = self.wk(x).view(batch, seq, -1, self.head_dim)  # (B, S, M, H)
        v = self.wv(x).view(batch, seq, -1, self.head_dim)  # (B, S, M, H)
        q, k = self.rope(q, k, positions=positions)
        heads = self.inner_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        return self.wo(heads.transpose(1, 2).reshape(batch, seq, -1))


@functools.cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def build_document_mask(
    positions: torch.Tensor, *, device_type: str, queries: torch.Tensor | None = None
) -> torch.Tensor | BlockMask:
    """Build the mask that keeps causal attention inside each document; one begins wherever the position is 0.

    A dense bool mask (B, 1, Q, S) on the CPU, where FlexAttention has no backward pass; a BlockMask on CUDA.

    positions: (B, S) int64, on a device of `device_type`; queries: (Q,) int64, where in the sequence the queries stand that
    the mask is for, by default all of them in order
    """
    batch, seq = positions.shape
    document = (positions == 0).cumsum(dim=1)  # (B, S)
    if device_type != "cuda":
        keys = torch.arange(seq, device=positions.device)
        rows = keys if queries is None else queries
        return ((document[:, rows, None] == document[:, None, :]) & (rows[:, None] >= keys)).unsqueeze(1)

    def is_visible(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (document[b, query] == document[b, key])

    create = _compiled_create_block_mask()
    device = str(positions.device)
    if queries is None:
        return create(is_visible, B=batch, H=None, Q_LEN=seq, KV_LEN=seq, device=device)
    places = queries

    def is_visible_from(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return is_visible(b, h, places[query], key)

    return create(is_visible_from, B=batch, H=None, Q_LEN=places.shape[0], KV_LEN=seq, device=device)


@contextlib.contextmanager
def attention_kernels(device_type: str) -> Iterator[None]:
    """Let SDPA choose among all its kernels, the fastest for this GPU first. Enter it once, around a whole run.

    cuDNN comes first from Hopper on, where FlashAttention-2 has about half its speed (both measured on H200 at head_dim 128,
    8192 tokens); elsewhere torch's own order stands. The order is global to the process, so that backward threads that
    recompute a forward pass and the tracing of torch.compile see it too: a graph keeps the kernel of its tracing.
    """
    if device_type != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        yield
        return
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        yield


@runtime_checkable
class AttentionShape(Protocol):
    """What the choice of a kernel depends on, of a model's args."""

    @property
    def n_heads(self) -> int: ...

    @property
    def n_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def attn_mask_type(self) -> str: ...


_OPERATIONS = {
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "aten::_scaled_dot_product_attention_math": "math",
}


def describe_attention_kernel(
    args: AttentionShape, batch: int, seq: int, device: torch.device | str, dtype: torch.dtype
) -> str:
    """Return which kernel computes attention for these shapes: "backend" or "backend: name of its longest GPU kernel".

    The backend is cuDNN, flash, memory-efficient, math or FlexAttention. On CUDA one forward and backward pass runs under
    the profiler, for the choice depends on versions of libraries that only a run reveals. Call it inside
    `attention_kernels`. dtype: that of q, k and v, so `training.mixed_precision_param`
    """
    device = torch.device(device)
    documents = args.attn_mask_type == "block_causal"
    if documents and device.type == "cuda":
        return "FlexAttention"
    q = torch.zeros(batch, seq, args.n_heads, args.head_dim, device=device, dtype=dtype, requires_grad=True)
    k = torch.zeros(batch, seq, args.n_kv_heads, args.head_dim, device=device, dtype=dtype, requires_grad=True)
    v_head_dim = getattr(args, "v_head_dim", args.head_dim)  # latent attention has values of another size
    v = torch.zeros(batch, seq, args.n_kv_heads, v_head_dim, device=device, dtype=dtype, requires_grad=True)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if device.type != "cuda":
        mask = torch.ones(batch, 1, seq, seq, dtype=torch.bool, device=device) if documents else None
        grouped = args.n_heads != args.n_kv_heads
        choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return "flash" if choice == SDPBackend.FLASH_ATTENTION.value else "math"
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        DotProductAttention()(q, k, v).sum().backward()
        torch.cuda.synchronize(device)
    events = profile.key_averages()
    backend = next((_OPERATIONS[event.key] for event in events if event.key in _OPERATIONS), "unknown")
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    longest = max(kernels, key=lambda event: event.self_device_time_total, default=None)
    return f"{backend}: {longest.key}" if longest is not None else backend


def get_slow_attention_reason(description: str, device: torch.device | str) -> str | None:
    """Return why the kernel of `describe_attention_kernel` is a slow one on this device, and the remedy; None if it is not."""
    backend = description.partition(":")[0]
    if torch.device(device).type != "cuda":
        return None  # the CPU's fused kernel wants keys and values of one size, which latent attention has not: nothing to be done
    if backend == "math":
        return "it holds all scores in memory; a fused kernel needs bf16 or fp16 and a head_dim of at most 128"
    if backend == "memory-efficient":
        return "the fused kernels were refused; they need training.mixed_precision_param = bfloat16 and head_dim <= 128"
    # FlashAttention-3 kernels carry the architecture in their name; those of torch's own FlashAttention-2 do not.
    hopper_or_later = torch.cuda.get_device_capability(device) >= (9, 0)
    if backend == "flash" and hopper_or_later and "sm90" not in description.lower():
        return "FlashAttention-2 has half the speed of cuDNN, which was refused: it needs cuDNN 9 and debug.deterministic off"
    return None
