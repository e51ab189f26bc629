"""Llama 3 in Hugging Face's names and layout, and back."""

from collections.abc import Collection, Mapping
from typing import Any

from models.hf_config import check_values, get_rope_parameters
from models.hf_layout import HFTensor, HuggingFaceAdapter, Part
from models.llama3.args import LlamaArgs, RopeScaling

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_EMBEDDING, _HF_EMBEDDING = "tok_embeddings.weight", "model.embed_tokens.weight"
_OUTPUT, _HF_OUTPUT = "output.weight", "lm_head.weight"


class Llama3Adapter(HuggingFaceAdapter):
    """Translate state dicts between `Transformer` here and `LlamaForCausalLM` of transformers.

    Tensors are renamed; wq and wk are also reordered along dim 0, since a rotary pair is two neighbours here and two
    halves of a head there.
    """

    label = "Llama 3"

    def __init__(self, args: LlamaArgs) -> None:
        self.args = args
        if args.tie_embeddings:
            self.tied, self.tied_hf = {_OUTPUT: _EMBEDDING}, {_HF_OUTPUT: _HF_EMBEDDING}

    def hf_tensors(self, *, fused_experts: bool = False) -> list[HFTensor]:
        """List the tensors there. There are no experts."""
        args = self.args
        heads = {"attention.wq": args.n_heads, "attention.wk": args.n_kv_heads}
        tensors = [HFTensor(_HF_EMBEDDING, (Part(_EMBEDDING),))]
        for layer in range(args.n_layers):
            for ours, theirs in _BLOCK_NAMES.items():
                part = Part(f"layers.{layer}.{ours}.weight", rotary_heads=heads.get(ours, 0))
                tensors.append(HFTensor(f"model.layers.{layer}.{theirs}.weight", (part,)))
        tensors.append(HFTensor("model.norm.weight", (Part("norm.weight"),)))
        return tensors if args.tie_embeddings else [*tensors, HFTensor(_HF_OUTPUT, (Part(_OUTPUT),))]

    def hf_config(self) -> dict[str, Any]:
        """Return the content of config.json, but for the dtype and the tokenizer's special ids."""
        args, scaling = self.args, self.args.rope_scaling
        rope_scaling = scaling and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": args.dim,
            "intermediate_size": args.hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "vocab_size": args.vocab_size,
            "max_position_embeddings": args.max_seq_len,
            "rms_norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": args.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
        }

    @classmethod
    def args_from_hf(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> LlamaArgs:
        """Return the args that a config.json of a `LlamaForCausalLM` describes.

        Raises:
            ValueError: it has biases, another activation, heads of another width, or another rotary scaling.
        """
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        check_values(
            config,
            model_type="llama",
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            head_dim=dim // heads,
        )
        rope = get_rope_parameters(config, known=("default", "llama3"))
        scaling = None
        if rope["rope_type"] == "llama3":
            scaling = RopeScaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_seq_len=rope["original_max_position_embeddings"],
            )
        return LlamaArgs(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            ffn_hidden_dim=config["intermediate_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
            rope_scaling=scaling,
            max_seq_len=config["max_position_embeddings"],
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
