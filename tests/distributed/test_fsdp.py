"""What data parallelism communicates and holds, besides right numbers (`test_data_parallel.py`)."""

import collections
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from tests.distributed.cases import ARGS, DDP2, HSDP, Case, make_batch, summed_loss
from tests.distributed.harness import run_distributed
from trainer.distributed.fsdp import reshard, set_gradient_sync
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.parallelize import parallelize

N_UNITS = ARGS.n_layers + 2  # tok_embeddings, the blocks, (norm, output); the root has no parameters of its own
N_BLOCKS = ARGS.n_layers
MICROBATCHES = 3


class _CountCollectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def build_sharded(case: Case) -> Transformer:
    """Return a case's model with weights, spread over the ranks."""
    dims = ParallelDims.from_config(case.config.parallelism, dist.get_world_size())
    dims.build_mesh("cpu")
    with torch.device("meta"):
        model = Transformer(case.args)
    parallelize(model, plan=build_plan(case.args), dims=dims, config=case.config)
    init_weights(model, seed=0, device="cpu")
    return model


def _count_collectives(case: Case, accumulation: Any) -> list[dict[str, int]]:
    """Collectives of each microbatch of one step, by name."""
    model = build_sharded(case)
    policy = case.config.parallelism.fsdp_reshard_after_forward
    tokens, labels = make_batch(0)
    counts = []
    for i in range(MICROBATCHES):
        set_gradient_sync(model, i == MICROBATCHES - 1, accumulation=accumulation, reshard_after_forward=policy)
        with _CountCollectives() as collectives:
            model(tokens, labels=labels, loss_fn=summed_loss).backward()
        counts.append(dict(collectives.counts))
    return counts


def _expected(all_gather: int = 0, reduce_scatter: int = 0, all_reduce: int = 0) -> dict[str, int]:
    counts = {"_allgather_base_": all_gather, "_reduce_scatter_base_": reduce_scatter, "allreduce_": all_reduce}
    return {name: n for name, n in counts.items() if n}


# Blocks and embeddings are gathered for forward, and again for backward; the last unit stays in between.
GATHERS = 2 * N_UNITS - 1


@pytest.mark.parametrize(
    ("case", "accumulation", "early", "last"),
    [
        (
            Case("fsdp", 2),
            "sharded",
            _expected(GATHERS, N_UNITS),
            _expected(GATHERS, N_UNITS),
        ),
        (Case("fsdp", 2), "unsharded", _expected(GATHERS), _expected(GATHERS, N_UNITS)),
        (
            Case("always", 2, {"fsdp_reshard_after_forward": "always"}),
            "sharded",
            _expected(GATHERS + 1, N_UNITS),
            _expected(GATHERS + 1, N_UNITS),
        ),
        (
            Case("never", 2, {"fsdp_reshard_after_forward": "never"}),
            "sharded",
            _expected(N_UNITS, N_UNITS),
            _expected(N_UNITS, N_UNITS),
        ),
        (Case("hsdp", 4, HSDP), "sharded", _expected(GATHERS, N_UNITS), _expected(GATHERS, N_UNITS, N_UNITS)),
        (Case("hsdp", 4, HSDP), "unsharded", _expected(GATHERS), _expected(GATHERS, N_UNITS, N_UNITS)),
        (Case("ddp", 2, DDP2), "sharded", {}, _expected(all_reduce=N_UNITS)),
        (Case("ddp", 2, DDP2), "unsharded", {}, _expected(all_reduce=N_UNITS)),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else value if isinstance(value, str) else "",
)
def test_collectives_of_each_microbatch(case: Case, accumulation: str, early: dict, last: dict) -> None:
    for counts in run_distributed(_count_collectives, case.world_size, case, accumulation, reuse=True):
        assert counts == [early] * (MICROBATCHES - 1) + [last]


def test_never_with_whole_gradients_gathers_weights_once_a_step() -> None:
    case = Case("never", 2, {"fsdp_reshard_after_forward": "never"})
    for counts in run_distributed(_count_collectives, 2, case, "unsharded", reuse=True):
        assert counts == [_expected(N_UNITS), {}, _expected(0, N_UNITS)]


def _reshard_after_evaluation(case: Case) -> tuple[bool, bool]:
    model = build_sharded(case)
    before = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        model(make_batch(0)[0])
    gathered = {name: id(p) for name, p in model.named_parameters()} != before
    reshard(model)
    return gathered, {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("policy", ["default", "never"])
def test_reshard_brings_the_optimizers_parameters_back(policy: str) -> None:
    case = Case("case", 2, {"fsdp_reshard_after_forward": policy})
    for gathered, restored in run_distributed(_reshard_after_evaluation, 2, case):
        assert gathered, "otherwise this test shows nothing"
        assert restored


def _describe(case: Case) -> tuple[list[str], list[str], list[str]]:
    model = build_sharded(case)
    names = [name for name, _ in model.named_parameters()]
    return names, list(model.state_dict()), [name for name, m in model.named_modules() if isinstance(m, FSDPModule)]


@pytest.mark.parametrize(
    "case",
    [
        Case("fsdp", 2),
        Case("tied", 2, tied=True),
        Case("ddp", 2, DDP2),
        Case("all", 2, compile={"enable": True}, activation_checkpoint={"mode": "full"}),
    ],
    ids=lambda case: case.name,
)
def test_names_stay_and_units_are_the_plans(case: Case) -> None:
    plain = Transformer(case.args)
    names, saved, units = run_distributed(_describe, 2, case)[0]
    assert names == [name for name, _ in plain.named_parameters()]
    assert saved == list(plain.state_dict())
    ends = [] if case.tied else ["tok_embeddings", "norm", "output"]
    assert set(units) == {"", *ends, *(f"layers.{i}" for i in range(N_BLOCKS))}
