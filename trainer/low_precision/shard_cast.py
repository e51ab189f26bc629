"""Cast a shard to float8 in one pass over it, and find its largest magnitude on the way. One Triton kernel on CUDA.

FSDP2 casts shards outside of compiled blocks, each time that it gathers them: torch's own operations would go over a shard four times,
or six with the amax.
"""

import torch
from torch import Tensor

from trainer.low_precision.fused_cast import has_kernel
from trainer.low_precision.scaling import cast, get_amax

_BLOCK = 4096
"""Elements that one program of the kernel takes."""


def cast_shard(shard: Tensor, scale: Tensor, dtype: torch.dtype, *, amax: Tensor | None = None) -> Tensor:
    """Return shard * scale in float8, saturated: `scaling.cast`, bit for bit.

    scale: 0-dim float32; amax: 0-dim float32, raised to the shard's largest magnitude if that is larger. It becomes NaN if there is one.
    """
    if not has_kernel(shard):
        if amax is not None:
            amax.copy_(torch.maximum(amax, get_amax(shard).float()))
        return cast(shard, scale, dtype)
    data = torch.empty(shard.shape, dtype=dtype, device=shard.device)
    if shard.numel():
        _launch(shard.contiguous(), scale, data, amax)
    return data


def _launch(shard: Tensor, scale: Tensor, data: Tensor, amax: Tensor | None) -> None:
    import triton

    from trainer.low_precision.fused_cast_kernel import cast_flat_kernel

    # Bits of a non-negative float, which order like the floats. A NaN's are above those of infinity.
    amax_bits = None if amax is None else amax.view(torch.int32)
    with torch.cuda.device(shard.device):
        cast_flat_kernel[(triton.cdiv(shard.numel(), _BLOCK),)](
            shard, scale, data, amax_bits, shard.numel(), FINDS_AMAX=amax is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
