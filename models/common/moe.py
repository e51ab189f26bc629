"""Mixture of experts (DeepSeekMoE, arXiv 2401.06066): some experts see every token, of the others each token meets a few.

Letters: B batch, S seq, D dim, H hidden width of an expert, E experts, K experts of a token, R = B S K rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.common.feed_forward import FeedForward
from models.common.grouped_mm import grouped_mm
from models.common.router import Router, Routing
from models.common.token_dispatch import RowOrder, Rows, TokenDispatcher, sort_by_expert


class ExpertLoad(NamedTuple):
    """What one forward pass of a mixture has to tell besides its output."""

    tokens: torch.Tensor
    """(E,) int32: rows of each expert."""
    balance_loss: torch.Tensor | None
    """See `models.common.router.Routing`."""


class GroupedExperts(nn.Module):
    """SwiGLU experts, w2(silu(w1 x) * w3 x) each, on rows sorted by expert, in three grouped matrix products.

    The gate multiplies the hidden vector before w2, in fp32: that is the same as to multiply the output, and spares to keep
    the outputs for the gates' gradient. Under expert parallelism the weights are those of the experts here.
    """

    product_w1: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """`grouped_mm`, or one like it in low precision."""
    product_w2: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    product_w3: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __init__(self, dim: int, hidden_dim: int, n_experts: int) -> None:
        super().__init__()
        self.product_w1 = self.product_w2 = self.product_w3 = grouped_mm
        self.w1 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=0.02)

    def forward(self, rows: Rows) -> torch.Tensor:
        """Return each row's result, gated: (R, D).

        Rows beyond `rows.ends[-1]` come out, and their gradients, as whatever was in memory: nobody may read them.
        """
        return self.multiply(rows, *(_to_local(weight) for weight in (self.w1, self.w2, self.w3)))

    def multiply(self, rows: Rows, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
        """Return the same from weights that are at hand. w1, w3: (E, H, D); w2: (E, D, H)"""
        gate = self.product_w1(rows.tokens, w1, rows.ends)  # (R, H)
        up = self.product_w3(rows.tokens, w3, rows.ends)  # (R, H)
        hidden = F.silu(gate.float()) * up.float() * rows.gates.unsqueeze(-1)
        return self.product_w2(hidden.type_as(up), w2, rows.ends)  # (R, D)

    def extra_repr(self) -> str:
        n_experts, hidden_dim, dim = self.w1.shape
        return f"n_experts={n_experts}, dim={dim}, hidden_dim={hidden_dim}"


class MoE(nn.Module):
    """Routed experts and shared ones, side by side; the shared ones are one feed-forward of their joint width.

    A forward pass changes nothing here and returns its counts instead, so that it can be recomputed and compiled: whoever
    calls it, outside of recomputation, adds them to `tokens_per_expert`. Nothing in it makes the host wait.
    """

    tokens_per_expert: torch.Tensor
    """(E,) int64: tokens of this rank since the counts were last set to zero."""

    def __init__(self, dim: int, hidden_dim: int, *, router: Router, n_shared_experts: int = 1) -> None:
        super().__init__()
        self.router = router
        self.dispatcher = TokenDispatcher()
        self.experts = GroupedExperts(dim, hidden_dim, router.n_experts)
        self.shared_experts = FeedForward(dim, n_shared_experts * hidden_dim) if n_shared_experts > 0 else None
        counts = torch.zeros(router.n_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ExpertLoad]:
        """Return the mixture's part of the residual stream, and what its experts had to do. x: (B, S, D) -> (B, S, D)"""
        routing, order = self.route(x)
        sent = self.dispatcher.send(x.flatten(0, 1), routing.gates, order)
        # Between the two, so that an exchange with other ranks has something to hide behind.
        shared = None if self.shared_experts is None else self.shared_experts(x)
        rows = self.dispatcher.receive(sent)
        routed = self.dispatcher.combine(self.experts(rows), sent).view_as(x)
        return routed if shared is None else shared + routed, ExpertLoad(order.counts, routing.balance_loss)

    def route(self, x: torch.Tensor) -> tuple[Routing, RowOrder]:
        """Return what the router decided, and where each token's rows are. x: (B, S, D)"""
        routing = self.router(x)
        return routing, sort_by_expert(routing.experts, self.router.n_experts)

    def init_buffers(self, device: torch.device | str) -> None:
        """Begin with no counts and no bias, on `device`."""
        self.tokens_per_expert = torch.zeros(self.router.n_experts, dtype=torch.int64, device=device)
        self.router.init_buffers(device)


def _to_local(weight: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a weight that is spread over ranks (DTensor, which models do not know)."""
    return weight.to_local() if hasattr(weight, "to_local") else weight
