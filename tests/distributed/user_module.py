"""A user's own module, as `experimental.custom_import` names it: a model, two data sets and an optimizer.

Processes of runs import it, never that of the tests, whose tables stay as they are.
"""

import random
from collections.abc import Iterator

import torch

from models.deepseek_v3.args import DeepSeekV3Args
from models.deepseek_v3.plan import build_plan as build_experts_plan
from models.llama3.args import LlamaArgs
from models.llama3.plan import build_plan
from models.registry import ModelSpec, register_model
from trainer.components.data.document_files import GeneratedFile
from trainer.components.data.sources import SourceSpec, register_source
from trainer.components.optimizer import TrainedParameter, group_parameters, register_optimizer
from trainer.config.schema_training import OptimizerConfig

TINY = LlamaArgs(dim=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=259, ffn_hidden_dim=40, norm_eps=1e-5)
# Enough heads for Ulysses, and enough blocks for two stages on each of two ranks.
DEEP = LlamaArgs(dim=24, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=259, ffn_hidden_dim=40, norm_eps=1e-5)
# Multiples of 16, for float8, also on two ranks of tensor parallelism.
ALIGNED = LlamaArgs(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=259, ffn_hidden_dim=64, norm_eps=1e-5)
# Smaller than the vocabulary of the byte tokenizer.
TOO_SMALL = LlamaArgs(dim=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=100, ffn_hidden_dim=40)
# A bias that moves so fast changes which expert a token meets within a few steps.
EXPERTS = DeepSeekV3Args(
    dim=24,
    n_layers=4,
    n_dense_layers=1,
    n_heads=2,
    vocab_size=259,
    hidden_dim=40,
    q_lora_rank=0,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_scaling=None,
    n_experts=8,
    top_k=2,
    moe_hidden_dim=16,
    n_expert_groups=2,
    n_limited_groups=1,
    bias_update_speed=0.05,
    max_seq_len=64,
)


def write_notes(count: int, seed: int) -> Iterator[str]:
    """Yield `count` documents of 8 to 100 characters that a small model can learn something about."""
    generator = random.Random(seed)
    words = ("iron", "bloom", "slag", "charcoal", "tuyere", "furnace", "anvil")
    for _ in range(count):
        yield " ".join(generator.choice(words) for _ in range(generator.randint(2, 13)))


def build_momentum(parameters: list[TrainedParameter], section: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD with momentum."""
    groups = group_parameters(parameters, lr=section.lr, weight_decay=section.weight_decay)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.beta1)


register_model(
    ModelSpec(
        name="bloomlet",
        flavors={"tiny": TINY, "deep": DEEP, "aligned": ALIGNED, "too_small": TOO_SMALL},
        build_plan=build_plan,
        model_class="models.llama3.model:Transformer",
        adapter_class="models.llama3.state_dict_adapter:Llama3Adapter",
    )
)
register_model(
    ModelSpec(
        name="bloomlet_experts",
        flavors={"tiny": EXPERTS},
        build_plan=build_experts_plan,
        model_class="models.deepseek_v3.model:Transformer",
        adapter_class="models.deepseek_v3.state_dict_adapter:DeepSeekV3Adapter",
    )
)
register_source(SourceSpec("notes", "made-up notes", lambda *_: [GeneratedFile(write_notes, (40, 1))], "none"))
register_source(SourceSpec("notes_held_out", "other notes", lambda *_: [GeneratedFile(write_notes, (9, 2))], "none"))
register_optimizer("Momentum", build_momentum)
