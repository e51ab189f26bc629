"""How Adam's moments are stored: as they are, in bf16 by stochastic rounding, or in blocks of codes with a scale each.

Codes and blocks are those of torchao's low-bit optimizers: blocks of consecutive values scaled to their largest magnitude, then
float8 (e4m3), or a table of values: dynamic 8-bit (Dettmers et al., arXiv 2110.02861), dynamic and linear 4-bit (Li et al.,
arXiv 2309.01507). Blocks lie along the last dim, so that codes and scales are cut as their parameter is.

bf16 keeps 8 bits: with beta2 = 0.999 a step changes the second moment by less than half of the last one, and rounding to nearest
would never let it fall again. Stochastic rounding is right on average. Its random bits are a hash of step, parameter and place: a
resumed run draws the same ones, and so do all replicas of a parameter.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["float32", "bfloat16", "float8", "dynamic8", "dynamic4", "linear4"]

_LARGEST_BLOCK: dict[Kind, int] = {"float8": 256, "dynamic8": 256, "dynamic4": 128, "linear4": 128}
"""Values with one scale, for the kinds that have scales: as torchao has it."""
_SMALLEST_BLOCK = 32
"""Where only smaller blocks would fit, a scale of 4 bytes each would eat up what they save."""
_FEWEST_VALUES = 4096
"""Smaller tensors stay in float32, as in bitsandbytes: they weigh little and are often sensitive."""
_SMALLEST_AMAX = 1e-12

_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class MomentFormat:
    """How both moments are stored, where a parameter's shape lets them."""

    exp_avg: Kind
    exp_avg_sq: Kind


FORMATS: dict[str, MomentFormat] = {
    "float32": MomentFormat("float32", "float32"),
    "bfloat16": MomentFormat("bfloat16", "bfloat16"),
    "float8": MomentFormat("float8", "bfloat16"),
    "AdamW8bit": MomentFormat("dynamic8", "dynamic8"),
    "AdamWFp8": MomentFormat("float8", "float8"),
    "AdamW4bit": MomentFormat("dynamic4", "linear4"),
}
"""By `optimizer.state_dtype`, and by the names of torchao's optimizers. `float8` is that of MS-AMP's O2 (arXiv 2310.18313)."""


class Moment(NamedTuple):
    """This rank's part of a moment, flat in memory."""

    kind: Kind
    data: Tensor
    """Values, or codes as bytes."""
    scales: Tensor | None
    """One for each block, fp32; none where values are stored as they are."""
    is_signed: bool

    @property
    def block(self) -> int:
        """Values with one scale."""
        assert self.scales is not None, f"{self.kind} has no scales"
        return self.data.numel() * (2 if self.kind in ("dynamic4", "linear4") else 1) // self.scales.numel()


