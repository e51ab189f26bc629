"""What is wrong with the parallelism of experts, as far as it is known without the model. `trainer.preflight_parallel` has the rest."""

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


EXPERT_RULES = (_check_expert_tensor_parallel,)
