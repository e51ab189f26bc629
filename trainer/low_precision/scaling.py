"""From a tensor to its scale and its float8 values (Micikevicius et al., arXiv 2209.05433).

A scale s multiplies: float8 values are x * s, rounded, and stand for x. Formulas and rounding are those of torchao, so that
its recipes give the same bits here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST_AMAX = 1e-12
"""A tensor of zeros has the scale of this one."""


class Quantized(NamedTuple):
    """A float8 matrix and its scale, which broadcasts to it: (), (rows, 1) or (1, columns)."""

    data: Tensor
    scale: Tensor

    def t(self) -> "Quantized":
        """The transpose, without a copy."""
        return Quantized(self.data.t(), self.scale.t() if self.scale.ndim == 2 else self.scale)

    def dequantize(self) -> Tensor:
        """The values that it stands for, in float32."""
        return self.data.float() / self.scale


def get_amax(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the largest magnitude: 0-dim, or along `dim`, which stays as 1. NaN if there is one."""
    # `max` over a whole tensor, not `amax`: activation checkpointing keeps its result (`activation_checkpoint._KEPT`).
    return torch.max(torch.abs(x)) if dim is None else torch.amax(torch.abs(x), dim=dim, keepdim=True)


def get_scale(amax: Tensor, dtype: torch.dtype, *, power_of_2: bool = False) -> Tensor:
    """Return the scale that takes `amax` to the largest value of `dtype`, float32."""
    # In float64, since compiled and eager code divide float32 differently.
    scale = (torch.finfo(dtype).max / amax.double().clamp(min=_SMALLEST_AMAX)).float()
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x * scale in float8. What is too large becomes the largest value; an infinity becomes NaN, for it to be seen: by scales
    that do not come from x it would be cut off, too."""
    limit = torch.finfo(dtype).max
    # torch 2.11 does not saturate by itself in eager mode.
    x = x.float()
    # 0 times x is NaN for an infinity, and else adds nothing. For a `where` the compiler would keep more until the backward pass.
    return ((x * scale).clamp(-limit, limit) + x * 0.0).to(dtype)


def quantize(x: Tensor, dtype: torch.dtype, *, dim: int | None = None, power_of_2: bool = False) -> Quantized:
    """Cast a matrix with the scale of its own amax, or with one along `dim` for each row (1) or column (0)."""
    scale = get_scale(get_amax(x, dim), dtype, power_of_2=power_of_2)
    return Quantized(cast(x, scale, dtype), scale)


def measure(x: Tensor, x8: Quantized, counts: Tensor, *, counted: Tensor | None = None) -> None:
    """Add to `counts` how many elements there are, how many were too large for their scale, and how many too small: not zero, and
    cast to zero. Shares of them are the same however often a forward pass is recomputed.

    counts: (3,) float32. counted: bool, broadcasts to x: which elements, by default all; what the others hold is nobody's.
    """
    limit = torch.finfo(x8.data.dtype).max
    # Half a unit in the last place beyond the limit is rounded, not cut.
    is_cut = (x.float().abs() * x8.scale) > limit * (1 + torch.finfo(x8.data.dtype).eps / 4)
    is_lost = (x8.data.float() == 0) & (x != 0)
    of = torch.ones_like(is_cut) if counted is None else counted.expand_as(x)
    counts.add_(torch.stack([of.sum(), (is_cut & of).sum(), (is_lost & of).sum()]))
