"""Copies of a run's tensors in host memory, for checkpoints that are written while training goes on."""

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


def build_stager() -> DefaultStager:
    """Return what makes one copy, while the caller waits, in memory that is freed after its use."""
    return DefaultStager(StagingOptions(False, False, False, False))


class PinnedStager(DefaultStager):
    """Copies in a thread (and a stream) of its own, into memory that it keeps from one copy to the next.

    pin: whether that memory is pinned, for copies from a GPU that overlap with its work.

    torch 2.11 throws that memory away after each copy, with the table that the next one would go by: a second copy then
    fails with KeyError. Here both stay until `close`, whichever the version.
    """

    def __init__(self, *, pin: bool) -> None:
        options = StagingOptions(
            use_pinned_memory=pin, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=pin
        )
        super().__init__(options)
        self._free_memory = self._state_dict_stager.close
        self._state_dict_stager.close = self._keep_memory  # type: ignore[method-assign]

    @staticmethod
    def _keep_memory() -> None:
        pass

    def close(self) -> None:
        """Wait for a copy that goes on, and free the memory."""
        super().close()
        self._free_memory()
