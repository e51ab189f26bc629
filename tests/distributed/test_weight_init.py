import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import trainer.distributed.weight_init as weight_init
from models.common.init import Init
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from tests.distributed.cases import ARGS
from tests.distributed.harness import run_distributed
from trainer.config.schema import JobConfig
from trainer.config.schema_parallel import ActivationCheckpointConfig, ParallelismConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.parallelize import parallelize


def _poison(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.detach().fill_(float("nan"))


def _init_poisoned(model: nn.Module, seed: int) -> None:
    """`init_weights`, on memory that is NaN to begin with, in blocks so small that a parameter has several."""
    materialize = weight_init.materialize

    def materialize_poisoned(model: nn.Module, *devices: torch.device) -> None:
        materialize(model, *devices)
        with torch.no_grad():
            _poison(model)

    weight_init.materialize = materialize_poisoned
    weight_init._BLOCK_ELEMENTS = 100
    try:
        init_weights(model, seed=seed, device="cpu")
    finally:
        weight_init.materialize = materialize
        weight_init._BLOCK_ELEMENTS = 2**20


def _whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {name: p.detach() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors.items()}


def _llama_weights(parallelism: dict[str, Any], tied: bool, seed: int) -> dict[str, torch.Tensor]:
    args = dataclasses.replace(ARGS, tie_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(args)
    config = JobConfig(
        parallelism=ParallelismConfig(**parallelism), activation_checkpoint=ActivationCheckpointConfig(mode="none")
    )
    if dist.is_initialized():
        dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
        dims.build_mesh("cpu")
        parallelize(model, plan=build_plan(args), dims=dims, config=config)
    _init_poisoned(model, seed)
    assert (model.tok_embeddings.weight is model.output.weight) == tied
    return _whole_state(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("world_size", "parallelism"),
    [
        (2, {}),
        (4, {}),
        (4, {"data_parallel_replicate_degree": 2}),
        (2, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}),
    ],
    ids=str,
)
def test_weights_do_not_depend_on_sharding(world_size: int, parallelism: dict, tied: bool) -> None:
    expected = _llama_weights({}, tied, 3)
    assert all(tensor.isfinite().all() for tensor in expected.values()), "left uninitialized"
    for actual in run_distributed(_llama_weights, world_size, parallelism, tied, 3, reuse=True):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


class _Small(nn.Module):
    """Parameters of 0 to 3 dims."""

    def __init__(self, inits: dict[str, Init] | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(13, 9))
        self.experts = nn.Parameter(torch.empty(5, 6, 7))
        self.bias = nn.Parameter(torch.empty(11))
        self.scale = nn.Parameter(torch.empty(()))
        self.inits = {name: Init("normal", std=1.0) for name, _ in self.named_parameters()} if inits is None else inits

    def param_inits(self) -> dict[str, Init]:
        return self.inits

    def init_buffers(self, device: torch.device) -> None:
        pass


def _small_weights(placements: dict[str, tuple[Placement, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    model = _Small()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        for name, its in placements.items():
            distributed = distribute_tensor(getattr(model, name).detach(), mesh, its)
            setattr(model, name, nn.Parameter(distributed))
    _init_poisoned(model, seed)
    return _whole_state(model)


@pytest.mark.parametrize(
    "placements",
    [
        {"matrix": (Shard(0), Shard(1)), "experts": (Shard(0), Shard(2)), "bias": (Replicate(), Shard(0))},
        {"matrix": (Shard(0), Shard(0)), "experts": (Shard(1), Replicate()), "scale": (Replicate(), Replicate())},
        {"matrix": (Shard(1), Shard(1)), "experts": (Shard(1), Shard(1)), "bias": (Shard(0), Shard(0))},
    ],
    ids=str,
)
def test_weights_do_not_depend_on_placements(placements: dict) -> None:
    expected = _small_weights({})
    for actual in run_distributed(_small_weights, 4, placements):
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


def test_seed_and_name_change_the_numbers() -> None:
    first, other = _small_weights({}, 0), _small_weights({}, 1)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["matrix"].flatten()[:11], first["bias"])
    # Blocks of one parameter differ from each other: 100 elements are 11 rows of 9.
    assert not torch.equal(first["matrix"][:2], first["matrix"][11:])


@pytest.mark.parametrize(("change", "message"), [("drop", "no entry for: bias"), ("add", "no parameter: ghost")])
def test_inits_that_do_not_cover_raise(change: str, message: str) -> None:
    inits = copy.copy(_Small().inits)
    if change == "drop":
        del inits["bias"]
    else:
        inits["ghost"] = Init("ones")
    with pytest.raises(ValueError, match=message):
        init_weights(_Small(inits), seed=0, device="cpu")


class _Idle:
    def fill_(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return tensor + 1.0


def test_distribution_that_writes_nothing_raises() -> None:
    inits = {**_Small().inits, "bias": _Idle()}
    with pytest.raises(ValueError, match=r"the distribution of bias.*writes nothing"):
        init_weights(_Small(inits), seed=0, device="cpu")
