"""Llama 3 in Hugging Face's names and layout, and back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from models.llama3.args import LlamaArgs

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
_EMBEDDING, _OUTPUT, _HF_OUTPUT = "tok_embeddings.weight", "output.weight", "lm_head.weight"


class Llama3Adapter:
    """Translate state dicts between `Transformer` here and `LlamaForCausalLM` of transformers.

    Tensors are renamed; wq and wk are also reordered along dim 0, since a rotary pair is two neighbours here and two
    halves of a head there. That takes whole tensors: gather a sharded state dict first. Nothing changes a value or a dtype.
    """

    def __init__(self, args: LlamaArgs) -> None:
        self.args = args
        self._hf_names = {_EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        for layer in range(args.n_layers):
            for ours, theirs in _BLOCK_NAMES.items():
                self._hf_names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
        if not args.tie_embeddings:
            self._hf_names[_OUTPUT] = _HF_OUTPUT

    def to_hf(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict of a `LlamaForCausalLM`. Tied embeddings appear once, without lm_head, as on the hub.

        Raises:
            ValueError: names that are missing or that this model does not have.
        """
        state_dict = self._drop_tied(state_dict, copy=_OUTPUT, original=_EMBEDDING)
        _check_names(state_dict, self._hf_names, "the model's state dict")
        return {theirs: self._reorder(ours, state_dict[ours], _to_halves) for ours, theirs in self._hf_names.items()}

    def from_hf(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict of a `Transformer`, both names of tied embeddings included, fit for a strict load.

        Raises:
            ValueError: names that are missing or that a `LlamaForCausalLM` of this size does not have.
        """
        # Files written before transformers 4.32 hold this buffer, which the config determines.
        state_dict = {name: x for name, x in state_dict.items() if not name.endswith("rotary_emb.inv_freq")}
        state_dict = self._drop_tied(state_dict, copy=_HF_OUTPUT, original=self._hf_names[_EMBEDDING])
        _check_names(state_dict, self._hf_names.values(), "the Hugging Face state dict")
        ours = {name: self._reorder(name, state_dict[hf], _to_neighbours) for name, hf in self._hf_names.items()}
        if self.args.tie_embeddings:
            ours[_OUTPUT] = ours[_EMBEDDING]
        return ours

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

    def _reorder(
        self, name: str, weight: torch.Tensor, reorder: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        if name.endswith("attention.wq.weight"):
            return reorder(weight, self.args.n_heads)
        if name.endswith("attention.wk.weight"):
            return reorder(weight, self.args.n_kv_heads)
        return weight

    def _drop_tied(
        self, state_dict: Mapping[str, torch.Tensor], *, copy: str, original: str
    ) -> Mapping[str, torch.Tensor]:
        """Return `state_dict` without the second name of tied embeddings, having seen that it says the same."""
        if not self.args.tie_embeddings or copy not in state_dict:
            return state_dict
        first, second = state_dict.get(original), state_dict[copy]
        if first is not None and first is not second and not first.is_meta and not torch.equal(first, second):
            raise ValueError(
                f"{copy} differs from {original}, but this model ties them (tie_embeddings). "
                "The weights belong to a model with an output matrix of its own: choose another flavor"
            )
        return {name: x for name, x in state_dict.items() if name != copy}


def _to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _to_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    found, expected = set(found), set(expected)
    problems = [
        f"{label}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for label, names in (("missing", expected - found), ("not of this model", found - expected))
        if names
    ]
    if problems:
        raise ValueError(f"{what} does not fit this Llama 3 ({'; '.join(problems)}). Check model.flavor")
