"""Which experts work on which token, and with what weight.

Letters: B batch, S seq, T = B S tokens, D dim, E experts, K experts of a token, G groups of experts.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ScoreFunction = Literal["sigmoid", "softmax"]
BiasUpdate = Literal["sign", "proportional"]


class Routing(NamedTuple):
    """What the router decided."""

    experts: torch.Tensor
    """(T, K) int64, in no particular order."""
    gates: torch.Tensor
    """(T, K) fp32: what each expert's output is multiplied with."""
    balance_loss: torch.Tensor | None
    """The sequence-wise auxiliary loss, summed over tokens: 0-dim fp32. None where it is off."""


class Router(nn.Module):
    """Choose `top_k` of `n_experts` for each token (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). fp32 inside.

    Scores are the sigmoid or the softmax of a linear map. The choice goes by score plus a bias of each expert, the gates by
    the scores alone. With groups, the experts of only the best `n_limited_groups` groups are eligible: a group is as good as its
    two best experts together where scores are sigmoids (V3), and as its best where they are a softmax (V2, arXiv 2405.04434,
    section 2.2.2). Operations and their order are those of transformers, so that ties are broken alike.

    normalizes: gates of a token are divided by their sum. scale: factor on the gates, after that. uses_bias: whether there is
    a bias. bias_update: see `update_expert_bias`. balance_alpha: weight of the auxiliary loss, which is computed in training
    only; 0 for none.
    """

    expert_bias: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        n_experts: int,
        top_k: int,
        *,
        score_func: ScoreFunction = "sigmoid",
        n_groups: int = 1,
        n_limited_groups: int = 1,
        normalizes: bool = True,
        scale: float = 1.0,
        uses_bias: bool = True,
        bias_update: BiasUpdate = "sign",
        balance_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.score_func = score_func
        self.n_groups, self.n_limited_groups = n_groups, n_limited_groups
        self.normalizes, self.scale = normalizes, scale
        self.bias_update = bias_update
        self.balance_alpha = balance_alpha
        self.gate = nn.Linear(dim, n_experts, bias=False)
        # Changed between steps, by `update_expert_bias`; part of checkpoints.
        self.register_buffer("expert_bias", torch.zeros(n_experts) if uses_bias else None)
        self.force_load_balance = False
        """Deal tokens to the experts in turn, whatever the scores: for benchmarks, never to learn anything. Set it before the
        first forward pass."""
        self.sum_over_sequence: Callable[[torch.Tensor], torch.Tensor] = _return_unchanged
        """Adds (B, E) counts up over the ranks that hold other tokens of the same sequences. No gradient passes."""

    def forward(self, x: torch.Tensor) -> Routing:
        """Route each token. x: (B, S, D)"""
        logits = F.linear(x.flatten(0, 1).float(), self.get_gate_weight())  # (T, E)
        scores = logits.sigmoid() if self.score_func == "sigmoid" else logits.softmax(dim=-1)
        if self.force_load_balance:
            experts = torch.arange(scores.shape[0] * self.top_k, device=x.device).remainder(self.n_experts)
            experts = experts.view(-1, self.top_k)
        else:
            experts = self._choose(scores.detach(), self.expert_bias)
        gates = scores.gather(1, experts)
        if self.normalizes:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        balance_loss = None
        if self.training and self.balance_alpha > 0:
            balance_loss = self._get_balance_loss(scores, experts, n_sequences=x.shape[0])
        return Routing(experts, gates * self.scale, balance_loss)

    def get_gate_weight(self) -> torch.Tensor:
        """Return the matrix that makes logits, (E, D) fp32."""
        # Not through the module: a conversion of linear layers (float8) must not reach the router.
        return self.gate.weight.float()

    def _choose(self, scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return each token's experts. scores: (T, E); bias: (E,) -> (T, K)"""
        choice = scores if bias is None else scores + bias
        if self.n_limited_groups < self.n_groups:
            grouped = choice.unflatten(1, (self.n_groups, -1))  # (T, G, E/G)
            best = 2 if self.score_func == "sigmoid" else 1
            group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
            groups = group_scores.topk(self.n_limited_groups, dim=-1, sorted=False).indices
            is_eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, groups, True)
            choice = grouped.masked_fill(~is_eligible.unsqueeze(-1), float("-inf")).flatten(1)
        return choice.topk(self.top_k, dim=-1, sorted=False).indices

    def _get_balance_loss(self, scores: torch.Tensor, experts: torch.Tensor, n_sequences: int) -> torch.Tensor:
        """Return alpha sum_i f_i P_i of each sequence (equations 17 to 20), times its tokens, summed over sequences.

        f_i counts how often the scores alone choose expert i, without the bias, and has no gradient. P_i is the mean share of
        expert i in a token's scores. Times the tokens it is a sum over tokens, as the trainer's cross-entropy is: divided by
        the number of tokens in the global batch it becomes the mean over sequences.
        """
        if self.expert_bias is not None and not self.force_load_balance:
            experts = self._choose(scores.detach(), None)
        sequence = torch.arange(n_sequences, device=scores.device).unsqueeze(1) * self.n_experts
        slots = experts.view(n_sequences, -1) + sequence  # (B, S K)
        counts = scores.new_zeros(n_sequences * self.n_experts)
        counts = counts.scatter_add(0, slots.flatten(), torch.ones_like(slots, dtype=scores.dtype).flatten())
        counts = self.sum_over_sequence(counts.view(n_sequences, -1))  # (B, E)
        frequencies = counts * (self.n_experts / counts.sum(dim=-1, keepdim=True))  # f
        shares = (scores / scores.sum(dim=-1, keepdim=True)).view(n_sequences, -1, self.n_experts)
        return self.balance_alpha * (frequencies * shares.sum(dim=1)).sum()

    @torch.no_grad()
    def update_expert_bias(self, tokens_per_expert: torch.Tensor, speed: float) -> None:
        """Make experts with too many tokens less likely, and those with too few more likely, in place.

        One step of Wang et al. (arXiv 2408.15664, algorithm 1), to be taken once an optimizer step and alike on all ranks: `speed`
        up or down ("sign"), or as much of it as the load is off the mean ("proportional", at most all of it, at a load of nothing
        or twice the mean), which can be fast far from balance and still at rest near it. The mean of the steps is taken off, which
        changes no choice and keeps the biases small enough for fp32. The host waits for nothing.

        tokens_per_expert: (E,), summed over all ranks that see different tokens; speed: the paper's u, per optimizer step
        """
        if self.expert_bias is None:
            return
        counts = tokens_per_expert.float()
        missing = 1.0 - counts / counts.mean().clamp(min=1.0)
        step = speed * (missing.sign() if self.bias_update == "sign" else missing.clamp(-1.0, 1.0))
        self.expert_bias.add_(step - step.mean())

    def init_buffers(self, device: torch.device | str) -> None:
        """Begin with no bias, on `device`."""
        if self.expert_bias is not None:
            self.expert_bias = torch.zeros(self.n_experts, device=device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Router":
        # `model.to(torch.bfloat16)` would round the bias, whose steps are smaller than that.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, top_k={self.top_k}, score_func={self.score_func!r}"


def _return_unchanged(counts: torch.Tensor) -> torch.Tensor:
    return counts
