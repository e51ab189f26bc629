"""FSDP's reduction of gradients with a quarter of the traffic: they travel in float8 and are added up in float32.

Each rank casts its gradients by blocks of 256 values, each with a scale by its largest magnitude; one all-to-all brings every rank
the bytes of its part from all others, and it adds them up, in the order of ranks. Values are rounded once, on the way: unlike
in a reduction in float8, as of MS-AMP (arXiv 2310.18313), sums are not. Bytes also travel where a backend knows no float8.

No block holds values of two parameters. Ranks of tensor parallelism have replicas of some (norms) and parts of others, of which
the largest magnitude differs: replicas that shared a scale with these would be rounded differently, and drift apart.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

BLOCK = 256
"""Values with one scale, a byte each; the scale takes 4."""
_BLOCK_BYTES = BLOCK + 4
_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = 448.0
_SMALLEST_AMAX = 2.0**-100
"""A block of zeros has the scale of this one. Gradients of single tokens may be small."""


class Blocks:
    """Where the blocks of a rank's part are: each parameter's values from its first one on, the last block as long as is left.

    sizes: values of each parameter, one after the other.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        starts, lengths, begin = [], [], 0
        for size in sizes:
            of_this = torch.arange(0, size, BLOCK, dtype=torch.int64)
            starts.append(of_this + begin)
            lengths.append((size - of_this).clamp(max=BLOCK))
            begin += size
        # Empty blocks at the end, for the bytes of each rank to begin where a GPU can move 16 at once.
        padding = -sum(map(len, starts)) % 16
        starts.append(torch.zeros(padding, dtype=torch.int64))
        lengths.append(torch.zeros(padding, dtype=torch.int64))
        self.values = begin
        # What all starts are multiples of, for kernels to move several values at once.
        self.alignment = math.gcd(16, *sizes)
        self.starts = torch.cat(starts).to(device)
        self.lengths = torch.cat(lengths).to(torch.int32).to(device)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def row_bytes(self) -> int:
        """Bytes that one rank sends another: all codes, then all scales."""
        return len(self) * _BLOCK_BYTES

    def places(self) -> tuple[Tensor, Tensor]:
        """Return where each value of each block lies, and whether there is one: (blocks, BLOCK) both."""
        offsets = torch.arange(BLOCK, device=self.starts.device)
        is_inside = offsets < self.lengths[:, None]
        return torch.where(is_inside, self.starts[:, None] + offsets, 0), is_inside


def pack(gradients: Tensor, blocks: Blocks) -> Tensor:
    """Cast gradients to float8. gradients: (ranks, values) -> bytes to send, (ranks, row_bytes) uint8.

    What is infinite or NaN makes values NaN.
    """
    ranks = len(gradients)
    sent = torch.empty(ranks, blocks.row_bytes, dtype=torch.uint8, device=gradients.device)
    if gradients.is_cuda:
        _launch_pack(gradients, blocks, sent)
        return sent
    places, is_inside = blocks.places()
    values = torch.where(is_inside, gradients.float()[:, places], 0.0)  # (ranks, blocks, BLOCK)
    scales = values.abs().amax(-1).clamp(min=_SMALLEST_AMAX) / _FLOAT8_MAX
    codes = (values / scales[..., None]).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(_FLOAT8)
    sent[:, : len(blocks) * BLOCK] = codes.view(torch.uint8).view(ranks, -1)
    sent[:, len(blocks) * BLOCK :] = scales.contiguous().view(torch.uint8).view(ranks, -1)
    return sent


def sum_packed(received: Tensor, blocks: Blocks, output: Tensor) -> None:
    """Add up what all ranks sent, in float32 and in the order of ranks. received: (ranks, row_bytes) uint8; output: (values,)."""
    if received.is_cuda:
        _launch_sum(received, blocks, output)
        return
    ranks, count = len(received), len(blocks) * BLOCK
    codes = received[:, :count].contiguous().view(_FLOAT8).float().view(ranks, len(blocks), BLOCK)
    scales = received[:, count:].contiguous().view(torch.float32)
    total = torch.zeros(len(blocks), BLOCK)
    for its, its_scales in zip(codes, scales, strict=True):
        total += its * its_scales[:, None]
    places, is_inside = blocks.places()
    output[places[is_inside]] = total[is_inside].to(output.dtype)


