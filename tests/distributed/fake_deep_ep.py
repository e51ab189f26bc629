"""What DeepEP's `Buffer` does, by its documentation and in plain torch, to stand in for the package where there is none."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Event:
    def current_stream_wait(self) -> None:
        pass


class Buffer:
    """Every rank has the same number of tokens here; the package needs no such thing."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: hidden_bytes * ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    @staticmethod
    def capture() -> _Event:
        return _Event()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple:
        assert topk_idx.dtype == torch.int64
        by_expert = topk_idx.flatten().bincount(minlength=num_experts)
        ranks = topk_idx // (num_experts // self.size)
        is_in_rank = torch.stack([(ranks == rank).any(dim=1) for rank in range(self.size)], dim=1)
        return is_in_rank.sum(dim=0).int(), None, by_expert.int(), is_in_rank, _Event()

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def dispatch(self, x: Tensor, *, handle: Any = None, **given: Any) -> tuple:
        """Tokens for this rank, by rank and in their order there."""
        if handle is not None:
            assert not given
            return self._gather(x)[handle], None, None, None, None, _Event()
        assert given["topk_weights"].dtype == torch.float32
        n_here = given["num_tokens_per_expert"].shape[0] // self.size
        is_here = self._gather(given["is_token_in_rank"].int())[:, :, self.rank].bool()
        experts = self._gather(given["topk_idx"])[is_here] - self.rank * n_here
        is_local = (experts >= 0) & (experts < n_here)
        experts = experts.where(is_local, -1)
        gates = self._gather(given["topk_weights"])[is_here].where(is_local, 0.0)
        counts = experts[is_local].bincount(minlength=n_here).tolist()
        return self._gather(x)[is_here], experts, gates, counts, is_here, _Event()

    def combine(self, x: Tensor, handle: Tensor, topk_weights: Tensor | None = None) -> tuple:
        return self._return(x, handle), None if topk_weights is None else self._return(topk_weights, handle), _Event()

    def _return(self, x: Tensor, is_here: Tensor) -> Tensor:
        total = x.new_zeros(*is_here.shape, x.shape[1])
        total[is_here] = x
        dist.all_reduce(total, group=self.group)
        return total[self.rank].clone()
