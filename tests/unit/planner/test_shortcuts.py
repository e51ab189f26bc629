"""What is done in another way than torch does it, with the same outcome."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param

from trainer.planner.recorder import Recorder
from trainer.planner.shortcuts import Chunks, shortcuts_taken


@pytest.mark.parametrize("rows", [8, 7, 3, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_are_those_of_fsdp(rows: int, dim: int):
    x = torch.arange(float(rows * rows)).view(rows, rows)
    expected = _fsdp_param._chunk_with_empty(x, 4, dim)
    chunks = Chunks(x, 4, dim)
    assert len(chunks) == len(expected)
    for chunk, other in zip(chunks, expected, strict=True):
        assert torch.equal(chunk, other)
        assert chunk.stride() == other.stride() or not chunk.numel()


def test_parts_are_joined_in_one_kernel_and_no_more_memory():
    recorder = Recorder(lambda work: work.bytes)
    with recorder.recording(), shortcuts_taken(recorder):
        gradient = torch.empty(32, 8, 24, dtype=torch.bfloat16)
        begin = len(recorder.changes)
        fsdp = _fsdp_collectives.torch
        joined = fsdp.cat(fsdp.chunk(gradient, 4, dim=1), dim=0)
        assert (joined.shape, joined.dtype) == ((128, 2, 24), torch.bfloat16)
        assert joined.is_contiguous()
        target = torch.empty(32, 8, 24, dtype=torch.bfloat16)
        assert fsdp.cat(fsdp.chunk(joined, 4, dim=0), dim=1, out=target) is target
        assert [change.allocation.size for change in recorder.changes[begin:]] == [2 * 32 * 8 * 24] * 2
        assert [span.seconds for span in recorder.spans] == [2 * 2 * 32 * 8 * 24] * 2
    assert _fsdp_collectives.torch is torch