def choose_block(kind: Kind, shape: torch.Size, last_dim_shards: int) -> int | None:
    """Return how many values of the last dim share a scale, or None where the moment of such a tensor stays in float32.

    shape: of the whole tensor; last_dim_shards: ranks over which its last dim is cut.
    """
    if len(shape) < 2 or shape.numel() < _FEWEST_VALUES or shape[-1] % last_dim_shards:
        return None
    block = math.gcd(shape[-1] // last_dim_shards, _LARGEST_BLOCK[kind])
    return block if block >= _SMALLEST_BLOCK else None


def has_scales(kind: Kind) -> bool:
    """Whether values are stored as codes, in blocks with a scale."""
    return kind in _LARGEST_BLOCK


def codes_per_byte(kind: Kind) -> int:
    """How many codes share a byte."""
    return 2 if kind in ("dynamic4", "linear4") else 1


class CodeTable(NamedTuple):
    """The values that codes stand for, ascending, and the midpoints between them: a code counts those that are not above."""

    values: Tensor
    midpoints: Tensor


@functools.cache
def get_table(kind: Kind, is_signed: bool, device: torch.device) -> CodeTable:
    """Return the table of a kind of codes, fp32."""
    if kind == "linear4":
        assert not is_signed, "linear codes are for what is never negative"
        values = [(code + 1) / 16 for code in range(16)]
    else:
        values = _list_dynamic_values(is_signed, *((8, 7) if kind == "dynamic8" else (4, 3)))
    table = torch.tensor(values, dtype=torch.float64)
    midpoints = (table[1:] + table[:-1]) / 2
    return CodeTable(table.float().to(device), midpoints.float().to(device))


def _list_dynamic_values(is_signed: bool, bits: int, decades: int) -> list[float]:
    """Values of a number with a unary decimal exponent, of which small ones have more digits in it and fewer behind it.

    In each decade below 1 the middles of so many even parts, twice as many as in the decade below it; with zero and one.
    """
    values = [0.0, 1.0]
    for decade in range(decades):
        parts = 2 ** (decade + bits - 1 - decades + (0 if is_signed else 1))
        step = 0.9 / parts
        magnitudes = [10.0 ** (decade + 1 - decades) * (0.1 + step * (part + 0.5)) for part in range(parts)]
        values += magnitudes + ([-value for value in magnitudes] if is_signed else [])
    assert len(values) == 2**bits, "every code has a value"
    return sorted(values)


def read(moment: Moment) -> Tensor:
    """Return the values of a moment, in fp32: (blocks, block) where it has blocks, else as they are."""
    if moment.scales is None:
        return moment.data.float()
    if moment.kind == "float8":
        values = moment.data.view(_FLOAT8).float()
    else:
        codes = moment.data
        if codes_per_byte(moment.kind) == 2:
            codes = torch.stack([codes >> 4, codes & 0xF], dim=-1)
        values = get_table(moment.kind, moment.is_signed, codes.device).values[codes.int()]
    return values.view(-1, moment.block) * moment.scales.view(-1, 1)


def write(moment: Moment, values: Tensor, bits: Tensor | None) -> None:
    """Store what `read` gave in its shape. bits: random 16-bit integers for bf16, one for each value."""
    if moment.scales is None:
        moment.data.copy_(values if bits is None else round_stochastically(values, bits))
        return
    amax = values.abs().amax(dim=1).clamp(min=_SMALLEST_AMAX)
    if moment.kind == "float8":
        scales = amax / _FLOAT8_MAX
        codes8 = (values / scales.view(-1, 1)).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(_FLOAT8)
        moment.data.view(-1).copy_(codes8.view(torch.uint8).view(-1))
    else:
        scales = amax
        table = get_table(moment.kind, moment.is_signed, values.device)
        codes = torch.bucketize(values / scales.view(-1, 1), table.midpoints, right=True).to(torch.uint8).view(-1)
        if codes_per_byte(moment.kind) == 2:
            codes = (codes[::2] << 4) | codes[1::2]
        moment.data.view(-1).copy_(codes)
    moment.scales.view(-1).copy_(scales)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, away from zero as often as the bits that go are of a whole step. bits: integers from 0 to 65535.

    Infinities and NaN stay what they are.
    """
    raised = (values.contiguous().view(torch.int32) + bits.to(torch.int32)) & -0x10000
    return torch.where(values.isfinite(), raised.view(torch.float32), values).bfloat16()


def draw_bits(count: int, *, step: int, salt: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two random 16-bit integers for each of `count` places, int64: a hash of step, salt and place."""
    places = torch.arange(count, dtype=torch.int64, device=device)
    seed = _mix(torch.tensor((step * _STEP_FACTOR + salt * _SALT_FACTOR) & _MASK, dtype=torch.int64, device=device))
    mixed = _mix((places + seed) & _MASK)
    return mixed & 0xFFFF, mixed >> 16


_MASK = 0xFFFFFFFF
_STEP_FACTOR, _SALT_FACTOR = 0x9E3779B1, 0x27D4EB2F


def _mix(x: Tensor) -> Tensor:
    """Mix the 32 bits of non-negative int64: MurmurHash3's finalizer (Appleby), which leaves no two equal."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
