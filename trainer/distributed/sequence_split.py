"""How context parallelism splits each sequence over ranks, and what follows for batches and document masks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask

from models.common.attention import build_document_mask
from trainer.config.schema_parallel import ParallelismConfig


def is_balanced(parallelism: ParallelismConfig) -> bool:
    """Whether ranks get a part from the front and one from the back, so that causal attention is equal work for all.

    Under ulysses each rank attends to whole sequences, which needs no balance.
    """
    return parallelism.context_parallel_load_balancer == "headtail" and parallelism.context_parallel_method != "ulysses"


@dataclass(frozen=True)
class SequenceSplit:
    """Which tokens of each sequence belong to which of `degree` ranks.

    Balanced, a sequence is cut into 2 * degree chunks, and rank r has the chunks r and 2 * degree - 1 - r, in this order: as
    causal queries they see as many keys together as those of any other rank (the "zigzag" of ring attention). Otherwise
    rank r has the r-th of `degree` parts.
    """

    rank: int
    degree: int
    balanced: bool
    masks_whole_sequence: bool = False
    """Whether masks are for all queries rather than for this rank's (ulysses, whose ranks share out heads meanwhile)."""

    @classmethod
    def from_config(cls, mesh: DeviceMesh, parallelism: ParallelismConfig) -> "SequenceSplit":
        """Return the split over the ranks of the 1-D `mesh` of context parallelism, from this rank's point of view."""
        return cls(
            rank=mesh.get_local_rank(),
            degree=mesh.size(),
            balanced=is_balanced(parallelism),
            masks_whole_sequence=parallelism.context_parallel_method == "ulysses",
        )

    def local_len(self, seq_len: int) -> int:
        """Return the tokens of each rank.

        Raises:
            ValueError: the sequence cannot be split evenly.
        """
        multiple = 2 * self.degree if self.balanced else self.degree
        if seq_len % multiple:
            twice = "2 * " if self.balanced else ""
            raise ValueError(
                f"a sequence of {seq_len} tokens cannot be split evenly: training.seq_len and validation.seq_len must be "
                f"multiples of {multiple}, which is {twice}parallelism.context_parallel_degree"
                + (" (with parallelism.context_parallel_load_balancer = 'headtail')" if self.balanced else "")
            )
        return seq_len // self.degree

    def _runs(self, seq_len: int, rank: int) -> list[tuple[int, int]]:
        """Return begin and end of each run of neighbouring tokens of a rank, in its own order."""
        length = self.local_len(seq_len)
        if not self.balanced:
            return [(rank * length, (rank + 1) * length)]
        half = length // 2
        return [(rank * half, (rank + 1) * half), (seq_len - (rank + 1) * half, seq_len - rank * half)]

    def positions(self, seq_len: int, device: torch.device | str) -> Tensor:
        """Return where this rank's tokens stand in the sequence: (seq_len / degree,) int64, in the rank's order."""
        return torch.cat([torch.arange(*run, device=device) for run in self._runs(seq_len, self.rank)])

    def take(self, whole: Tensor, rank: int | None = None) -> Tensor:
        """Return a rank's tokens, by default this rank's. whole: (B, S, ...) -> (B, S / degree, ...), a copy"""
        runs = self._runs(whole.shape[1], self.rank if rank is None else rank)
        return torch.cat([whole[:, begin:end] for begin, end in runs], dim=1)

    def join(self, parts: Tensor) -> Tensor:
        """Put the parts of all ranks in the sequence's order. parts: (degree, B, S / degree, ...) -> (B, S, ...), a copy"""
        placed: list[tuple[int, Tensor]] = []
        for rank, part in enumerate(parts):
            offset = 0
            for begin, end in self._runs(self.degree * part.shape[1], rank):
                placed.append((begin, part[:, offset : offset + end - begin]))
                offset += end - begin
        return torch.cat([run for _, run in sorted(placed, key=lambda place: place[0])], dim=1)

    def split(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of a batch, each tensor (B, S) -> (B, S / degree).

        There are `positions` afterwards in any case, since the model's default counts from 0: those of the batch, which
        restart with each document, or else where the tokens stand in the sequence.

        Raises:
            ValueError: the sequence cannot be split evenly, or tensors differ in shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        if len(set(shapes.values())) != 1 or batch["tokens"].dim() != 2:
            raise ValueError(f"a batch to be split holds tensors of one shape (batch, seq), got {shapes}")
        parts = {name: self.take(tensor) for name, tensor in batch.items()}
        if "positions" not in parts:
            tokens = batch["tokens"]
            parts["positions"] = self.positions(tokens.shape[1], tokens.device).expand(tokens.shape[0], -1)
        return parts

    def build_mask(self, positions: Tensor) -> Tensor | BlockMask:
        """Build the document mask that this rank's attention needs. positions: of the whole sequence, (B, S) int64"""
        queries = None if self.masks_whole_sequence else self.positions(positions.shape[1], positions.device)
        return build_document_mask(positions, device_type=positions.device.type, queries=queries)
