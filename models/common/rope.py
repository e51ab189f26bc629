"""Rotary position embeddings (Su et al., arXiv 2104.09864) in Meta's layout: neighbours 2i and 2i+1 make a pair.

Letters: B batch, S seq, N heads, H head_dim, T rows of the table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn


def scale_frequencies(
    frequencies: torch.Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_seq_len: int,
) -> torch.Tensor:
    """Stretch the slow rotations as Llama 3.1 does (Meta's llama-models, `apply_scaling`).

    Wavelengths up to original_max_seq_len / high_freq_factor tokens stay, those from original_max_seq_len / low_freq_factor
    tokens on are stretched by `factor`, and between the two the frequency goes over linearly in 1 / wavelength.

    frequencies: (H/2,) in radians per token -> the same shape
    """
    turns = original_max_seq_len * frequencies / (2 * math.pi)
    share_kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * (share_kept + (1.0 - share_kept) / factor)


def scale_frequencies_yarn(
    frequencies: torch.Tensor,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_seq_len: int,
) -> torch.Tensor:
    """Stretch the slow rotations as YaRN does (Peng et al., arXiv 2309.00071, "NTK-by-parts"), in DeepSeek's arithmetic.

    Pairs that turn at least `beta_fast` times in the original length stay, those that turn at most `beta_slow` times are
    slowed down by `factor`, and between the two the frequency goes over linearly in the number of the pair, from a whole
    number to a whole number. The change in attention's temperature that belongs to it is `get_yarn_mscale`.

    frequencies: (H/2,) in radians per token, theta^(-2i / H) -> the same shape
    """
    pairs = frequencies.shape[0]

    def find_pair(turns: float) -> float:
        return pairs * math.log(original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(find_pair(beta_fast)), 0)
    last = min(math.ceil(find_pair(beta_slow)), 2 * pairs - 1)
    width = last - first if last != first else 0.001  # the published code's way around a division by zero
    numbers = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    share_kept = 1.0 - ((numbers - first) / width).clamp(0.0, 1.0)
    return frequencies / factor * (1.0 - share_kept) + frequencies * share_kept


def get_yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return what YaRN multiplies queries and keys with, each, in sequences `factor` times as long as the original (section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


class RotaryEmbedding(nn.Module):
    """Turn pairs of a query or key by an angle proportional to its position.

    One instance serves all blocks. They hold it as a submodule rather than get its table as an argument, since FSDP casts
    floating-point arguments of a block to its compute dtype, and angles in bf16 are off by whole radians.

    theta: base of the wavelengths. rescale: maps the frequencies (H/2,), as `scale_frequencies` does.
    """

    table: torch.Tensor

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int,
        *,
        theta: float,
        rescale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        self.rescale = rescale
        self.register_buffer("table", torch.empty(max_seq_len, head_dim // 2, 2), persistent=False)
        if not self.table.is_meta:
            self.init_buffers(self.table.device)

    def init_buffers(self, device: torch.device | str) -> None:
        """Fill the table of cosines and sines, (T, H/2, 2) fp32, on `device`.

        The arithmetic is fp32 on the CPU, as in the reference code, so that published weights meet the angles that they were
        trained with, the same ones on every device.
        """
        exponents = torch.arange(0, self.head_dim, 2, device="cpu", dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / (self.theta**exponents)
        if self.rescale is not None:
            frequencies = self.rescale(frequencies)
        positions = torch.arange(self.max_seq_len, device="cpu", dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self.table = torch.stack((angles.cos(), angles.sin()), dim=-1).to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RotaryEmbedding":
        # `model.to(torch.bfloat16)` would cast the table as well.
        super()._apply(fn, recurse)
        if self.table.is_meta:
            self.table = self.table.float()
        elif self.table.dtype != torch.float32:
            self.init_buffers(self.table.device)
        return self

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, *, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `q` and `k` turned, in the dtype that they came in.

        q: (B, S, N, H), k: (B, S, N_kv, H); positions: (B, S) int64, below T. Without it they are 0 to S-1.
        """
        table = self.table[: q.shape[1]] if positions is None else self.table[positions]
        return rotate(q, table), rotate(k, table)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, max_seq_len={self.max_seq_len}, theta={self.theta}"


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbours of `x` by its angle; fp32 inside, real arithmetic so that a compiler can fuse it.

    x: (B, S, N, H); table: (S, H/2, 2) or (B, S, H/2, 2), cosines and sines -> (B, S, N, H)
    """
    cos, sin = table.unsqueeze(-3).unbind(-1)  # (..., S, 1, H/2)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, N, H/2)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).type_as(x)
