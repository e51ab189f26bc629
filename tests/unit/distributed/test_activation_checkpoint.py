import collections
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from models.registry import get_model_spec
from tests.distributed.cases import ARGS, make_batch, summed_loss
from trainer.config.schema_parallel import ActivationCheckpointConfig
from trainer.distributed.activation_checkpoint import apply_activation_checkpoint
from trainer.distributed.weight_init import init_weights

MODES = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "full_early_stop": {"mode": "full", "early_stop": True},
    "every_second": {"mode": "selective", "selective_ac_option": "2"},
    "op": {"mode": "selective", "selective_ac_option": "op"},
    "op_forced": {
        "mode": "selective",
        "selective_ac_option": "op",
        "per_op_sac_force_recompute_mm_shapes_by_fqns": ["feed_forward.w1"],
    },
}
N_LAYERS = ARGS.n_layers
# A block has 7 matmuls; backward does two for each. The output matrix adds 3.
MATMULS_WITHOUT = N_LAYERS * 7 * 3 + 3


class _CountOps(TorchDispatchMode):
    """Counts the operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def _build(settings: dict, tied: bool = False) -> Transformer:
    args = dataclasses.replace(ARGS, tie_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(args)
    apply_activation_checkpoint(model, plan=build_plan(args), section=ActivationCheckpointConfig(**settings))
    init_weights(model, seed=0, device="cpu")
    return model


def _run(settings: dict) -> tuple[Transformer, collections.Counter]:
    model = _build(settings)
    tokens, labels = make_batch(0)
    with _CountOps() as ops:
        model(tokens, labels=labels, loss_fn=summed_loss).backward()
    return model, ops.counts


@pytest.mark.parametrize("mode", MODES)
def test_names_stay_and_gradients_are_bitwise_equal(mode: str) -> None:
    plain, _ = _run({"mode": "none"})
    model, _ = _run(MODES[mode])
    assert list(model.state_dict()) == list(plain.state_dict())
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradients[name].grad, parameter.grad), name


@pytest.mark.parametrize(
    ("mode", "recomputed_matmuls", "recomputed_attentions"),
    [
        ("none", 0, 0),
        ("full", 7 * N_LAYERS, N_LAYERS),
        ("every_second", 7 * N_LAYERS // 2, N_LAYERS // 2),
        # Of wq, wk, wv, wo, w1, w3, w2 the second, fourth and sixth.
        ("op", 3 * N_LAYERS, 0),
        # w3 has w1's shape: both are recomputed, and of the five others the second and the fourth.
        ("op_forced", 4 * N_LAYERS, 0),
    ],
)
def test_recomputes_what_the_mode_says(mode: str, recomputed_matmuls: int, recomputed_attentions: int) -> None:
    _, counts = _run(MODES[mode])
    assert counts[torch.ops.aten.mm.default] == MATMULS_WITHOUT + recomputed_matmuls
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert counts[attention] == N_LAYERS + recomputed_attentions


def test_early_stop_recomputes_less_than_full() -> None:
    # The last matmul of a block is not needed to compute the gradients inside it.
    _, full = _run(MODES["full"])
    _, stopped = _run(MODES["full_early_stop"])
    assert stopped[torch.ops.aten.mm.default] == full[torch.ops.aten.mm.default] - N_LAYERS


@pytest.mark.parametrize("option", ["0", "-1", "ops", "1.5", ""])
def test_selective_option_that_is_no_number_raises(option: str) -> None:
    with pytest.raises(ValueError, match=r"activation_checkpoint.selective_ac_option"):
        _build({"mode": "selective", "selective_ac_option": option})


def test_memory_budget_without_compile_raises() -> None:
    with pytest.raises(ValueError, match=r"compile.enable"):
        _build({"mode": "memory_budget"})


def test_pieces_of_blocks_with_experts_have_code_objects_of_their_own() -> None:
    """By these the compiler keeps graphs: shared by methods they could be mixed up (torch 2.11), by blocks they are compiled once."""
    spec = get_model_spec("deepseek_v3")
    args = spec.get_args("debugmodel")
    with torch.device("meta"):
        model = spec.load_model_class()(args)
    section = ActivationCheckpointConfig(mode="selective", selective_ac_option="op")
    apply_activation_checkpoint(model, plan=spec.build_plan(args), section=section, spreads_experts=True)
    dense, one, other = (model.get_submodule(f"layers.{i}") for i in (0, 1, 2))

    def list_codes(block: torch.nn.Module) -> list:
        return [block.attend.__code__, block.moe.route.__code__, block.moe.experts.multiply.__code__]

    assert all(a is b for a, b in zip(list_codes(one), list_codes(other), strict=True))
    assert len({id(code) for code in (dense.forward.__code__, *list_codes(one))}) == 4
    assert type(one).forward is one.forward.__func__, "the block itself is left as it is"
