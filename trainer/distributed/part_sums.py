"""Add up what ranks have of one sum: the own part where it lies, those of others as they came. One Triton kernel on CUDA."""

import torch
from torch import Tensor

_BLOCK = 4096
"""Elements that one program of the kernel takes."""


def sum_parts(own: Tensor, others: Tensor, rank: int, output: Tensor) -> None:
    """Write the sum over ranks to `output`, added up in fp32 in the order of ranks, whichever rank makes it.

    own: (n,), of `rank`; others: (ranks - 1, n), of all other ranks in their order; output: (n,), of any dtype.
    """
    if not own.is_cuda:
        parts = [*others[:rank], own, *others[rank:]]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        output.copy_(total)
    elif own.numel():
        _launch(own, others.contiguous(), rank, output)


def _launch(own: Tensor, others: Tensor, rank: int, output: Tensor) -> None:
    import triton

    from trainer.distributed.part_sums_kernel import sum_parts_kernel

    with torch.cuda.device(own.device):
        sum_parts_kernel[(triton.cdiv(own.numel(), _BLOCK),)](
            own, others, output, own.numel(), RANK=rank, RANKS=len(others) + 1, BLOCK=_BLOCK, num_warps=8
        )
