"""The product of two float8 matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.schema_quantize import FLOAT8_ALIGNMENT
from trainer.low_precision.scaling import Quantized


def multiply(
    a: Quantized, b: Quantized, *, out_dtype: torch.dtype, fast: bool, emulate: bool = False, pads: bool = False
) -> Tensor:
    """Return a @ b. a: (M, K), b: (K, N), in any layout, both scaled by tensor or both by row and column -> (M, N)

    fast: add up products in the tensor cores' own accuracy (about 14 bits), as forward passes may. emulate: in float32, on any
    device. pads: fill K up with zeros where it is no multiple of 16.
    """
    if emulate:
        return (a.dequantize() @ b.dequantize()).to(out_dtype)
    by_rows = a.scale.ndim == 2 and b.scale.ndim == 2
    factors = (_pad(a.data, 1), _pad(b.data, 0)) if pads else (a.data, b.data)
    # One layout is in hardware: the first factor by rows, the second by columns.
    left, right = factors[0].contiguous(), factors[1].t().contiguous().t()
    scale_a, scale_b = a.scale.reciprocal(), b.scale.reciprocal()
    if not by_rows:
        return torch._scaled_mm(left, right, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=fast)
    if fast:
        product = torch._scaled_mm(
            left, right, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        # The GPU's product by rows is slow without fast sums: scale afterwards, which the compiler fuses.
        one = scale_a.new_ones(())
        product = torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False
        )
        product = product * (scale_a * scale_b)
    return product.to(out_dtype)


def _pad(data: Tensor, dim: int) -> Tensor:
    """Append zeros along `dim` up to a multiple of `FLOAT8_ALIGNMENT`."""
    missing = -data.shape[dim] % FLOAT8_ALIGNMENT
    if not missing:
        return data
    sides = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return F.pad(data.view(torch.uint8), sides).view(data.dtype)  # a byte of zeros is the number zero
