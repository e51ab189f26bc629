"""DeepSeek-V3 and V2 in Hugging Face's names and layout, and back."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from models.deepseek_v3.args import DeepSeekV3Args, YarnScaling
from models.hf_config import check_values, get_rope_parameters
from models.hf_layout import HFTensor, HuggingFaceAdapter, Part

_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_PLAIN_QUERIES = {"attention.wq": "self_attn.q_proj"}
_COMPRESSED_QUERIES = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
}
_ATTENTION = {
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
}
_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_PREDICTION = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}

# Of transformers 5 in memory; what it writes has a tensor for each expert.
_FUSED_UP, _FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class DeepSeekV3Adapter(HuggingFaceAdapter):
    """Translate state dicts between `Transformer` here and `DeepseekV3ForCausalLM` or `DeepseekV2ForCausalLM` of transformers.

    In files each expert's matrices are tensors of their own; those of all experts in one, as transformers 5 has them in memory,
    are read and written, too. Otherwise tensors are only renamed: a rotary pair is two neighbours on both sides (transformers'
    `rope_interleave`). Multi-token prediction goes by the names of the published files, without the second copies of
    embeddings and output matrix there. Blocks of it that this model does not have are left out.
    """

    label = "DeepSeek-V3"

    def __init__(self, args: DeepSeekV3Args) -> None:
        self.args = args

    def hf_tensors(self, *, fused_experts: bool = False) -> list[HFTensor]:
        """List the tensors there: one for each expert, or those of all experts in one."""
        layers = range(self.args.n_layers + self.args.mtp_depth)
        blocks = [tensor for layer in layers for tensor in self._list_block(layer, fused_experts)]
        return [
            _plain("model.embed_tokens.weight", "tok_embeddings.weight"),
            *blocks,
            _plain("model.norm.weight", "norm.weight"),
            _plain("lm_head.weight", "output.weight"),
        ]

    def _list_block(self, layer: int, fused_experts: bool) -> Iterator[HFTensor]:
        args, ours, theirs = self.args, f"layers.{layer}.", f"model.layers.{layer}."
        names = _NORMS | _ATTENTION | (_COMPRESSED_QUERIES if args.q_lora_rank else _PLAIN_QUERIES)
        if layer >= args.n_layers:
            names = names | _PREDICTION
        if args.is_dense(layer):
            names = names | {f"feed_forward.{w}": f"mlp.{hf}" for w, hf in _FEED_FORWARD.items()}
        else:
            names = names | {"moe.router.gate": "mlp.gate"}
            if args.n_shared_experts:
                shared = {f"moe.shared_experts.{w}": f"mlp.shared_experts.{hf}" for w, hf in _FEED_FORWARD.items()}
                names = names | shared
        yield from (_plain(f"{theirs}{hf}.weight", f"{ours}{name}.weight") for name, hf in names.items())
        if args.is_dense(layer):
            return
        if args.uses_expert_bias:
            # Its steps are smaller than what bf16 resolves.
            bias = Part(f"{ours}moe.router.expert_bias")
            yield HFTensor(f"{theirs}mlp.gate.e_score_correction_bias", (bias,), keeps_fp32=True)
        experts = f"{ours}moe.experts."
        if fused_experts:
            yield HFTensor(f"{theirs}{_FUSED_UP}", (Part(f"{experts}w1"), Part(f"{experts}w3")))
            yield HFTensor(f"{theirs}{_FUSED_DOWN}", (Part(f"{experts}w2"),))
            return
        for w, hf in _FEED_FORWARD.items():
            for expert in range(args.n_experts):
                part = Part(f"{experts}{w}", expert)
                yield HFTensor(f"{theirs}mlp.experts.{expert}.{hf}.weight", (part,))

    def list_left_out(self, names: Collection[str]) -> set[str]:
        """Return the names of what a model of this depth does not have: predictions further ahead, and copies for them."""
        n_layers, n_blocks = self.args.n_layers, self.args.n_layers + self.args.mtp_depth
        left_out = super().list_left_out(names)
        for name in names:
            match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
            if match is None or int(match[1]) < n_layers or f"model.layers.{match[1]}.eh_proj.weight" not in names:
                continue
            if int(match[1]) >= n_blocks or match[2] in ("embed_tokens.weight", "shared_head.head.weight"):
                left_out.add(name)
        return left_out

    def uses_fused_experts(self, names: Collection[str]) -> bool:
        """Return whether a folder has the tensors of all experts in one."""
        return any(name.endswith(_FUSED_DOWN) for name in names)

    def hf_config(self) -> dict[str, Any]:
        """Return the content of config.json, but for the dtype and the tokenizer's special ids.

        Raises:
            ValueError: transformers has no model that routes like this.
        """
        args, yarn = self.args, self.args.yarn
        rope_scaling = yarn and {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
            "original_max_position_embeddings": yarn.original_max_seq_len,
        }
        return {
            **self._get_architecture(),
            "hidden_size": args.dim,
            "intermediate_size": args.hidden_dim,
            "moe_intermediate_size": args.moe_hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_nextn_predict_layers": args.mtp_depth,
            "first_k_dense_replace": args.n_dense_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "q_lora_rank": args.q_lora_rank or None,
            "kv_lora_rank": args.kv_lora_rank,
            "qk_nope_head_dim": args.qk_nope_head_dim,
            "qk_rope_head_dim": args.qk_rope_head_dim,
            "v_head_dim": args.v_head_dim,
            "n_routed_experts": args.n_experts,
            "n_shared_experts": args.n_shared_experts,
            "num_experts_per_tok": args.top_k,
            "n_group": args.n_expert_groups,
            "topk_group": args.n_limited_groups,
            "scoring_func": args.score_func,
            "norm_topk_prob": args.normalizes_gates,
            "routed_scaling_factor": args.route_scale,
            "vocab_size": args.vocab_size,
            "max_position_embeddings": args.max_seq_len,
            "rms_norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "attention_bias": False,
            "initializer_range": 0.02,
        }

    @classmethod
    def args_from_hf(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> DeepSeekV3Args:
        """Return the args that a config.json of a `DeepseekV3ForCausalLM` or `DeepseekV2ForCausalLM` describes.

        Blocks of multi-token prediction are there if the names have them: a config.json may speak of some that files lack.

        Raises:
            ValueError: it has biases, another activation, another rotary scaling, or routes otherwise.
        """
        is_v3 = config.get("model_type") == "deepseek_v3"
        method = config.get("topk_method") or ("noaux_tc" if is_v3 else "greedy")
        check_values(
            config,
            model_type="deepseek_v3" if is_v3 else "deepseek_v2",
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            moe_layer_freq=1,
            rope_interleave=True,
            tie_word_embeddings=False,
            scoring_func="sigmoid" if is_v3 else "softmax",
            topk_method="noaux_tc" if is_v3 else method,
            num_key_value_heads=config["num_attention_heads"],
        )
        # transformers' V2 never normalizes gates, whatever `norm_topk_prob` says; its V3 does as it says.
        has_groups = is_v3 or method == "group_limited_greedy"
        rope = get_rope_parameters(config, known=("default", "yarn"))
        return DeepSeekV3Args(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_dense_layers=config["first_k_dense_replace"],
            n_heads=config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            hidden_dim=config["intermediate_size"],
            norm_eps=config["rms_norm_eps"],
            q_lora_rank=config.get("q_lora_rank") or 0,
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            rope_theta=rope["rope_theta"],
            rope_scaling=_read_yarn(rope) if rope["rope_type"] == "yarn" else None,
            n_experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            n_shared_experts=config.get("n_shared_experts") or 0,
            moe_hidden_dim=config["moe_intermediate_size"],
            score_func="sigmoid" if is_v3 else "softmax",
            n_expert_groups=(config.get("n_group") or 1) if has_groups else 1,
            n_limited_groups=(config.get("topk_group") or 1) if has_groups else 1,
            normalizes_gates=is_v3 and bool(config.get("norm_topk_prob", True)),
            route_scale=config["routed_scaling_factor"],
            uses_expert_bias=is_v3,
            mtp_depth=sum(name.endswith(".eh_proj.weight") for name in names),
            max_seq_len=config["max_position_embeddings"],
        )

    def _get_architecture(self) -> dict[str, Any]:
        """Return what tells transformers' two models apart."""
        args = self.args
        routing = f"score_func = {args.score_func!r}, uses_expert_bias = {args.uses_expert_bias}"
        if args.score_func == "sigmoid" and args.uses_expert_bias:
            return {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                "topk_method": "noaux_tc",
                "rope_interleave": True,
            }
        if args.score_func == "softmax" and not args.uses_expert_bias and not args.normalizes_gates:
            is_limited = args.n_limited_groups < args.n_expert_groups
            return {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "topk_method": "group_limited_greedy" if is_limited else "greedy",
                "mlp_bias": False,
            }
        raise ValueError(
            f"transformers has no model with {routing}, normalizes_gates = {args.normalizes_gates}. DeepseekV3 has sigmoid scores "
            "and a bias, DeepseekV2 softmax scores, no bias and gates that are not normalized"
        )


def _plain(theirs: str, ours: str) -> HFTensor:
    return HFTensor(theirs, (Part(ours),))


def _read_yarn(rope: Mapping[str, Any]) -> YarnScaling:
    """Return YaRN as transformers applies it: whatever the length of a sequence.

    Raises:
        ValueError: factors on the rotary table, which the networks here do not have.
    """
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if not mscale or mscale != mscale_all:
        raise ValueError(
            f"config.json: mscale = {mscale} and mscale_all_dim = {mscale_all} of rope_scaling: only equal ones, not zero, are "
            "supported, as published models have them"
        )
    return YarnScaling(
        factor=rope["factor"],
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        mscale=mscale,
        original_max_seq_len=rope["original_max_position_embeddings"],
        always=True,
    )
