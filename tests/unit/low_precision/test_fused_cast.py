"""The cast both ways, as torch does it where there is no GPU. `tests/gpu/test_float8.py` compares the kernel."""

import pytest
import torch

from tests.unit.low_precision.test_float8_linear import as_float8, make_linear, run
from trainer.low_precision.fused_cast import cast_both_ways
from trainer.low_precision.recipe import E4M3, E5M2
from trainer.low_precision.scaling import cast


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_both_ways_hold_the_same_values(dtype):
    x = torch.randn(48, 33, dtype=torch.bfloat16)
    rows, columns, amax = cast_both_ways(x, torch.tensor(300.0), dtype)
    assert torch.equal(rows.float(), cast(x, torch.tensor(300.0), dtype).float())
    assert torch.equal(columns.float(), rows.t().float())
    assert columns.is_contiguous()
    assert amax == x.abs().max()
    torch.library.opcheck(
        cast_both_ways, (x, torch.tensor(300.0), dtype), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "static"])
def test_layer_with_fused_casts_gives_the_same(recipe):
    scales = {f"static_scale_{kind}": 1.0 for kind in ("input", "weight", "grad_output")} if recipe == "static" else {}
    for emulate in (True, False):
        settings = {"recipe_name": recipe, "emulate": emulate, **scales}
        expected = run(as_float8(make_linear(), **settings))
        for actual, other in zip(run(as_float8(make_linear(), fused_cast="all", **settings)), expected, strict=True):
            assert torch.equal(actual, other)


def test_compiled_layer_with_fused_casts_equals_eager():
    linear = as_float8(make_linear(), fused_cast="all", emulate=True, recipe_name="delayed")
    expected = run(linear)
    linear.weight.grad = None
    linear.forward = torch.compile(linear.forward, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(run(linear), expected, strict=True))
