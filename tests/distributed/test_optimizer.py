"""Optimizers over sharded parameters equal one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.distributed.harness import run_distributed
from trainer.components.optimizer import Optimizers, build_optimizer
from trainer.config.schema_training import MuonConfig, OptimizerConfig

# 7 rows: on 4 ranks shards of 2, 2, 2 and 1 rows; 3 rows: one rank has none.
SHAPES = ((8, 6), (7, 8), (3, 7), (16, 3), (8, 16))


class Stack(nn.Module):
    """Matrices in a row, with a norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(SHAPES)})
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return self.norm(x)


def make_stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def fill_gradients(model: nn.Module, step: int, value: float | None = None) -> None:
    """Give every parameter the gradient that it has in every world, whatever its placement."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        gradient = (
            torch.randn(parameter.shape, generator=generator) if value is None else torch.full(parameter.shape, value)
        )
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shard(model: Stack, layout: str) -> None:
    if layout == "fsdp":
        for layer in model.layers.values():
            fully_shard(layer)
        fully_shard(model)
    elif layout == "hsdp":
        fully_shard(
            model,
            mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp_replicate", "dp_shard")),
        )
    elif layout == "columns_and_rows":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp_shard", "tp"))
        for layer in model.layers.values():
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0), Shard(1)]))


def run_steps(section: OptimizerConfig, layout: str) -> dict[str, torch.Tensor]:
    model = make_stack()
    shard(model, layout)
    optimizers = build_optimizer(model, section=section)
    for step in range(3):
        fill_gradients(model, step)
        optimizers.step(skip=torch.tensor(0.0))
    state = {name: whole(value) for name, value in optimizers.state_dict().items()}
    return {**{name: whole(value) for name, value in model.named_parameters()}, **state}


@pytest.mark.parametrize(
    ("layout", "world_size"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("columns_and_rows", 4), ("plain", 2)]
)
@pytest.mark.parametrize(
    "section",
    [
        OptimizerConfig(name="Muon", lr=0.01, muon=MuonConfig(lr=0.05)),
        OptimizerConfig(name="Muon", lr=0.01, muon=MuonConfig(nesterov=False, adjust_lr="match_rms_adamw")),
        OptimizerConfig(name="AdamW", lr=0.01),
    ],
    ids=["muon", "muon-match-rms", "adamw"],
)
def test_three_steps_on_shards_equal_one_process(section, layout, world_size):
    expected = run_steps(section, "one process")
    untrained = dict(make_stack().named_parameters())
    for result in run_distributed(run_steps, world_size, section, layout, reuse=True):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, atol=1e-5, rtol=0, msg=name)
            assert name not in untrained or not torch.equal(value, untrained[name])


def skip_a_step(section: OptimizerConfig) -> list[str]:
    """Return the names of what a skipped step changed."""
    model = make_stack()
    shard(model, "fsdp")
    optimizers = build_optimizer(model, section=section)
    fill_gradients(model, 0)
    optimizers.step()

    def snapshot() -> dict[str, torch.Tensor]:
        local = {**dict(model.named_parameters()), **optimizers.state_dict()}
        return {k: (v.to_local() if isinstance(v, DTensor) else v).detach().clone() for k, v in local.items()}

    before = snapshot()
    fill_gradients(model, 1, value=float("nan"))
    optimizers.step(skip=torch.tensor(1.0))
    return [name for name, value in snapshot().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_skipped_step_leaves_shards_moments_and_counts_alone(name, implementation):
    section = OptimizerConfig(name=name, implementation=implementation)
    assert run_distributed(skip_a_step, 2, section) == [[], []]


def count_newton_schulz(section: OptimizerConfig) -> int:
    """Return how many matrices this rank orthogonalizes in one step."""
    from trainer.components import muon

    model = make_stack()
    shard(model, "fsdp")
    optimizers: Optimizers = build_optimizer(model, section=section)
    fill_gradients(model, 0)
    calls: list[tuple[int, ...]] = []
    original = muon._newton_schulz
    muon._newton_schulz = lambda direction, group: calls.append(tuple(direction.shape)) or original(direction, group)
    optimizers.step()
    return len(calls)


def test_muon_divides_the_matrices_over_the_ranks():
    assert sorted(run_distributed(count_newton_schulz, 2, OptimizerConfig(name="Muon"))) == [2, 3]
