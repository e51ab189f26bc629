"""What is wrong with the parallelism of experts, as far as it is known without the model. `trainer.preflight_parallel` has the rest."""

import importlib.util
from collections.abc import Iterator

from trainer.config.errors import Problem
from trainer.config.fields import format_choices
from trainer.config.schema import JobConfig
from trainer.config.validate_parallel import CP, PP, REPLICATE, SHARD, TP, get_degree

EP = "parallelism.expert_parallel_degree"
ETP = "parallelism.expert_tensor_parallel_degree"


def find_lent_ranks_problems(config: JobConfig, world_size: int) -> list[Problem]:
    """A degree of expert parallelism that the ranks which it may borrow cannot be divided by.

    Call it where the other degrees fit the number of processes.
    """
    degree, cut = get_degree(config, EP), get_degree(config, ETP)
    if degree == 1 or cut not in (1, get_degree(config, TP)):
        return []
    shards = world_size // (get_degree(config, REPLICATE) * get_degree(config, PP) * cut)
    if shards % degree == 0:
        return []
    lenders = [SHARD, CP, *([TP] if cut == 1 else [])]
    message = (
        f"{EP} = {degree}: must divide the ranks that it borrows, {' x '.join(lenders)} = {shards} with {world_size} processes. "
        f"Use {format_choices(d for d in range(1, shards + 1) if shards % d == 0)}, or change the other degrees."
    )
    return [Problem(message, (EP, ETP, PP, REPLICATE, *lenders))]


def _check_expert_tensor_parallel(config: JobConfig) -> Iterator[Problem]:
    """Experts that are cut over a part of the ranks of tensor parallelism."""
    degree, tp = get_degree(config, ETP), get_degree(config, TP)
    if degree not in (1, tp):
        message = (
            f"{ETP} = {degree}: must be 1, for whole experts, or {TP} = {tp}, for experts that are cut as all other matrices are. "
            f"Use {format_choices(sorted({1, tp}))}."
        )
        yield Problem(message, (ETP, TP))


def _check_deepep(config: JobConfig) -> Iterator[Problem]:
    """What the kernels of DeepEP need."""
    key = "parallelism.expert_parallel_comm_backend"
    if config.parallelism.expert_parallel_comm_backend != "deepep" or get_degree(config, EP) == 1:
        return
    if importlib.util.find_spec("deep_ep") is None:
        message = (
            f"{key} = deepep: the package deep_ep is not installed. Install it (github.com/deepseek-ai/DeepEP), or use"
        )
        yield Problem(f"{message} standard.", (key,))
    dtype = config.training.mixed_precision_param
    if dtype != "bfloat16":
        message = f"{key} = deepep: sends bfloat16 alone, and training.mixed_precision_param = {dtype}. Use bfloat16 there, or standard."
        yield Problem(message, (key, "training.mixed_precision_param"))


EXPERT_RULES = (_check_expert_tensor_parallel, _check_deepep)