class Float8ReduceScatter(ReduceScatter):
    """The reduction of one FSDP unit.

    group: FSDP2's parameter group of the unit. wire_dtype: that of the gradients until they are cast: what backward made them in.
    must_keep_apart: other ranks have replicas of some of its parameters, which must come out alike.
    """

    def __init__(self, group: Any, *, wire_dtype: torch.dtype, must_keep_apart: bool) -> None:
        self._group = group
        self._wire_dtype = wire_dtype
        self._must_keep_apart = must_keep_apart
        self._blocks: Blocks | None = None
        self._input_is_next = True

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the input buffer at every first call, the output at every second: FSDP2 asks for them in turn."""
        is_input, self._input_is_next = self._input_is_next, not self._input_is_next
        numel = math.prod(int(n) for n in size)
        return torch.empty(numel, dtype=self._wire_dtype if is_input else dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Reduce on the current stream. output_tensor: (n,), input_tensor: (ranks * n,)."""
        assert op == dist.ReduceOp.SUM, f"gradients are summed, not reduced by {op}"
        blocks = self._get_blocks(output_tensor)
        sent = pack(input_tensor.view(group.size(), -1), blocks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        sum_packed(received, blocks, output_tensor)

    def _get_blocks(self, output: Tensor) -> Blocks:
        """Return the blocks of a rank's part: the same in every step, where all parameters have gradients."""
        if self._blocks is None or self._blocks.values != output.numel():
            trained = [param for param in self._group.fsdp_params if param.sharded_param.requires_grad]
            sizes = [param.padded_sharded_param_size.numel() for param in trained]
            if sum(sizes) != output.numel():
                if self._must_keep_apart:
                    raise RuntimeError(
                        "training.gradient_wire_dtype = 'float8' needs a gradient of every parameter under tensor parallelism, and "
                        f"in {self._group} some have none. Freeze those (requires_grad=False), or leave the setting out"
                    )
                sizes = [output.numel()]
            self._blocks = Blocks(sizes, output.device)
        return self._blocks


def apply_float8_gradients(modules: Iterable[FSDPModule], *, wire_dtype: torch.dtype, must_keep_apart: bool) -> None:
    """Have FSDP units reduce their gradients so. wire_dtype, must_keep_apart: as `Float8ReduceScatter`."""
    for module in modules:
        group: Any = module._get_fsdp_state()._fsdp_param_group
        if group is not None:
            module.set_custom_reduce_scatter(
                Float8ReduceScatter(group, wire_dtype=wire_dtype, must_keep_apart=must_keep_apart)
            )


_TILE = 8
"""Blocks that one program of a kernel takes."""


def _launch_pack(gradients: Tensor, blocks: Blocks, sent: Tensor) -> None:
    import triton

    from trainer.low_precision.gradient_wire_kernel import pack_kernel

    grid = (triton.cdiv(len(blocks), _TILE), len(gradients))
    with torch.cuda.device(gradients.device):
        pack_kernel[grid](
            gradients, blocks.starts, blocks.lengths, sent, sent.view(torch.float32), blocks.values, len(blocks),
            ALIGNMENT=blocks.alignment, TILE=_TILE, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def _launch_sum(received: Tensor, blocks: Blocks, output: Tensor) -> None:
    import triton

    from trainer.low_precision.gradient_wire_kernel import sum_kernel

    with torch.cuda.device(received.device):
        sum_kernel[(triton.cdiv(len(blocks), _TILE),)](
            received.view(_FLOAT8), received.view(torch.float32), blocks.starts, blocks.lengths, output, len(blocks),
            RANKS=len(received), ALIGNMENT=blocks.alignment, TILE=_TILE, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
