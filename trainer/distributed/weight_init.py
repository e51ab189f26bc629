"""First weights that do not depend on how the model is spread over devices.

Each parameter is cut, by its full shape alone, into blocks of rows; each block has a generator of its own, seeded by run
seed, parameter name and block number. A rank draws the blocks that overlap its part and keeps what is its own. CPU and
CUDA generators give different numbers, so that a run begins alike on any number of devices of one type.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol, cast

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Elements drawn at a time, about: blocks on a shard's edge are drawn by both neighbours, so they should be small, and yet
# large enough to fill a GPU. Part of the meaning of a seed: changing it changes every run's first weights.
_BLOCK_ELEMENTS = 2**20


class Fill(Protocol):
    """A parameter's distribution, as `models.common.init.Init`."""

    def fill_(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor: ...


class Initializable(Protocol):
    """What `init_weights` asks of a model."""

    def param_inits(self) -> Mapping[str, Fill]: ...

    def init_buffers(self, device: torch.device) -> None: ...


@torch.no_grad()
def init_weights(
    model: nn.Module, *, seed: int, device: torch.device | str, buffer_device: torch.device | str | None = None
) -> None:
    """Allocate the parameters and buffers of `model`, built on meta and already parallelized, and fill them.

    device: of the parameters: host memory under CPU offload. buffer_device: of the buffers, by default the same.
    Parameters that two modules share (tied embeddings) are filled once, by either name.

    Raises:
        ValueError: `param_inits` and the parameters do not cover each other, or a distribution leaves a parameter as it was.
    """
    device = torch.device(device)
    buffer_device = device if buffer_device is None else torch.device(buffer_device)
    initializable = cast(Initializable, model)
    inits = initializable.param_inits()
    named = _match(model, inits)
    materialize(model, device, buffer_device)
    for name, parameter in named.items():
        _fill(parameter, inits[name], f"{seed}/{name}")
    initializable.init_buffers(buffer_device)


def _match(model: nn.Module, inits: Mapping[str, Fill]) -> dict[str, nn.Parameter]:
    """Return each parameter once, under the one of its names that `inits` knows."""
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    unknown = inits.keys() - {name for names in names_of.values() for name in names}
    if unknown:
        raise ValueError(
            f"{type(model).__name__}.param_inits() names what is no parameter: {', '.join(sorted(unknown))}"
        )
    matched = {next((n for n in names if n in inits), names[0]): parameter for parameter, names in names_of.items()}
    missing = [name for name in matched if name not in inits]
    if missing:
        raise ValueError(f"{type(model).__name__}.param_inits() has no entry for: {', '.join(missing)}")
    return matched


def materialize(model: nn.Module, device: torch.device, buffer_device: torch.device) -> None:
    """Give parameters and buffers uninitialized memory. Shared parameters stay shared, unlike in `Module.to_empty`."""
    for parameter in model.parameters():
        if parameter.device != device:
            empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != buffer_device:
                module._buffers[name] = torch.empty_like(buffer, device=buffer_device)


def _fill(parameter: torch.Tensor, init: Fill, seed_name: str) -> None:
    """Fill this rank's part of a parameter with its part of the numbers that the whole parameter would get."""
    shape = parameter.shape
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local_shape, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        assert tuple(local.shape) == tuple(local_shape), f"local part {local.shape}, expected {local_shape}"
    else:
        local, offset = parameter.data, (0,) * len(shape)
    if local.numel() == 0:
        return
    # A parameter of no dims is a row of one.
    rows, row_shape = (shape[0], shape[1:]) if shape else (1, shape)
    local = local.view(local.shape or (1,))
    begin = offset[0] if offset else 0
    end = begin + local.shape[0]
    columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], local.shape[1:], strict=True))
    block_rows = max(1, _BLOCK_ELEMENTS // max(1, row_shape.numel()))
    for block in range(begin // block_rows, (end - 1) // block_rows + 1):
        block_begin = block * block_rows
        block_end = min(block_begin + block_rows, rows)
        values = torch.empty((block_end - block_begin, *row_shape), dtype=torch.float32, device=local.device)
        version = values._version
        init.fill_(values, generator=_get_generator(f"{seed_name}/{block}", local.device))
        if values._version == version:
            raise ValueError(
                f"the distribution of {seed_name.partition('/')[2]}, {init!r}, writes nothing: its fill_ must work in place"
            )
        low, high = max(begin, block_begin), min(end, block_end)
        local[low - begin : high - begin].copy_(values[(slice(low - block_begin, high - block_begin), *columns)])


def _get_generator(name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
