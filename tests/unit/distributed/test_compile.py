import dataclasses
import logging
import signal
import subprocess

import pytest
import torch
import torch._dynamo
import torch._functorch.config as functorch_config
from torch._inductor import async_compile

from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from models.plan import ParallelPlan
from tests.distributed.cases import ARGS, make_batch, summed_loss
from trainer.config.schema_parallel import ActivationCheckpointConfig, CompileConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.compile import apply_compile
from trainer.distributed.stop_signals import SIGNALS
from trainer.distributed.weight_init import init_weights

AOT_EAGER = CompileConfig(enable=True, backend="aot_eager")
CHECKPOINTS = {
    "none": ActivationCheckpointConfig(mode="none"),
    "full": ActivationCheckpointConfig(mode="full"),
    "op": ActivationCheckpointConfig(mode="selective", selective_ac_option="op"),
    "memory_budget": ActivationCheckpointConfig(mode="memory_budget", memory_budget=0.3),
}


def _gradients(
    section: CompileConfig, checkpoint: ActivationCheckpointConfig = CHECKPOINTS["none"]
) -> dict[str, torch.Tensor]:
    # More blocks than dynamo compiles variants of one function: each must share the first one's graph.
    args = dataclasses.replace(ARGS, n_layers=10)
    plan = build_plan(args)
    model = Transformer(args)
    names = [name for name, _ in model.named_parameters()]
    apply_activation_checkpoint(model, plan=plan, section=checkpoint, compiles_blocks=section.enable)
    apply_compile(model, plan=plan, section=section)
    init_weights(model, seed=0, device="cpu")
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    tokens, labels = make_batch(0)
    model(tokens, labels=labels, loss_fn=summed_loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", CHECKPOINTS)
def test_blocks_share_one_graph_and_gradients_stay(mode: str) -> None:
    expected = _gradients(CompileConfig())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with functorch_config.patch(activation_memory_budget=1.0):  # which the memory budget sets for the process
        actual = _gradients(AOT_EAGER, CHECKPOINTS[mode])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_compilation_is_timed_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, logger="trainer.distributed.compile"):
        _gradients(AOT_EAGER)
    assert any("compiled graph" in record.message for record in caplog.records)


@pytest.mark.parametrize("section", [CompileConfig(), CompileConfig(enable=True, components=["loss"])])
def test_nothing_is_compiled_unless_asked(section: CompileConfig) -> None:
    model = Transformer(ARGS)
    apply_compile(model, plan=build_plan(ARGS), section=section)
    assert all("forward" not in vars(module) for module in model.modules())


def test_model_may_have_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = set()
    monkeypatch.setattr(torch, "compile", lambda method, *, backend, **_: backends.add(backend) or method)
    section = CompileConfig(enable=True, backend="inductor", model_backend_override="aot_eager")
    apply_compile(Transformer(ARGS), plan=build_plan(ARGS), section=section)
    assert backends == {"aot_eager"}


class _Shifting(torch.nn.Module):
    shift = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def test_one_code_may_have_many_graphs() -> None:
    """As blocks in float8 have: torch allows 8, and then refuses."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(_Shifting())
    plan = ParallelPlan(fsdp_units=(("*",),), blocks="*")
    apply_compile(model, plan=plan, section=CompileConfig(enable=True, backend="eager"))
    for shift in range(10):
        model[0].shift = shift
        assert model(torch.zeros(1)).item() == shift


class _Breaking(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_graph_break_raises() -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(_Breaking())
    apply_compile(model, plan=ParallelPlan(fsdp_units=(("*",),), blocks="*"), section=AOT_EAGER)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.ones(2))


def test_processes_that_compile_are_deaf_to_stop_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(subprocess.Popen(["sleep", "60"])))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    apply_compile(Transformer(ARGS), plan=build_plan(ARGS), section=CompileConfig(enable=True, backend="inductor"))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    (process,) = started
    try:
        for number in SIGNALS:
            process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
    finally:
        process.kill()
        process.wait()
