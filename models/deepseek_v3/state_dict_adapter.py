"""DeepSeek-V3 and V2 in Hugging Face's names and layout, and back."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from models.deepseek_v3.args import DeepSeekV3Args

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

# Of transformers 5 in memory; its files have a tensor for each expert.
_FUSED_UP, _FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class DeepSeekV3Adapter:
    """Translate state dicts between `Transformer` here and `DeepseekV3ForCausalLM` or `DeepseekV2ForCausalLM` of transformers.

    There each expert's matrices are tensors of their own; `from_hf` also takes those of all experts in one. Otherwise tensors are
    only renamed: a rotary pair is two neighbours on both sides (transformers' `rope_interleave`). Multi-token prediction goes by the names
    of the published files, without the second copies of embeddings and output matrix there. Splitting and joining
    experts takes whole tensors: gather a sharded state dict first. Nothing changes a value or a dtype.
    """

    def __init__(self, args: DeepSeekV3Args) -> None:
        self.args = args
        self._hf_names = {
            "tok_embeddings.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        self._hf_experts: dict[str, list[str]] = {}
        """Our name of a tensor of all experts -> the names there, one for each expert."""
        for layer in range(args.n_layers + args.mtp_depth):
            self._add_block(layer)

    def _add_block(self, layer: int) -> None:
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
            if args.uses_expert_bias:
                self._hf_names[f"{ours}moe.router.expert_bias"] = f"{theirs}mlp.gate.e_score_correction_bias"
            for w, hf in _FEED_FORWARD.items():
                self._hf_experts[f"{ours}moe.experts.{w}"] = [
                    f"{theirs}mlp.experts.{expert}.{hf}.weight" for expert in range(args.n_experts)
                ]
        self._hf_names |= {f"{ours}{name}.weight": f"{theirs}{hf}.weight" for name, hf in names.items()}

    def to_hf(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict of their model, as it stands in files: a tensor for each expert, all views of ours.

        Raises:
            ValueError: names that are missing or that this model does not have.
        """
        _check_names(state_dict, [*self._hf_names, *self._hf_experts], "the model's state dict")
        renamed = {hf: state_dict[name] for name, hf in self._hf_names.items()}
        experts = ((hf, state_dict[name].unbind(0)) for name, hf in self._hf_experts.items())
        return renamed | {name: x for names, parts in experts for name, x in zip(names, parts, strict=True)}

    def from_hf(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict of a `Transformer`, fit for a strict load.

        Blocks of multi-token prediction that this model does not have are left out.

        Raises:
            ValueError: names that are missing or that their model of this size does not have.
        """
        known = dict(self._without_extras(state_dict))
        expected = [*self._hf_names.values(), *(name for names in self._hf_experts.values() for name in names)]
        _check_names(known, expected, "the Hugging Face state dict")
        renamed = {name: known[hf] for name, hf in self._hf_names.items()}
        return renamed | {name: torch.stack([known[hf] for hf in names]) for name, names in self._hf_experts.items()}

    def _without_extras(self, state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a model of this depth has, fused experts one by one."""
        n_layers, n_blocks = self.args.n_layers, self.args.n_layers + self.args.mtp_depth
        for name, x in state_dict.items():
            match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
            layer, rest = (int(match[1]), match[2]) if match else (0, "")
            is_prediction = layer >= n_layers and f"model.layers.{layer}.eh_proj.weight" in state_dict
            is_copy = is_prediction and rest in ("embed_tokens.weight", "shared_head.head.weight")
            # Files written before transformers 4.32 hold `inv_freq`, which the config determines.
            if is_copy or (is_prediction and layer >= n_blocks) or name.endswith("rotary_emb.inv_freq"):
                continue
            if rest == _FUSED_UP:
                gates, ups = x.chunk(2, dim=1)  # (E, H, D) each
                yield from self._split_experts(layer, "gate_proj", gates)
                yield from self._split_experts(layer, "up_proj", ups)
            elif rest == _FUSED_DOWN:
                yield from self._split_experts(layer, "down_proj", x)
            else:
                yield name, x

    def _split_experts(self, layer: int, hf: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for expert, part in enumerate(weight.unbind(0)):
            yield f"model.layers.{layer}.mlp.experts.{expert}.{hf}.weight", part

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


def _check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    found, expected = set(found), set(expected)
    problems = [
        f"{label}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for label, names in (("missing", expected - found), ("not of this model", found - expected))
        if names
    ]
    if problems:
        raise ValueError(f"{what} does not fit this DeepSeek-V3 ({'; '.join(problems)}). Check model.flavor")
