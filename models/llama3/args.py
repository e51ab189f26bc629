"""Sizes of Llama 3 (Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783). Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies; `models.common.rope.scale_frequencies` has the formula."""

    factor: float = 8.0
    """Low frequencies are divided by this."""
    low_freq_factor: float = 1.0
    """Wavelengths beyond `original_max_seq_len / low_freq_factor` are stretched fully."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_max_seq_len / high_freq_factor` stay as they are."""
    original_max_seq_len: int = 8192
    """Tokens in the sequences of the first phase of pretraining."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_seq_len < 1:
            raise ValueError(f"rope_scaling needs factor >= 1 and original_max_seq_len >= 1, got {self}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope_scaling needs 0 < low_freq_factor < high_freq_factor, got {self}")


@dataclass(frozen=True)
class LlamaArgs:
    """One size of the network. The defaults are those of the 8B model.

    Raises:
        ValueError: sizes that do not fit each other, or are not positive.
    """

    dim: int = 4096
    """Width of the residual stream."""
    n_layers: int = 32
    """Blocks."""
    n_heads: int = 32
    """Query heads, each of `dim / n_heads`."""
    n_kv_heads: int = 8
    """Key and value heads, each shared by `n_heads / n_kv_heads` query heads (grouped-query attention)."""
    vocab_size: int = 128256
    """Rows of the embedding table and of the output matrix."""
    multiple_of: int = 1024
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = 1.3
    """Factor on the feed-forward width, before it is rounded."""
    ffn_hidden_dim: int | None = None
    """Feed-forward width, in place of the rule of `multiple_of` and `ffn_dim_multiplier`."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 500000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's stretching of the rotary frequencies."""
    max_seq_len: int = 8192
    """Tokens in the longest sequence: rows of the rotary table."""
    tie_embeddings: bool = False
    """The output matrix is the embedding table (Llama 3.2 1B and 3B)."""
    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    """block_causal keeps attention inside each document."""

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.ffn_hidden_dim is not None and self.ffn_hidden_dim < 1:
            raise ValueError(f"ffn_hidden_dim = {self.ffn_hidden_dim} must be at least 1")
        if self.dim % self.n_heads:
            raise ValueError(f"dim = {self.dim} must be a multiple of n_heads = {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads = {self.head_dim} must be even: rotary embeddings turn pairs. "
                f"Change dim = {self.dim} or n_heads = {self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.attn_mask_type not in ("causal", "block_causal"):
            raise ValueError(f"attn_mask_type = {self.attn_mask_type!r} must be 'causal' or 'block_causal'")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward part: 8/3 dim, scaled, rounded up (Meta's reference code)."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    def n_matmul_params(self) -> int:
        """Parameters that take part in a matrix product for each token: no lookup, no norms, the output included."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        feed_forward = 3 * self.dim * self.hidden_dim
        return self.n_layers * (attention + feed_forward) + self.dim * self.vocab_size

    def n_params(self) -> int:
        """Parameters; tied embeddings are counted once."""
        norms = (2 * self.n_layers + 1) * self.dim
        embedding = 0 if self.tie_embeddings else self.dim * self.vocab_size
        return self.n_matmul_params() + norms + embedding

    def flops_per_token(self, seq_len: int, convention: Literal["causal", "full"] = "causal") -> float:
        """FLOPs of forward and backward for one token, nothing recomputed.

        Two for each multiply-add, once in the forward pass and twice in the backward pass: 6 a matmul parameter, and
        12 * n_layers * dim for each key that a query sees. In `causal` a query sees (seq_len + 1) / 2 keys on average,
        the exact count; `full` counts seq_len, as in the PaLM paper (arXiv 2204.02311, appendix B) and torchtitan.
        """
        if convention not in ("causal", "full"):
            raise ValueError(f"convention = {convention!r} must be 'causal' or 'full'")
        keys = (seq_len + 1) / 2 if convention == "causal" else seq_len
        return 6 * self.n_matmul_params() + 12 * self.n_layers * self.dim * keys


_CONTEXT = 131072  # of the published 3.1 and 3.2 models; a run sets its own max_seq_len

FLAVORS = {
    "debugmodel": LlamaArgs(
        dim=256,
        n_layers=6,
        n_heads=16,
        n_kv_heads=16,
        vocab_size=2048,
        multiple_of=256,
        ffn_dim_multiplier=None,
        max_seq_len=2048,
    ),
    "1B": LlamaArgs(
        dim=2048,
        n_layers=16,
        n_heads=32,
        multiple_of=256,
        ffn_dim_multiplier=1.5,
        rope_scaling=RopeScaling(factor=32.0),
        max_seq_len=_CONTEXT,
        tie_embeddings=True,
    ),
    "3B": LlamaArgs(
        dim=3072,
        n_layers=28,
        n_heads=24,
        multiple_of=256,
        ffn_dim_multiplier=1.0,
        rope_scaling=RopeScaling(factor=32.0),
        max_seq_len=_CONTEXT,
        tie_embeddings=True,
    ),
    "8B": LlamaArgs(rope_scaling=RopeScaling(), max_seq_len=_CONTEXT),
    "70B": LlamaArgs(
        dim=8192,
        n_layers=80,
        n_heads=64,
        multiple_of=4096,
        rope_scaling=RopeScaling(),
        max_seq_len=_CONTEXT,
    ),
    "405B": LlamaArgs(
        dim=16384,
        n_layers=126,
        n_heads=128,
        multiple_of=4096,
        ffn_dim_multiplier=1.2,
        rope_scaling=RopeScaling(),
        max_seq_len=_CONTEXT,
    ),
}
