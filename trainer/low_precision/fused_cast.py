"""Cast a matrix to float8 in one pass: by rows, by columns, and its largest magnitude on the way.

The GPU's float8 products want their factors by rows and by columns, and what a layer casts takes part in two products, once each
way. Apart, that is a pass for the amax, one for the cast, and one for the transposed copy. One Triton kernel on CUDA, plain
torch elsewhere; to the compiler it is one operation.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.low_precision.scaling import cast, get_amax

_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 128


@torch.library.custom_op("bloomery::cast_both_ways", mutates_args=())
def cast_both_ways(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x * scale in float8, saturated, its transpose, and the amax of x.

    x: (M, K), bf16, fp16 or fp32, contiguous; scale: 0-dim fp32; dtype: of float8 -> (M, K), (K, M), both contiguous; 0-dim fp32,
    NaN if x has one.
    """
    assert dtype in _DTYPES, f"{dtype} is no float8 dtype"
    if not has_kernel(x):
        return cast_both_ways_plainly(x, scale, dtype)
    rows = torch.empty(x.shape, dtype=dtype, device=x.device)
    columns = torch.empty(x.shape[::-1], dtype=dtype, device=x.device)
    # Bits of a non-negative float, which order like the floats. A NaN's are above those of infinity.
    amax_bits = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        _launch(x.contiguous(), scale, rows, columns, amax_bits)
    return rows, columns, amax_bits.view(torch.float32)


@cast_both_ways.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.empty(x.shape, dtype=dtype, device=x.device)
    columns = torch.empty((x.shape[1], x.shape[0]), dtype=dtype, device=x.device)
    return rows, columns, torch.empty((), dtype=torch.float32, device=x.device)


def cast_both_ways_plainly(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own operations."""
    rows = cast(x, scale, dtype)
    # Not `contiguous`, which copies no vector: an operation's results must not share memory.
    return rows, rows.t().clone(memory_format=torch.contiguous_format), get_amax(x).float()


def has_kernel(x: Tensor) -> bool:
    """Whether Triton can cast to float8 where a tensor is: to e4m3 it cannot before compute capability 8.9."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _launch(x: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, amax_bits: Tensor) -> None:
    import triton

    n_rows, n_columns = x.shape
    grid = (triton.cdiv(n_rows, _BLOCK_ROWS), triton.cdiv(n_columns, _BLOCK_COLUMNS))
    with torch.cuda.device(x.device):
        _get_kernel()[grid](
            x,
            scale,
            rows,
            columns,
            amax_bits,
            n_rows,
            n_columns,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            num_warps=8,
        )


_kernel: Any = None


def _get_kernel() -> Any:
    """Return the kernel. Triton is not there on machines without a GPU."""
    global _kernel
    if _kernel is None:
        from trainer.low_precision.fused_cast_kernel import cast_kernel

        _kernel = cast_kernel
    return _kernel
