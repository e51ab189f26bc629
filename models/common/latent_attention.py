"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values come from one small latent vector.

Letters: B batch, S seq, D dim, N heads, C rank of the keys' and values' latent, Q rank of the queries' latent, R rotary part
of a head, P its part without position, H = P + R, V head size of the values.
"""

import torch
import torch.nn as nn

from models.common.attention import AttentionMask, DotProductAttention
from models.common.rope import RotaryEmbedding

# Of the latents' norms in the published code and in transformers, whatever the epsilon of the other norms.
_LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention whose keys and values are made from a latent vector of each token, and whose queries may be, too.

    A head has a part without position, made from the latent, and a rotary part; that of the keys is one for all heads. `rope`
    is shared among the blocks. The number of heads is read from the projections' outputs, which tensor parallelism splits.

    q_lora_rank: size of the queries' latent, 0 for queries straight from the input. query_scale: factor on the scores, on top
    of 1 / sqrt(H): YaRN's mscale squared. It goes into the queries, so that every kernel and every parallel attention that
    knows only 1 / sqrt(H) is right.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        *,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: RotaryEmbedding,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.n_heads = self.n_kv_heads = n_heads
        self.head_dim, self.v_head_dim = qk_nope_head_dim + qk_rope_head_dim, v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.kv_lora_rank = kv_lora_rank
        self.query_scale = query_scale
        self.is_query_compressed = q_lora_rank > 0
        if self.is_query_compressed:
            self.wq_a = nn.Linear(dim, q_lora_rank, bias=False)
            self.q_norm = nn.RMSNorm(q_lora_rank, eps=_LATENT_NORM_EPS)
            self.wq_b = nn.Linear(q_lora_rank, n_heads * self.head_dim, bias=False)
        else:
            self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wkv_a = nn.Linear(dim, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, eps=_LATENT_NORM_EPS)
        self.wkv_b = nn.Linear(kv_lora_rank, n_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.wo = nn.Linear(n_heads * v_head_dim, dim, bias=False)
        self.rope = rope
        self.inner_attention = DotProductAttention()

    def forward(
        self, x: torch.Tensor, *, positions: torch.Tensor | None = None, mask: AttentionMask = None
    ) -> torch.Tensor:
        """Return the attention's part of the residual stream.

        x: (B, S, D); positions: (B, S) int64, by default 0 to S-1; mask: see `AttentionMask` -> (B, S, D)
        """
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.is_query_compressed else self.wq(x)
        # Not those of x: tensor parallelism gives each rank a part of the sequence, which the projections bring together.
        batch, seq, _ = q.shape
        q = q.view(batch, seq, -1, self.head_dim)  # (B, S, N, H)
        q_nope, q_rope = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.wkv_a(x).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        q_rope, k_rope = self.rope(q_rope, k_rope.unsqueeze(2), positions=positions)  # (B, S, N, R), (B, S, 1, R)
        kv = self.wkv_b(self.kv_norm(latent)).view(batch, seq, -1, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)  # (B, S, N, P), (B, S, N, V)
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, S, N, H)
        if self.query_scale != 1.0:
            q = q * self.query_scale
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)  # (B, S, N, H)
        heads = self.inner_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        return self.wo(heads.transpose(1, 2).reshape(batch, seq, -1))
