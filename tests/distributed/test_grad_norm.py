import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.distributed.harness import run_distributed
from trainer.distributed.grad_norm import clip_grad_norm

SHAPES = [(8, 3), (5, 7), (6,), (3, 4, 2), (2, 2)]


def _plain_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        parameters.append(parameter)
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last has no gradient


def _clip_on_mixed_meshes(max_norm: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "ep"))
    layouts = [
        (line, (Shard(0),)),
        (line, (Shard(0),)),  # uneven: 5 rows on 4 ranks
        (grid, (Replicate(), Shard(0))),
        (grid, (Shard(1), Shard(0))),
        None,  # no DTensor: the same on all ranks
    ]
    parameters = _plain_parameters()
    for i, layout in enumerate(layouts):
        if layout is not None:
            grad = distribute_tensor(parameters[i].grad, *layout)
            parameters[i] = nn.Parameter(distribute_tensor(torch.zeros(SHAPES[i]), *layout))
            parameters[i].grad = grad
    norm = clip_grad_norm(parameters, max_norm)
    grads = [p.grad for p in parameters if p.grad is not None]
    return norm, [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_norm_and_clipped_gradients_equal_torch_on_mixed_meshes(max_norm: float) -> None:
    expected = _plain_parameters()
    expected_norm = nn.utils.clip_grad_norm_(expected, max_norm if max_norm > 0 else float("inf"))
    alone = _plain_parameters()
    outcomes = run_distributed(_clip_on_mixed_meshes, 4, max_norm, reuse=True)
    outcomes.append((clip_grad_norm(alone, max_norm), [p.grad for p in alone]))
    for norm, grads in outcomes:
        assert norm.shape == ()
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected_norm)
        for grad, parameter in zip(grads, expected, strict=False):
            torch.testing.assert_close(grad, parameter.grad)


def test_bf16_gradients_are_added_up_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 1.0)
    assert clip_grad_norm([parameter], 0.0).item() == pytest.approx(100_000**0.5, rel=1e-5)


def test_no_gradients_give_norm_0() -> None:
    assert clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
