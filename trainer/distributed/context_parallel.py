"""Context parallelism: each rank holds a part of every sequence, and attends to the tokens of all.

Whatever works token by token needs nothing: the weights are the same on all ranks (FSDP shards them over these ranks, too) and
their gradients add up. What looks at whole sequences is told of the others' tokens: multi-token prediction by the batch
(`trainer.components.passes`), and the sequence-wise balance loss of a router by a sum of its counts over the ranks. Its other
factor is a sum over tokens, which add up like any loss. Attention is replaced, by one of three methods
(`parallelism.context_parallel_method`):

- allgather and ring, for causal attention: `sharded_attention` tells how. With a document mask, allgather brings the keys and
  values together in their order, and this rank's queries attend to them under their rows of the mask, in one call.
- ulysses (Jacobs et al., arXiv 2309.14509): an all-to-all gives each rank all tokens of a part of the heads; attention is as
  on one device, with or without a mask; another all-to-all gives the heads back.

Everything is made of plain tensors: no DTensor, and no asynchronous collective's result, enters or leaves a block.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from models.common.attention import AttentionMask
from models.common.router import Router
from models.plan import ParallelPlan, match_modules
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed.sequence_collectives import exchange_heads, join_sequence, sum_counts
from trainer.distributed.sequence_split import is_balanced
from trainer.distributed.sharded_attention import GATHERED, RING_GATHERED, RING_PASSED_ON, sharded_attention

Forward = Callable[..., torch.Tensor]
"""(module, q (B, N, s, H), k (B, M, s, H), v (B, M, s, V), *, mask) -> (B, N, s, V), s tokens of this rank"""


def apply_context_parallel(
    model: nn.Module, *, plan: ParallelPlan, mesh: DeviceMesh, parallelism: ParallelismConfig
) -> None:
    """Have the plan's attention modules attend, and routers count, over the ranks of `mesh` (1-D), in place. Before AC, compilation
    and FSDP.

    Afterwards the model takes this rank's tokens, as `SequenceSplit.split` gives them: with their positions, which it now
    insists on, and with the mask of `SequenceSplit.build_mask`, if there are documents.

    Raises:
        ValueError: the plan names no attention modules, or a glob that matches nothing.
    """
    if not plan.attention:
        raise ValueError(
            "parallelism.context_parallel_degree > 1 needs a plan that names the attention modules "
            "(models.plan.ParallelPlan.attention), and this model's plan has none: set the degree to 1"
        )
    modules = dict(model.named_modules())
    forward = _build_forward(mesh.get_group().group_name, parallelism)
    for name in match_modules(plan.attention, modules):
        # One function for all layers: a compiled block's code is shared by those whose functions are the same.
        modules[name].forward = types.MethodType(forward, modules[name])
    for module in modules.values():
        if isinstance(module, Router):
            module.sum_over_sequence = _sum_further(module.sum_over_sequence, mesh.get_group().group_name)
    require_positions(model)


def require_positions(model: nn.Module) -> None:
    """Have a model, or a stage of a pipeline, refuse to be called without positions: it would count each rank's tokens from 0."""
    model.register_forward_pre_hook(_check_positions, with_kwargs=True)


@functools.cache
def _sum_further(
    inner: Callable[[torch.Tensor], torch.Tensor], group_name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what sums counts over a group after `inner`, a sum over the ranks of tensor parallelism, say. One for all layers."""

    def sum_over_sequence(counts: torch.Tensor) -> torch.Tensor:
        return sum_counts(inner(counts), group_name)

    return sum_over_sequence


def _build_forward(group_name: str, parallelism: ParallelismConfig) -> Forward:
    """Return what replaces the forward of an attention module."""
    if parallelism.context_parallel_method == "ulysses":
        return _build_ulysses_forward(group_name)
    if parallelism.context_parallel_method == "allgather":
        method = GATHERED
    else:
        method = RING_GATHERED if parallelism.context_parallel_rotate_method == "allgather" else RING_PASSED_ON
    return _build_sharded_forward(group_name, is_balanced(parallelism), method)


def _build_sharded_forward(group_name: str, balanced: bool, method: str) -> Forward:
    def forward(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: AttentionMask = None
    ) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, s, N, H)
        if mask is None:
            out, _ = sharded_attention(q, k, v, group_name, balanced, method)
            return out.transpose(1, 2)
        if method != GATHERED:
            raise ValueError(
                "parallelism.context_parallel_method = 'ring' knows no masks but the causal one: "
                "use 'allgather' or 'ulysses' with model.attn_mask_type = 'block_causal'"
            )
        k, v = join_sequence(k, group_name, balanced), join_sequence(v, group_name, balanced)
        _check_mask(mask, q.shape[1], k.shape[1])
        return type(module).forward(module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)

    return forward


def _build_ulysses_forward(group_name: str) -> Forward:
    def forward(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: AttentionMask = None
    ) -> torch.Tensor:
        q = exchange_heads(q.transpose(1, 2), group_name, True).transpose(1, 2)  # (B, n, S, H)
        k = exchange_heads(k.transpose(1, 2), group_name, True).transpose(1, 2)
        v = exchange_heads(v.transpose(1, 2), group_name, True).transpose(1, 2)
        _check_mask(mask, q.shape[2], k.shape[2])
        out = type(module).forward(module, q, k, v, mask=mask)
        return exchange_heads(out.transpose(1, 2), group_name, False).transpose(1, 2)

    return forward


def _check_mask(mask: AttentionMask, queries: int, keys: int) -> None:
    """Raise ValueError if a mask is not for these numbers of queries and keys."""
    if mask is not None and tuple(mask.shape[-2:]) != (queries, keys):
        raise ValueError(
            f"the mask is for {tuple(mask.shape[-2:])} queries and keys, but attention has {(queries, keys)}: "
            "build it with SequenceSplit.build_mask, from the positions of whole sequences"
        )


def _check_positions(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a call without positions: the model's default would count each rank's tokens from 0."""
    if kwargs.get("positions") is None:
        raise ValueError(
            "under context parallelism a model must be told the positions of its tokens: call "
            "model(tokens, positions=..., ...) with a batch from SequenceSplit.split"
        )
