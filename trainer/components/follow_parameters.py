"""An optimizer that was built before its model was sharded, made to train what the model has now.

FSDP2's `fully_shard` puts new parameters in place of old ones. An optimizer that holds the old ones trains nothing, says nothing, and
keeps the whole unsharded model in memory. The trainer of this program builds its optimizer afterwards; whoever brings a loop in which
it comes first (a Trainer of another library, say) shards inside of `follow_parameters`:

    optimizer = torch.optim.AdamW(model.parameters())
    with follow_parameters(model, optimizer):
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)

The same goes for tensor parallelism (`parallelize_module`) and for anything else that keeps the names of parameters. Hugging Face
accelerate does this within `Accelerator.prepare` (`_prepare_fsdp2`), by the addresses of the old parameters, for optimizers without
state; names also serve parameters that have no address yet, on the meta device. scripts/fsdp2_benchmark.py measures all ways.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from trainer.components.fqn import named_parameters


@dataclass
class _Place:
    """Where an optimizer keeps a parameter, and what it knows of it."""

    members: list[nn.Parameter]
    """The list `params` of the group. It stays the same object: some optimizers (LBFGS) hold it under another name, too."""
    index: int
    name: str
    state: dict[str, Any] = field(default_factory=dict)


@contextmanager
def follow_parameters(model: nn.Module, *optimizers: Optimizer) -> Iterator[None]:
    """Have optimizers of any kind hold those parameters that `model` has at the end of the `with` block, by name.

    Inside the block they hold none, so that memory of unsharded parameters is freed as soon as these are sharded. Groups, their
    settings and the order of parameters stay. State that is there already (Adagrad makes it at once, others at their first
    step) goes along: what has the shape of a parameter is sharded as that is, without communication.

    Not followed: hooks on parameters that a user registered, which stay on the old ones.

    Raises:
        ValueError: at the beginning, and before anything is changed, if an optimizer holds a parameter that is not the
            model's; at the end, if a parameter's name is gone, or its state cannot be sharded.
    """
    # All are found before the first is changed. No name here is bound to a parameter: that would keep it in memory.
    found = [(optimizer.state, _find_places(model, optimizer)) for optimizer in optimizers]
    for states, places in found:
        for place in places:
            _let_go(place, states)
    try:
        yield
    finally:
        parameters = dict(named_parameters(model))
        for states, places in found:
            for place in places:
                _take_hold(place, states, parameters)


def _find_places(model: nn.Module, optimizer: Optimizer) -> list[_Place]:
    names = {parameter: name for name, parameter in named_parameters(model)}
    places = []
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise ValueError(
                    f"{type(optimizer).__name__}: parameter {index} of group {number}, of shape {tuple(parameter.shape)}, is "
                    "none of the model's. Give follow_parameters the model that the optimizer was built for, not yet sharded"
                )
            places.append(_Place(group["params"], index, names[parameter]))
    return places


def _let_go(place: _Place, states: dict[Any, dict[str, Any]]) -> None:
    """Put an empty parameter in the place of the one that is there."""
    parameter = place.members[place.index]
    place.state = states.pop(parameter, {})
    place.members[place.index] = nn.Parameter(parameter.new_empty(0), requires_grad=parameter.requires_grad)


def _take_hold(place: _Place, states: dict[Any, dict[str, Any]], parameters: Mapping[str, nn.Parameter]) -> None:
    """Put in the parameter that now has the name, with its state."""
    if place.name not in parameters:
        raise ValueError(
            f"{place.name}: the model has no parameter of this name any more, so that its optimizer cannot follow it. Shard with "
            "what keeps names (fully_shard, parallelize_module, replicate), and rename outside of follow_parameters"
        )
    parameter = parameters[place.name]
    place.members[place.index] = parameter
    if place.state:
        states[parameter] = {key: _spread_like(value, parameter, place.name) for key, value in place.state.items()}


def _spread_like(value: Any, parameter: nn.Parameter, name: str) -> Any:
    """Return what an optimizer knows of a parameter, laid out as that is now. Every rank has the whole."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value
    if isinstance(value, DTensor):
        if (value.device_mesh, value.placements) == (parameter.device_mesh, parameter.placements):
            return value
        raise ValueError(f"{name}: its state is sharded already, and otherwise than the parameter: {value.placements}")
    if not all(type(placement) in (Shard, Replicate) for placement in parameter.placements):
        raise ValueError(
            f"{name}: state cannot be laid out as {parameter.placements}. Shard before the optimizer's first step"
        )
    with torch.no_grad():
        spread = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    # A shard may be a view of the whole, which it would keep in memory.
    local = spread.to_local().to(parameter.to_local().device, copy=True)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
