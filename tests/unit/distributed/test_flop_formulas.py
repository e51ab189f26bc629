"""FLOPs that torch does not count are counted here, and those that it counts come out the same."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.common.grouped_mm import grouped_mm
from trainer.distributed.flop_formulas import register_flop_formulas

aten = torch.ops.aten


def test_products_by_group_count_as_what_they_cost() -> None:
    register_flop_formulas()
    register_flop_formulas()  # twice is no harm
    rows, weights = torch.randn(6, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    ends = torch.tensor([1, 3, 6], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        with FlopCounterMode(display=False) as counter:
            grouped_mm(rows.to(dtype), weights.to(dtype), ends).square().sum().backward()
        with FlopCounterMode(display=False) as expected:
            F.linear(rows, weights[0]).square().sum().backward()
        assert counter.get_total_flops() == expected.get_total_flops() == 3 * 2 * 6 * 8 * 16


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_heads_that_share_keys_and_values_count_as_those_of_the_queries(kv_heads: int) -> None:
    register_flop_formulas()
    q, k, v = (torch.empty(2, heads, 16, dim, device="meta") for heads, dim in ((8, 6), (kv_heads, 6), (kv_heads, 4)))
    with FlopCounterMode(display=False) as counter:
        out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    scores = 2 * 8 * 16 * 16
    assert counter.get_total_flops() == 2 * scores * (6 + 4)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        aten._scaled_dot_product_cudnn_attention_backward(
            torch.empty_like(out), q, k, v, out, logsumexp, seed, seed, None, None, None, 16, 16, 0.0, True
        )
    assert counter.get_total_flops() == 2 * scores * (3 * 6 + 2 * 4)
