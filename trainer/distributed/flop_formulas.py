"""FLOPs of operations that torch cannot count: the compiler weighs by them what to recompute for a memory budget, and what may hide
which collective.

What has no formula counts as free. A multiply-add is two.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, shape_wrapper

from models.common.grouped_mm import GROUPED_MM, GROUPED_MM_BACKWARD
from trainer.distributed.sequence_collectives import get_group
from trainer.distributed.sharded_attention import OPERATION as SHARDED_ATTENTION

_aten = torch.ops.aten


def register_flop_formulas() -> None:
    """Make the formulas known to torch, once a process."""
    for operation, formula in (
        (torch.ops.aten._grouped_mm.default, _count_grouped_mm),
        (torch.ops.aten._scaled_grouped_mm.default, _count_grouped_mm),
        (GROUPED_MM, _count_transposed_grouped_mm),
        (GROUPED_MM_BACKWARD, _count_grouped_mm_backward),
        (SHARDED_ATTENTION, _count_sharded_attention),
    ):
        packet = operation.overloadpacket
        if packet not in flop_registry:
            register_flop_formula(packet)(formula)
    for kernel in ("cudnn", "flash", "efficient"):
        # torch 2.11 refuses to count where heads of queries share keys and values.
        name = f"_scaled_dot_product_{kernel}_attention"
        flop_registry[getattr(_aten, name)] = shape_wrapper(_count_attention)
        flop_registry[getattr(_aten, f"{name}_backward")] = shape_wrapper(_count_attention_backward)


def _count_attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """q: (B, N, S, H); k: (B, M, T, H); v: (B, M, T, V). Over the whole rectangle of queries and keys, as torch counts it."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _count_attention_backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """The scores once more; gradients of scores and v; gradients of q and k."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def _count_grouped_mm(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Rows (R, I) by group with matrices (G, I, O); or columns (O, R) by group with rows (R, I). All rows count."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def _count_transposed_grouped_mm(rows: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
    """rows: (R, I); weights: (G, O, I)"""
    return 2 * rows[0] * rows[1] * weights[1]


def _count_grouped_mm_backward(grad: torch.Size, rows: torch.Size, *_: Any, **__: Any) -> int:
    """grad: (R, O); rows: (R, I)"""
    return 4 * rows[0] * rows[1] * grad[1]


def _count_sharded_attention(q: torch.Size, k: torch.Size, v: torch.Size, group_name: str, *_: Any, **__: Any) -> int:
    """q: (B, s, N, H); v: (B, s, M, V). Over the whole square of queries and keys, as torch counts attention."""
    batch, seq, heads, head_dim = q
    return 2 * batch * heads * seq * seq * get_group(group_name).size() * (head_dim + v[-1])
