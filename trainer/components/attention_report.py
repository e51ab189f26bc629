"""Which attention kernel a run really takes, for its log."""

import logging
from typing import Any

import torch

from models.common.attention import AttentionShape, describe_attention_kernel, get_slow_attention_reason
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_training import ModelConfig, TrainingConfig
from trainer.distributed.blockwise_attention import choose_kernel

logger = logging.getLogger(__name__)


def log_attention_kernel(
    model_args: Any,
    *,
    model: ModelConfig,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    device: torch.device,
) -> None:
    """Say which attention kernel really runs, and warn of a slow one."""
    if not isinstance(model_args, AttentionShape):
        return  # a user's network, with an attention of its own or none
    dtype = getattr(torch, training.mixed_precision_param)
    cp = parallelism.context_parallel_degree
    if cp > 1 and parallelism.context_parallel_method != "ulysses" and model.attn_mask_type != "block_causal":
        head_dim = model_args.head_dim
        kernel = choose_kernel(device, dtype, head_dim, getattr(model_args, "v_head_dim", head_dim))
    else:
        # The choice does not depend on the number of sequences, of which one is enough to try.
        kernel = describe_attention_kernel(model_args, batch=1, seq=training.seq_len // cp, device=device, dtype=dtype)
    logger.info("attention: %s", kernel)
    reason = get_slow_attention_reason(kernel, device)
    if reason is not None:
        logger.warning(
            "attention is slower than it could be: %s", reason, extra={"same_on_all_ranks": True, "is_fallback": True}
        )
