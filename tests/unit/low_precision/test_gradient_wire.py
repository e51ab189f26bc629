"""Gradients in float8 blocks: how near their sum is, and what must stay apart or visible."""

import pytest
import torch

from trainer.low_precision.gradient_wire import BLOCK, Blocks, pack, sum_packed

CPU = torch.device("cpu")
SIZES = (1000, 3, 256, 5000)


def reduce_on_all(gradients, sizes=SIZES):
    """Return what each rank would have. gradients: (senders, receivers, values)."""
    blocks = Blocks(sizes, CPU)
    packed = torch.stack([pack(of_sender, blocks) for of_sender in gradients])
    assert packed.shape[-1] == len(blocks) * (BLOCK + 4)
    results = torch.full(gradients.shape[1:], float("nan"))
    for receiver, result in enumerate(results):
        sum_packed(packed[:, receiver].contiguous(), blocks, result)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e6])
def test_sum_over_eight_ranks_is_near(dtype, scale):
    """One rounding to 3 bits of mantissa is some 2.6% of a normal value; eight of them, independent, the same share of their sum."""
    generator = torch.Generator().manual_seed(0)
    gradients = (scale * torch.randn(8, 8, sum(SIZES), generator=generator)).to(dtype)
    expected = gradients.double().sum(0)
    error = (reduce_on_all(gradients).double() - expected).norm() / expected.norm()
    assert 0.005 < error < 0.03


def test_bytes_are_a_quarter():
    blocks = Blocks((4096 * 4096,), CPU)
    assert blocks.row_bytes / (4 * blocks.values) == pytest.approx(0.25, rel=0.02)


def test_parameter_is_rounded_the_same_whatever_is_beside_it():
    """Replicas of a norm on ranks of tensor parallelism stay replicas."""
    gradients = torch.randn(2, 1, sum(SIZES))
    other = gradients.clone()
    other[..., :1000] *= 100.0
    other[..., 1003:] *= 0.01
    assert torch.equal(reduce_on_all(gradients)[:, 1000:1003], reduce_on_all(other)[:, 1000:1003])


def test_zeros_stay_zero_and_what_is_not_finite_stays_visible():
    gradients = torch.zeros(2, 2, sum(SIZES))
    assert torch.equal(reduce_on_all(gradients), torch.zeros(2, sum(SIZES)))
    for value in (float("inf"), float("-inf"), float("nan")):
        gradients[1, 0, 1500] = value
        result = reduce_on_all(gradients)
        assert not result[0, 1500].isfinite()
        assert result[1].isfinite().all()
