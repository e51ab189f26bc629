"""Which layers are converted, which are not, and what is said about it."""

import inspect
import logging

import pytest
import torch
import torch.nn as nn

from models.llama3.args import LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from models.plan import ParallelPlan
from models.registry import get_model_spec
from trainer.config.schema_quantize import Float8LinearConfig, QuantizeConfig, QuantizeLinearConfig
from trainer.distributed import tensor_parallel
from trainer.distributed.parallel_dims import ParallelDims
from trainer.low_precision.convert import apply_float8, apply_low_precision, check_even_shards
from trainer.low_precision.float8_linear import Float8Linear

ARGS = LlamaArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=96, max_seq_len=16)

NO_PLAN = ParallelPlan(fsdp_units=(), blocks="")


def build(args: LlamaArgs = ARGS) -> nn.Module:
    with torch.device("meta"):
        return Transformer(args)


def apply(model: nn.Module, tp_degree: int = 1, **settings) -> set[str]:
    """Convert, and return the names of what is in float8."""
    section = QuantizeConfig(linear=QuantizeLinearConfig(float8=Float8LinearConfig(**settings)))
    dims = ParallelDims(world_size=tp_degree, dp_replicate=1, dp_shard=1, cp=1, tp=tp_degree, pp=1)
    apply_low_precision(model, converters=["float8"], quantize=section, plan=build_plan(ARGS), dims=dims)
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def test_all_but_the_output_is_converted_and_parameters_stay(caplog):
    model, plain = build(), build()
    with caplog.at_level(logging.INFO):
        names = apply(model)
    assert len(names) == 2 * 7
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }
    lines = caplog.messages
    assert "float8, tensorwise: 2 x layers.*.feed_forward.w1 (64 -> 96): converted" in lines
    assert "float8, tensorwise: output (64 -> 67): stays in high precision: output matrix" in lines
    assert len(lines) == 8


def test_filter_takes_parts_of_names(caplog):
    with caplog.at_level(logging.INFO):
        names = apply(build(), filter_fqns=["attention.w", "layers.0.", "output"])
    assert names == {f"layers.1.feed_forward.{w}" for w in ("w1", "w2", "w3")}
    assert any("filter_fqns has 'layers.0.'" in line for line in caplog.messages)


def test_first_and_last_blocks_stay_where_asked(caplog):
    model = build(LlamaArgs(dim=64, n_layers=5, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=96))
    with caplog.at_level(logging.INFO):
        names = apply(model, keep_first_blocks=1, keep_last_blocks=2)
    assert {name.split(".")[1] for name in names} == {"1", "2"}
    reasons = {line.rpartition(": ")[2] for line in caplog.messages if "stays" in line}
    assert reasons == {"output matrix", "keep_first_blocks = 1", "keep_last_blocks = 2"}
    with pytest.raises(ValueError, match="no linear layer can be converted"):
        apply(build(), keep_last_blocks=7)


@pytest.mark.parametrize("pattern", ["lm_head", ""])
def test_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(ValueError, match=r"filter_fqns = .* is part of no module's name. Names are like layers.0"):
        apply(build(), filter_fqns=["output", pattern])


def test_what_is_no_multiple_of_16_stays(caplog):
    with caplog.at_level(logging.INFO):
        names = apply(build(LlamaArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=100)))
    assert names == {f"layers.0.attention.{w}" for w in ("wq", "wk", "wv", "wo")}
    assert any("feed_forward.w2 (100 -> 64): stays" in line and "multiples of 16" in line for line in caplog.messages)


def test_tensor_parallel_parts_count():
    # 96 rows, or columns, over 4 ranks are 24; 32 rows of keys and values are 8 each.
    assert apply(build(), tp_degree=4) == {f"layers.{i}.attention.{w}" for i in "01" for w in ("wq", "wo")}


def test_each_matrix_that_is_cut_is_multiplied_as_its_layer_does():
    """One that calls F.linear would compute in high precision, whatever the log says."""
    styles = [c for c in vars(tensor_parallel).values() if isinstance(c, type) and issubclass(c, nn.Linear)]
    assert len(styles) >= 6
    assert all("multiply(self, " in inspect.getsource(cls.forward) for cls in styles)


def test_nothing_left_to_convert_is_refused():
    with pytest.raises(ValueError, match="no linear layer can be converted"):
        apply(build(), filter_fqns=["layers"])


def test_small_layers_stay_where_asked():
    args = get_model_spec("llama3").get_args("8B")
    model = build(args)
    names = apply(model, filter_fqns=["auto_filter_small_kn"])
    assert "layers.0.attention.wq" in names
    assert "layers.0.attention.wk" not in names


def test_routers_stay():
    args = get_model_spec("deepseek_v3").get_args("debugmodel")
    with torch.device("meta"):
        model = get_model_spec("deepseek_v3").load_model_class()(args)
    names = apply_float8(model, section=Float8LinearConfig(), plan=NO_PLAN).converted
    assert names
    assert not any(name.endswith("router.gate") for name in names)


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_compiled_norms_round_what_scales_by_rows_see(name):
    """Else the loss is NaN after some dozen steps (pytorch issue 150859)."""
    with torch._inductor.config.patch(emulate_precision_casts=False):
        apply(build(), recipe_name=name, emulate=True)
        assert torch._inductor.config.emulate_precision_casts == name.startswith("rowwise")


def test_gpu_without_float8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ValueError, match=r"8\.9 or more, and A100 has 8\.0\. Set quantize\.linear\.float8\.emulate"):
        apply(build())
    assert apply(build(), emulate=True)


def test_uneven_shards_are_refused():
    check_even_shards({"a": (64, 96)}, 8)
    with pytest.raises(ValueError, match=r"96 rows of a\.weight into 5\. .*filter_fqns"):
        check_even_shards({"a": (64, 96)}, 5)


def test_matching_is_by_part_of_the_name_and_reason_is_one(caplog):
    """A layer of a user's own class may compute anything."""

    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Own(64, 64), "b": nn.Linear(64, 64)})
    conversion = apply_float8(model, section=Float8LinearConfig(), plan=NO_PLAN)
    assert conversion.converted == ["b"]
    assert "a class of its own, Own" in conversion.kept["a"]
