"""How a parameter begins, as data: the model says which distribution, generic code says with which random numbers."""

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Init:
    """Distribution of a parameter's first values, each drawn independently of the others.

    `std` is that of the normal before truncation. A trunc_normal is cut at `cut` standard deviations on both sides.

    Raises:
        ValueError: a random kind without a positive std or cut.
    """

    kind: Literal["normal", "trunc_normal", "ones", "zeros"]
    std: float = 0.0
    cut: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "trunc_normal", "ones", "zeros"):
            raise ValueError(f"kind = {self.kind!r} must be normal, trunc_normal, ones or zeros")
        if self.kind in ("normal", "trunc_normal") and not (self.std > 0 and self.cut > 0):
            raise ValueError(f"{self.kind} needs std > 0 and cut > 0, got std = {self.std}, cut = {self.cut}")

    @property
    def is_random(self) -> bool:
        """Whether `fill_` draws from the generator."""
        return self.kind in ("normal", "trunc_normal")

    @torch.no_grad()
    def fill_(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Fill `tensor`, of any shape, in place and return it.

        Numbers are drawn in fp32 whatever the tensor's dtype: a bf16 uniform has 256 steps, so its inverse CDF has no tail.
        """
        if not self.is_random:
            return tensor.fill_(1.0 if self.kind == "ones" else 0.0)
        in_place = tensor.dtype == torch.float32 and tensor.is_contiguous()
        values = tensor if in_place else torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        if self.kind == "normal":
            values.normal_(0.0, self.std, generator=generator)
        else:
            # Inverse CDF on the part of the uniform that maps inside the cut.
            bound = math.erf(self.cut / math.sqrt(2.0))
            values.uniform_(-bound, bound, generator=generator).erfinv_().mul_(self.std * math.sqrt(2.0))
            values.clamp_(-self.cut * self.std, self.cut * self.std)
        return tensor if in_place else tensor.copy_(values)
