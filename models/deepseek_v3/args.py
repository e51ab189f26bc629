"""Sizes of DeepSeek-V3 (arXiv 2412.19437) and DeepSeek-V2 (arXiv 2405.04434). Imports no torch."""

from dataclasses import dataclass
from typing import Literal

# Rows of a grouped matrix product must begin at multiples of 16 bytes: 8 numbers in bf16.
_GROUPED_MULTIPLE = 8
# Experts are sorted as 16-bit numbers.
_MAX_EXPERTS = 2**15 - 1


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretching of the rotary frequencies; `models.common.rope.scale_frequencies_yarn` has the formula."""

    factor: float = 40.0
    """Slow rotations are slowed down by this."""
    beta_fast: float = 32.0
    """Pairs that turn at least so often in the original length stay as they are."""
    beta_slow: float = 1.0
    """Pairs that turn at most so often in the original length are slowed down fully."""
    mscale: float = 1.0
    """Weight of the logarithm in the change of attention's temperature (`mscale` and `mscale_all_dim` in the published files)."""
    original_max_seq_len: int = 4096
    """Tokens in the sequences of pretraining."""
    always: bool = False
    """Also for sequences that are no longer than the original length: to go on with weights that were trained with it. Otherwise
    it begins beyond, as in the published code, so that pretraining goes without."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_seq_len < 1 or self.mscale <= 0:
            raise ValueError(f"rope_scaling needs factor >= 1, original_max_seq_len >= 1 and mscale > 0, got {self}")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"rope_scaling needs 0 < beta_slow < beta_fast, got {self}")


@dataclass(frozen=True)
class DeepSeekV3Args:
    """One size of the network. The defaults are those of the 671B model.

    Raises:
        ValueError: sizes that do not fit each other, or are not positive.
    """

    dim: int = 7168
    """Width of the residual stream."""
    n_layers: int = 61
    """Blocks, without those of multi-token prediction."""
    n_dense_layers: int = 3
    """The first blocks, which have a plain feed-forward."""
    n_heads: int = 128
    """Attention heads."""
    vocab_size: int = 129280
    """Rows of the embedding table and of the output matrix."""
    hidden_dim: int = 18432
    """Width of a plain feed-forward."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    q_lora_rank: int = 1536
    """Size of the latent that queries are made from. 0: they are made from the residual stream."""
    kv_lora_rank: int = 512
    """Size of the latent that keys and values are made from."""
    qk_nope_head_dim: int = 128
    """Part of a query and key head that has no position."""
    qk_rope_head_dim: int = 64
    """Rotary part of a query and key head."""
    v_head_dim: int = 128
    """Width of a value head."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: YarnScaling | None = YarnScaling()
    """YaRN's stretching of the rotary frequencies."""

    n_experts: int = 256
    """Routed experts of a block."""
    top_k: int = 8
    """Routed experts of a token."""
    n_shared_experts: int = 1
    """Experts that see every token."""
    moe_hidden_dim: int = 2048
    """Width of an expert."""
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes scores of the router's logits."""
    n_expert_groups: int = 8
    """Groups of experts, in the order of their numbers."""
    n_limited_groups: int = 4
    """Groups that a token's experts may come from."""
    normalizes_gates: bool = True
    """The gates of a token's experts are divided by their sum."""
    route_scale: float = 2.5
    """Factor on the gates."""
    uses_expert_bias: bool = True
    """Experts are balanced by a bias that their choice goes by (auxiliary-loss-free balancing)."""
    bias_update: Literal["sign", "proportional"] = "sign"
    """Whether that bias always moves by `bias_update_speed`, or by a part of it near balance (`Router.update_expert_bias`)."""
    bias_update_speed: float = 1e-3
    """How much that bias changes in an optimizer step, at most."""
    balance_loss_alpha: float = 0.0
    """Weight of the sequence-wise auxiliary loss. 0: there is none."""

    mtp_depth: int = 0
    """Further tokens that each token predicts in training (multi-token prediction), each with a block of its own."""
    mtp_weight: float = 0.3
    """Weight of the mean of their losses."""

    max_seq_len: int = 163840
    """Tokens in the longest sequence: rows of the rotary table."""
    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    """block_causal keeps attention inside each document."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_routing()
        if self.attn_mask_type not in ("causal", "block_causal"):
            raise ValueError(f"attn_mask_type = {self.attn_mask_type!r} must be 'causal' or 'block_causal'")

    def _check_sizes(self) -> None:
        at_least_1 = (
            *("dim", "n_layers", "n_heads", "vocab_size", "hidden_dim", "kv_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim", "n_experts", "top_k", "moe_hidden_dim", "max_seq_len"),
            *("n_expert_groups", "n_limited_groups"),
        )
        at_least_0 = (
            *("n_dense_layers", "q_lora_rank", "n_shared_experts", "mtp_depth"),
            *("bias_update_speed", "balance_loss_alpha", "mtp_weight"),
        )
        for names, least in ((at_least_1, 1), (at_least_0, 0)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name} = {getattr(self, name)} must be at least {least}")
        if self.n_dense_layers > self.n_layers:
            raise ValueError(f"n_dense_layers = {self.n_dense_layers} must be at most n_layers = {self.n_layers}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even: rotary embeddings turn pairs")
        for name in ("dim", "moe_hidden_dim"):
            if getattr(self, name) % _GROUPED_MULTIPLE:
                raise ValueError(
                    f"{name} = {getattr(self, name)} must be a multiple of {_GROUPED_MULTIPLE}: rows of a grouped matrix product "
                    "begin at multiples of 16 bytes"
                )

    def _check_routing(self) -> None:
        if self.score_func not in ("sigmoid", "softmax"):
            raise ValueError(f"score_func = {self.score_func!r} must be 'sigmoid' or 'softmax'")
        if self.bias_update not in ("sign", "proportional"):
            raise ValueError(f"bias_update = {self.bias_update!r} must be 'sign' or 'proportional'")
        if self.n_experts > _MAX_EXPERTS:
            raise ValueError(f"n_experts = {self.n_experts} must be at most {_MAX_EXPERTS}")
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k = {self.top_k} must be at most n_experts = {self.n_experts}")
        if self.n_experts % self.n_expert_groups:
            raise ValueError(
                f"n_experts = {self.n_experts} must be a multiple of n_expert_groups = {self.n_expert_groups}"
            )
        if self.n_limited_groups > self.n_expert_groups:
            raise ValueError(
                f"n_limited_groups = {self.n_limited_groups} must be at most n_expert_groups = {self.n_expert_groups}"
            )
        group = self.n_experts // self.n_expert_groups
        if self.top_k > self.n_limited_groups * group:
            raise ValueError(
                f"top_k = {self.top_k} experts cannot come from n_limited_groups = {self.n_limited_groups} groups of {group} "
                f"experts (n_experts / n_expert_groups): raise n_limited_groups or lower top_k"
            )
        if self.score_func == "sigmoid" and self.n_limited_groups < self.n_expert_groups and group < 2:
            raise ValueError(
                f"n_expert_groups = {self.n_expert_groups} leaves groups of one expert, but a group is judged by its two best: "
                f"use at most n_experts / 2 = {self.n_experts // 2} groups"
            )

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads: as many as query heads."""
        return self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of a query and key head. A value head has `v_head_dim`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def yarn(self) -> YarnScaling | None:
        """The stretching of the rotary frequencies where it applies, at this `max_seq_len`."""
        scaling = self.rope_scaling
        if scaling is None or not (scaling.always or self.max_seq_len > scaling.original_max_seq_len):
            return None
        return scaling

    def is_dense(self, layer: int) -> bool:
        """Whether a block has a plain feed-forward. Those of multi-token prediction, from `n_layers` on, have experts."""
        return layer < self.n_dense_layers

    def _count_attention(self) -> int:
        """Parameters of the matrices of one block's attention."""
        width = self.n_heads * self.head_dim
        queries = self.q_lora_rank * (self.dim + width) if self.q_lora_rank else self.dim * width
        keys_values = self.dim * (self.kv_lora_rank + self.qk_rope_head_dim)
        keys_values += self.kv_lora_rank * self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + keys_values + self.n_heads * self.v_head_dim * self.dim

    def count_matmul_params(self, layer: int, *, active: bool) -> int:
        """Return the parameters of a block's matrices; `active`: only those that one token meets.

        Blocks from `n_layers` on are those of multi-token prediction, with their projection, without embeddings and output.
        """
        if self.is_dense(layer):
            return self._count_attention() + 3 * self.dim * self.hidden_dim
        experts = (self.top_k if active else self.n_experts) + self.n_shared_experts
        projection = 2 * self.dim * self.dim if layer >= self.n_layers else 0
        router = self.dim * self.n_experts
        return self._count_attention() + router + 3 * self.dim * self.moe_hidden_dim * experts + projection

    def _count_params(self, *, active: bool) -> int:
        blocks = range(self.n_layers + self.mtp_depth)
        matrices = sum(self.count_matmul_params(layer, active=active) for layer in blocks)
        norms = len(blocks) * (2 * self.dim + self.q_lora_rank + self.kv_lora_rank)
        norms += self.dim * (1 + 3 * self.mtp_depth)
        return matrices + norms + 2 * self.dim * self.vocab_size

    def n_params(self) -> int:
        """Parameters. The biases of the router are none: no gradient makes them."""
        return self._count_params(active=False)

    def n_active_params(self) -> int:
        """Parameters that one token meets, embeddings and output included."""
        return self._count_params(active=True)

    def block_flops_per_token(
        self, layer: int, seq_len: int, convention: Literal["causal", "full"] = "causal"
    ) -> float:
        """FLOPs of a block, forward and backward, for one token; see `flops_per_token`."""
        if convention not in ("causal", "full"):
            raise ValueError(f"convention = {convention!r} must be 'causal' or 'full'")
        keys = (seq_len + 1) / 2 if convention == "causal" else seq_len
        attention = 6 * self.n_heads * (self.head_dim + self.v_head_dim) * keys
        output = 6 * self.dim * self.vocab_size if layer >= self.n_layers else 0
        return 6 * self.count_matmul_params(layer, active=True) + attention + output

    def flops_per_token(self, seq_len: int, convention: Literal["causal", "full"] = "causal") -> float:
        """FLOPs of forward and backward for one token, nothing recomputed.

        Two for each multiply-add, once in the forward pass and twice in the backward pass: 6 for each matmul parameter that the
        token meets, and 6 * n_heads * (head_dim + v_head_dim) for each key that a query sees. In `causal` a query sees
        (seq_len + 1) / 2 keys on average, the exact count; `full` counts seq_len, as torchtitan does. Each depth of
        multi-token prediction counts its block and the output once more.
        """
        blocks = range(self.n_layers + self.mtp_depth)
        output = 6 * self.dim * self.vocab_size
        return sum(self.block_flops_per_token(layer, seq_len, convention) for layer in blocks) + output


