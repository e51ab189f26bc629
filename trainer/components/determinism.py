"""Seeds and deterministic kernels."""

import os
import random

import numpy as np
import torch

from trainer.config.schema import DebugConfig


def set_determinism(*, debug: DebugConfig, seed: int, rank: int) -> None:
    """Seed the global generators of this rank, and choose deterministic kernels if asked.

    Weights and data order have generators of their own, derived from the seed alone; the global ones differ by rank, as dropout
    must. Call it before the first CUDA kernel.
    """
    rank_seed = seed + rank
    random.seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    torch.manual_seed(rank_seed)
    if debug.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=debug.deterministic_warn_only)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        # cuBLAS: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
