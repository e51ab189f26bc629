"""What stands in for a GPU's doings."""

import pytest

from trainer.planner.stand_ins import draw_shares


def test_loads_of_experts_differ_by_layer_and_step_and_are_drawn_alike_each_time():
    shares = draw_shares(3, 1, n_experts=64, n_ranks=4)
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) > 1.02 * 0.25
    assert shares == draw_shares(3, 1, n_experts=64, n_ranks=4)
    assert shares != draw_shares(4, 1, n_experts=64, n_ranks=4)
    assert shares != draw_shares(3, 2, n_experts=64, n_ranks=4)
    of_experts = [draw_shares(layer, 1, n_experts=64, n_ranks=64) for layer in range(26)]
    busiest = sorted(64 * max(layer) for layer in of_experts)
    assert 1.7 < busiest[13] < 3.0, "as the median layer's busiest expert was measured"
    assert draw_shares(3, 1, n_experts=8, n_ranks=4, spread=0.0) == [0.25] * 4