FLAVORS = {
    # All parts of the large ones, small enough for a CPU.
    "debugmodel": DeepSeekV3Args(
        dim=256,
        n_layers=6,
        n_dense_layers=1,
        n_heads=8,
        vocab_size=2048,
        hidden_dim=768,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_experts=16,
        top_k=4,
        moe_hidden_dim=128,
        n_expert_groups=4,
        n_limited_groups=2,
        max_seq_len=2048,
    ),
    # The shapes of DeepSeek-V2-Lite, as in DeepSeek-V3's own inference/configs/config_16B.json and in torchtitan; its experts
    # are routed as V3's are, normalized sigmoids and a bias, as in later versions of torchtitan.
    "16B": DeepSeekV3Args(
        dim=2048,
        n_layers=27,
        n_dense_layers=1,
        n_heads=16,
        vocab_size=102400,
        hidden_dim=10944,
        q_lora_rank=0,
        rope_scaling=YarnScaling(mscale=0.707),
        n_experts=64,
        top_k=6,
        n_shared_experts=2,
        moe_hidden_dim=1408,
        n_expert_groups=1,
        n_limited_groups=1,
        route_scale=1.0,
        # With V3's own (sign, 1e-3) the last third of the blocks still gave one expert every token after 300 steps of 65,536.
        bias_update="proportional",
        bias_update_speed=2e-2,
    ),
    # DeepSeek-V2: softmax scores, balanced by auxiliary losses alone. Of its three, this is the one of experts, with the
    # weight of section 3.1.2.
    "236B": DeepSeekV3Args(
        dim=5120,
        n_layers=60,
        n_dense_layers=1,
        vocab_size=102400,
        hidden_dim=12288,
        n_experts=160,
        top_k=6,
        n_shared_experts=2,
        moe_hidden_dim=1536,
        score_func="softmax",
        n_limited_groups=3,
        normalizes_gates=False,
        route_scale=16.0,
        uses_expert_bias=False,
        balance_loss_alpha=3e-3,
    ),
    "671B": DeepSeekV3Args(balance_loss_alpha=1e-4),
}
