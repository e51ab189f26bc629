"""Tiny models of transformers with random weights, as folders of files: what a test reads in place of a download."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from trainer.components.tokenizer import build_tokenizer
from trainer.components.tokenizer_files import write_tokenizer_files

VOCAB = 272  # the byte-level tokenizer's 259, rounded up
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}
DEEPSEEK = LLAMA | {
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
V2 = {"topk_method": "group_limited_greedy", "norm_topk_prob": False, "q_lora_rank": None, "routed_scaling_factor": 4.0}
_ID_KEYS = {"bos_token_id": 256, "eos_token_id": 257}

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA | {"rope_parameters": SCALED}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, LLAMA | {"tie_word_embeddings": True}),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, DEEPSEEK | {"rope_parameters": YARN}),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM, DEEPSEEK | V2),
}


def build_theirs(case: str, seed: int = 0) -> Any:
    """Return a model whose attention and routing are far from uniform, with norms that are not ones and biases not zero."""
    config_class, model_class, settings = CASES[case]
    model = model_class(config_class(**settings, **_ID_KEYS, attn_implementation="sdpa")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                x.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return model


def write_hf_folder(case: str, folder: Path, *, max_shard_size: str = "5GB", dtype: torch.dtype | None = None) -> Any:
    """Write a model as transformers does, with the byte-level tokenizer, and return it."""
    model = build_theirs(case)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer_files(build_tokenizer("byte"), folder, max_length=128)
    return model


def quantize_folder(folder: Path, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Store the matrices of a folder in fp8 as DeepSeek-V3 does, but for embeddings and routers; return what all tensors are then worth."""
    tensors, worth = load_file(folder / "model.safetensors"), {}
    for name, x in list(tensors.items()):
        worth[name] = x
        if x.ndim != 2 or name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")):
            continue
        sizes = [-(-length // size) for length, size in zip(x.shape, block, strict=True)]
        scales, values = torch.empty(sizes), torch.empty_like(x, dtype=torch.float8_e4m3fn)
        worth[name] = torch.empty_like(x, dtype=torch.bfloat16)
        for i, j in itertools.product(*map(range, sizes)):
            box = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = x[box].abs().max() / 448
            values[box] = (x[box] / scales[i, j]).to(torch.float8_e4m3fn)
            worth[name][box] = (values[box].float() * scales[i, j]).bfloat16()
        tensors[name], tensors[f"{name}_scale_inv"] = values, scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    section = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return worth


def make_tokens(seq: int = 96) -> torch.Tensor:
    return torch.randint(0, 256, (2, seq), generator=torch.Generator().manual_seed(1))
