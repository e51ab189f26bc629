"""Modules that the first and the last stage of a pipeline both use, such as embeddings that multi-token prediction looks up.

The parameters are the first stage's: its rank has them in its model, optimizer and checkpoints. The last stage has copies, which
nothing else knows of. They get their weights before a step, and hand their gradients over after it. Both ends hold the same
shards, so that each rank talks to one other, or to none where both stages are its own.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.distributed import transfers
from trainer.distributed.pipeline_stages import Stage
from trainer.distributed.weight_init import materialize


class StageCopies:
    """The copies, from the point of view of one rank of the pipeline. All of its ranks call the same methods."""

    def __init__(self, stages: Sequence[Stage], *, group: dist.ProcessGroup) -> None:
        """stages: of this rank, parallelized and with first weights, their copies still on the meta device."""
        self.exist = bool(stages[0].copied)
        self.group = group
        ranks = stages[0].layout.ranks
        self._first_rank, self._last_rank = ranks[0], ranks[-1]
        self._originals: list[nn.Parameter] = []
        self._copies: list[nn.Parameter] = []
        self._sending: list[tuple[dist.Work, Tensor]] = []
        for stage in stages:
            used = [stage.module.get_submodule(name) for name in stage.copied if stage.is_first or stage.is_last]
            if stage.is_last:
                device = next(p.device for p in stage.module.parameters() if not p.is_meta)
                for module in used:
                    materialize(module, device, device)
            parameters = [parameter for module in used for parameter in module.parameters()]
            (self._originals if stage.is_first else self._copies).extend(parameters)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the copies the weights of the originals. Before a step's first pass, with no weights gathered."""
        if self._originals and self._copies:
            for original, copy in zip(self._originals, self._copies, strict=True):
                _local(copy).copy_(_local(original))
            return
        self._send([_local(original) for original in self._originals], self._last_rank)
        for copy in self._copies:
            local = _local(copy)
            local.copy_(self._receive(local, self._first_rank))

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """Add the copies' gradients to those of the originals, and forget them. After a step's last pass, when they are reduced."""
        gradients = [_local(_get_gradient(parameter)) for parameter in self._originals or self._copies]
        if self._originals and self._copies:
            for gradient, copy in zip(gradients, self._copies, strict=True):
                gradient.add_(_local(_get_gradient(copy)))
        elif self._originals:
            for gradient in gradients:
                gradient.add_(self._receive(gradient, self._last_rank))
        else:
            self._send(gradients, self._first_rank)
        for copy in self._copies:
            copy.grad = None
        for work, tensor in self._sending:
            transfers.send(work, tensor, self.group)
        self._sending = []

    def _send(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Send to a rank of the pipeline. Nobody waits for it before the end of the step; tensors stay until then."""
        for tensor in tensors:
            if tensor.numel():
                tensor = tensor.contiguous()
                work = dist.isend(tensor, group=self.group, group_dst=rank)
                assert work is not None, "this rank is in the group"
                self._sending.append((work, tensor))

    def _receive(self, like: Tensor, rank: int) -> Tensor:
        """Return what a rank of the pipeline sends: of this shape, dtype and device."""
        buffer = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if buffer.numel():
            work = dist.irecv(buffer, group=self.group, group_src=rank)
            assert work is not None, "this rank is in the group"
            transfers.recv(work, buffer, self.group)
        return buffer


def _get_gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "both stages use it in each pass"
    return parameter.grad


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
