"""Waiting for sends and receives, in functions by whose names the watchdog knows them: gloo's leave it no other trace."""

import torch.distributed as dist
from torch import Tensor


def recv(work: dist.Work, tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Wait for a tensor of another rank; on CUDA only the current stream waits, not the host."""
    _wait(work, tensor, group)


def send(work: dist.Work, tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Wait until a tensor has left for another rank; on CUDA only the current stream waits, not the host."""
    _wait(work, tensor, group)


def _wait(work: dist.Work, tensor: Tensor, group: dist.ProcessGroup) -> None:
    backend = None if tensor.is_cuda else group._get_backend(tensor.device)
    if backend is not None and backend.name() == "gloo":
        # By itself it goes on by the timeout that its group began with.
        work.wait(backend.options._timeout)
    else:
        work.wait()
