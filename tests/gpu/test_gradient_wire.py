"""Gradients in float8 on GPUs: the kernels against torch's own operations, and a run over NCCL."""

import pytest
import torch

from tests.distributed.cases import run_case, run_reference
from tests.distributed.harness import run_distributed
from tests.distributed.test_gradient_wire import CASES, TOLERANCE, Case
from trainer.low_precision.gradient_wire import Blocks, pack, sum_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with float8"
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1000, 3, 256, 5000), (512, 4096 * 300), (7,)])
def test_kernels_equal_torch(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = (torch.randn(4, sum(sizes), generator=generator) * torch.logspace(-8, 2, sum(sizes))).to(dtype)
    blocks, on_gpu = Blocks(sizes, torch.device("cpu")), Blocks(sizes, torch.device("cuda"))
    expected, actual = torch.empty(sum(sizes)), torch.full((sum(sizes),), float("nan"), device="cuda")
    packed = pack(gradients.cuda(), on_gpu)
    # A scale that is divided differently may move a value that lies between two codes.
    assert (packed.cpu() == pack(gradients, blocks)).float().mean() > 0.98
    sum_packed(packed.cpu(), blocks, expected)
    sum_packed(packed, on_gpu, actual)
    # Of what is added up: the sum itself may be next to nothing.
    assert ((actual.cpu() - expected).abs() <= 1e-6 * gradients.float().abs().sum(0)).all()
    exact = gradients.double().sum(0)
    assert ((actual.cpu() - exact).norm() / exact.norm()).item() < 0.03
    gradients[1, 0] = float("inf")
    sum_packed(pack(gradients.cuda(), on_gpu), on_gpu, actual)
    assert not actual[0].isfinite()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_is_near_one_gpu(case: Case) -> None:
    if torch.cuda.device_count() < case.world_size:
        pytest.skip(f"needs {case.world_size} GPUs")
    expected = run_reference(Case("reference", base=case.base), "cuda")
    for outcome in run_distributed(run_case, case.world_size, case, "cuda", backend="nccl"):
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-2)
        for name, gradient in outcome.gradients.items():
            error = (gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()
            assert error <= TOLERANCE, name
