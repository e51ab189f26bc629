"""Recomputation of blocks with experts: which matrix products are kept, and that no choice of experts is made twice."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config

from models.common.grouped_mm import GROUPED_MM
from models.common.router import Router
from models.deepseek_v3.model import Transformer
from models.deepseek_v3.plan import build_plan
from tests.unit.distributed.test_activation_checkpoint import _CountOps
from tests.unit.models.test_deepseek_v3_model import ARGS, fill, make_labels, make_tokens, sum_loss
from trainer.config.schema_parallel import ActivationCheckpointConfig, CompileConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.compile import apply_compile

ONE_MIXTURE = dataclasses.replace(ARGS, n_layers=1, n_dense_layers=0, balance_loss_alpha=0.1)
OP = {"mode": "selective", "selective_ac_option": "op"}
MATMULS = {
    torch.float32: (torch.ops.aten.mm.default, GROUPED_MM),
    torch.bfloat16: (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default),
}


def build(
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    compiles: bool = False,
    spreads_experts: bool = False,
) -> Transformer:
    model = Transformer(ONE_MIXTURE)
    fill(model, std=0.3)
    model.to(dtype)
    section = ActivationCheckpointConfig(**settings)
    options = {"compiles_blocks": compiles, "spreads_experts": spreads_experts}
    apply_activation_checkpoint(model, plan=build_plan(ONE_MIXTURE), section=section, **options)
    return model


def run(model: Transformer) -> torch.Tensor:
    tokens = make_tokens()
    return model(tokens, labels=make_labels(tokens), loss_fn=sum_loss)


def count(settings: dict[str, Any], dtype: torch.dtype) -> tuple[collections.Counter, collections.Counter]:
    """Operations of the forward pass, and of the backward pass."""
    model = build(settings, dtype)
    with _CountOps() as forward:
        loss = run(model)
    with _CountOps() as backward:
        loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize("dtype", MATMULS)
@pytest.mark.parametrize(
    ("settings", "recomputed", "recomputed_grouped"),
    [
        ({"mode": "full"}, 12, 3),
        # Of wq_a, wq_b, wkv_a, wkv_b, wo, router, shared w1, w3, w2, grouped w1, w3, w2 the second, fourth ...
        ({**OP, "per_op_sac_force_recompute_mm_shapes_by_fqns": []}, 6, 2),
        # Without the router, by default: wq_b, wkv_b, shared w1, shared w2, grouped w3, and it.
        (OP, 6, 1),
        # w1 has the shape of w3: both are recomputed, and of the ten others every second.
        ({**OP, "per_op_sac_force_recompute_mm_shapes_by_fqns": ["moe.experts.w3"]}, 7, 3),
    ],
)
def test_matrix_products_of_experts_are_kept_as_others_are(
    dtype: torch.dtype, settings: dict[str, Any], recomputed: int, recomputed_grouped: int
) -> None:
    mm, grouped = MATMULS[dtype]
    _, plain = count({"mode": "none"}, dtype)
    forward, backward = count(settings, dtype)
    assert forward[mm] + forward[grouped] == 12 + 1  # the output
    again = {operation: backward[operation] - plain[operation] for operation in (mm, grouped)}
    assert (sum(again.values()), again[grouped]) == (recomputed, recomputed_grouped)
    assert backward[torch.ops.aten.topk.default] == 0


@pytest.mark.parametrize("settings", [{"mode": "full"}, {"mode": "selective", "selective_ac_option": "1"}, OP])
def test_recomputation_keeps_to_the_experts_of_the_forward_pass(settings: dict[str, Any]) -> None:
    """Scores that come out another way the second time do not change the choice. A moved bias stands for the other rounding."""
    compare_after_a_move(build(settings), tolerance=0.0)


@inductor_config.patch(allow_buffer_reuse=True, inplace_buffers=True)  # restores them
def test_recomputation_around_compiled_pieces_keeps_to_the_experts_too() -> None:
    """As where experts are on several ranks. Inductor uses memory again, that of what was chosen too, unless it is told not to."""
    torch._dynamo.reset()
    model = build({"mode": "full"}, compiles=True, spreads_experts=True)
    apply_compile(model, plan=build_plan(ONE_MIXTURE), section=CompileConfig(enable=True), spreads_experts=True)
    compare_after_a_move(model, tolerance=1e-5)


def compare_after_a_move(model: Transformer, *, tolerance: float) -> None:
    expected = build({"mode": "none"})
    run(expected).backward()
    loss = run(model)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.expert_bias.copy_(torch.randn(ONE_MIXTURE.n_experts))
    loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=tolerance, atol=tolerance)


def test_report_on_recomputation_can_be_had_of_experts_too() -> None:
    run(build({"mode": "full", "debug": True})).backward()


@pytest.mark.parametrize("budget", [0.0, 0.3])
@functorch_config.patch(activation_memory_budget=1.0)  # restores it
def test_memory_budget_does_not_choose_again(budget: float) -> None:
    graphs: dict[str, collections.Counter] = {"forward": collections.Counter(), "backward": collections.Counter()}

    def record(kind: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs[kind].update(node.target for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    model = build({"mode": "memory_budget", "memory_budget": budget}, compiles=True)
    backend = aot_autograd(
        fw_compiler=record("forward"),
        bw_compiler=record("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    block = model.layers["0"]
    block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
    expected = build({"mode": "none"})
    run(expected).backward()
    run(model).backward()
    # A group's best, groups and experts; by the bias, and for the balance loss without it.
    assert graphs["forward"][torch.ops.aten.topk.default] == 6
    assert graphs["backward"][torch.ops.aten.topk.default] == 0
    gradients = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad)


@functorch_config.patch(activation_memory_budget=1.0)  # restores it
def test_memory_budget_compiles_blocks_that_are_alike_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = dataclasses.replace(ONE_MIXTURE, n_layers=3)
    model = Transformer(args)
    section = ActivationCheckpointConfig(mode="memory_budget", memory_budget=0.5)
    apply_activation_checkpoint(model, plan=build_plan(args), section=section, compiles_blocks=True)
    apply_compile(model, plan=build_plan(args), section=CompileConfig(enable=True, backend="aot_eager"))
    run(model).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
