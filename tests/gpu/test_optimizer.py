"""Optimizers on a GPU: the fused kernel decides there whether to update, and the host waits for nothing."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from trainer.components.optimizer import Optimizers, build_optimizer
from trainer.config.schema_training import OptimizerConfig
from trainer.distributed.grad_norm import clip_grad_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 50)).cuda()


def backward(model: nn.Module, step: int, factor: float = 1.0) -> None:
    tokens = torch.randint(50, (16, 8), generator=torch.Generator().manual_seed(step)).cuda()
    (factor * model(tokens).logsumexp(-1).mean()).backward()


def take_state(model: nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    named = {**dict(model.named_parameters()), **optimizers.state_dict()}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


@pytest.fixture
def restored_sync_mode() -> Iterator[None]:
    """Whatever the test does to the mode in which waiting for the device is an error, it ends with the test."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Muon"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_skip_leaves_weights_moments_and_counts(name: str, steps_before: int) -> None:
    model = make_model()
    optimizers = build_optimizer(model, section=OptimizerConfig(name=name, lr=0.01))
    go, skip = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    for step in range(steps_before):
        backward(model, step)
        optimizers.step(go)
        optimizers.zero_grad()
    before = take_state(model, optimizers)
    backward(model, 9, factor=float("nan"))
    optimizers.step(skip)
    optimizers.zero_grad()
    after = take_state(model, optimizers)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    backward(model, 10)
    optimizers.step(go)
    last = take_state(model, optimizers)
    assert all(bool(tensor.isfinite().all()) for tensor in last.values())
    changed = [key for key in before if not torch.equal(before[key], last[key])]
    assert len(changed) == len(before), "the next step goes on"


@pytest.mark.usefixtures("restored_sync_mode")
def test_clipping_and_a_skipped_step_make_the_host_wait_for_nothing() -> None:
    model = make_model()
    optimizers = build_optimizer(model, section=OptimizerConfig(lr=0.01))
    verdicts = [torch.zeros((), device="cuda"), torch.ones((), device="cuda"), torch.zeros((), device="cuda")]
    for step, skip in enumerate(verdicts):
        backward(model, step)
        # The first step makes the optimizer's state, and may wait.
        torch.cuda.set_sync_debug_mode("default" if step == 0 else "error")
        clip_grad_norm(model.parameters(), 0.1)
        optimizers.step(skip)
        optimizers.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
    counts = {tensor.item() for name, tensor in optimizers.state_dict().items() if name.endswith(".step")}
    assert counts == {2.0}


def test_waiting_would_be_noticed(restored_sync_mode: None) -> None:
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        value.item()


@pytest.mark.parametrize(("implementation", "tolerance"), [("fused", 1e-6), ("foreach", 1e-6)])
def test_kernels_agree_with_the_plain_loop(implementation: str, tolerance: float) -> None:
    ours = make_model()
    theirs = copy.deepcopy(ours)
    models = [(ours, implementation), (theirs, "for-loop")]
    built = [
        (model, build_optimizer(model, section=OptimizerConfig(lr=0.01, eps=1e-4, implementation=kind)))  # type: ignore[arg-type]
        for model, kind in models
    ]
    for step in range(3):
        for model, optimizers in built:
            backward(model, step)
            clip_grad_norm(model.parameters(), 0.1)
            optimizers.step(torch.zeros((), device="cuda"))
            optimizers.zero_grad()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ((actual - expected).norm() / expected.norm()).item() <= tolerance


def test_state_moves_between_the_gpu_and_the_host() -> None:
    """A checkpoint of a GPU run is read where parameters are on the CPU, step counts included."""
    on_gpu = make_model()
    source = build_optimizer(on_gpu, section=OptimizerConfig(lr=0.01))
    backward(on_gpu, 0)
    source.step()
    on_cpu = make_model().cpu()
    target = build_optimizer(on_cpu, section=OptimizerConfig(lr=0.01))
    target.load_state_dict(source.state_dict())
    for name, tensor in target.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, source.state_dict()[name].cpu()), name
