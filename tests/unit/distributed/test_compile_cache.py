"""The key of a compiled graph tells DTensors apart that differ inside."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from trainer.distributed.compile_cache import describe, guard_compile_cache
from trainer.low_precision.float8_tensor import Float8Tensor

METHOD = "_stable_hash_for_caching"


@pytest.fixture
def keys() -> Iterator[dict[str, str]]:
    """Of DTensors that have mesh, placements, shape and dtype in common."""
    theirs = getattr(DTensor, METHOD, None)
    if theirs is None:
        pytest.skip("this torch has no such key")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    plain, scale = torch.zeros(4, 4), torch.ones(())
    locals_ = {
        "plain": plain,
        "same": plain + 1,
        "float8": Float8Tensor(plain.to(torch.float8_e4m3fn), scale, torch.float32),
        "e5m2": Float8Tensor(plain.to(torch.float8_e5m2), scale, torch.float32),
        "transposed": plain.t().contiguous().t(),
    }
    tensors = {
        name: DTensor.from_local(local, mesh, [Replicate()], shape=plain.shape, stride=plain.stride())
        for name, local in locals_.items()
    }
    try:
        guard_compile_cache()
        guard_compile_cache()
        yield {name: getattr(tensor, METHOD)() for name, tensor in tensors.items()} | {
            "theirs": theirs(tensors["float8"]),
            "theirs of plain": theirs(tensors["plain"]),
        }
    finally:
        setattr(DTensor, METHOD, theirs)
        dist.destroy_process_group()


def test_what_differs_inside_has_another_key(keys: dict[str, str]) -> None:
    assert keys["plain"] == keys["same"]
    assert len({keys[name] for name in ("plain", "float8", "e5m2", "transposed")}) == 4


def test_guard_is_needed(keys: dict[str, str]) -> None:
    """Delete it all once this fails."""
    assert keys["theirs"] == keys["theirs of plain"]


def test_description_tells_devices_apart() -> None:
    assert describe(torch.zeros(2)) != describe(torch.zeros(2, device="meta"))
