"""Values on their way from the device to the host, read when they are long there."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor in host memory. Making it waits for nothing; reading it waits until it has arrived."""

    def __init__(self, values: Tensor) -> None:
        """values: any shape, on any device."""
        values = values.detach()
        self._ready: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """Return the values."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.tolist()
