"""The kernel of Adam in low precision against torch's own operations, and a host that waits for nothing."""

import pytest
import torch
from torch import Tensor, nn

from trainer.low_precision import adam
from trainer.low_precision.adam import LowPrecisionAdam
from trainer.low_precision.moments import FORMATS, read

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = ((512, 1024), (4, 96, 1408), (64, 10944), (1000,), (1,), (3, 2000))


def build(shape: tuple[int, ...], key: str, dtype: torch.dtype, *, decoupled: bool) -> LowPrecisionAdam:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, device="cuda").to(dtype))
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return LowPrecisionAdam([parameter], **settings, moments=FORMATS[key], decoupled=decoupled)  # type: ignore[arg-type]


def take_steps(optimizer: LowPrecisionAdam, steps: int) -> tuple[Tensor, list[Tensor]]:
    (parameter,) = optimizer.param_groups[0]["params"]
    for step in range(steps):
        generator = torch.Generator("cuda").manual_seed(step)
        gradient = torch.randn(parameter.shape, generator=generator, device="cuda") * 10.0 ** (step - 1)
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach().float(), [read(optimizer._get_moment(parameter, index)).flatten() for index in (0, 1)]


@pytest.mark.parametrize("key", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "decoupled"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_kernel_equals_torch(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, decoupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key in ("float8", "AdamWFp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this GPU")
    actual, moments = take_steps(build(shape, key, dtype, decoupled=decoupled), 3)
    monkeypatch.setattr(adam, "_launch", adam._update_plainly)
    expected, expected_moments = take_steps(build(shape, key, dtype, decoupled=decoupled), 3)
    # A value between two codes, or two values of bf16, may go either way by a rounding error of the arithmetic.
    for values, references in ((actual, expected), *zip(moments, expected_moments, strict=True)):
        assert values.isfinite().all()
        assert torch.isclose(values, references, rtol=1e-4, atol=1e-6).float().mean() > 0.995
        assert (values - references).norm() <= 5e-3 * references.norm()


@pytest.mark.parametrize("key", FORMATS)
def test_skipped_step_changes_nothing_and_no_host_waits(key: str) -> None:
    optimizer = build((256, 512), key, torch.float32, decoupled=True)
    take_steps(optimizer, 2)
    (parameter,) = optimizer.param_groups[0]["params"]
    tensors = [parameter, *optimizer.state[parameter].values()]
    before = [tensor.detach().clone() for tensor in tensors]
    assert parameter.grad is not None
    parameter.grad.fill_(float("nan"))
    skip, go = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.found_inf = skip
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
        parameter.grad.fill_(1.0)
        torch.cuda.set_sync_debug_mode("error")
        optimizer.found_inf = go
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(parameter, before[0])
    assert optimizer.state[parameter]["step"].item() == 3
