"""Mixtures of experts as plainly as can be, for reference: one expert after the other, on the tokens that chose it."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.common.moe import ExpertLoad, MoE


def use_loops(model: nn.Module) -> None:
    """Have all mixtures of `model` compute their experts in a loop, in place."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.forward = functools.partial(_forward, module)


def _forward(mixture: MoE, x: torch.Tensor) -> tuple[torch.Tensor, ExpertLoad]:
    routing = mixture.router(x)
    tokens = x.flatten(0, 1)
    out = torch.zeros_like(tokens)
    experts = mixture.experts
    for expert in range(mixture.router.n_experts):
        chosen, place = (routing.experts == expert).nonzero(as_tuple=True)
        hidden = F.silu(tokens[chosen] @ experts.w1[expert].t()) * (tokens[chosen] @ experts.w3[expert].t())
        results = (hidden @ experts.w2[expert].t()) * routing.gates[chosen, place].unsqueeze(-1)
        out = out.index_add(0, chosen, results.to(out.dtype))
    out = out.view_as(x)
    counts = routing.experts.flatten().bincount(minlength=mixture.router.n_experts).to(torch.int32)
    if mixture.shared_experts is not None:
        out = out + mixture.shared_experts(x)
    return out, ExpertLoad(counts, routing.balance_loss)
