"""Ways for rows to travel to experts on other ranks, by `parallelism.expert_parallel_comm_backend`."""

from collections.abc import Callable

from models.common.token_dispatch import TokenDispatcher
from trainer.distributed.expert_dispatch import ExchangingDispatcher
from trainer.distributed.tensor_collectives import TensorAxis

ExpertBackend = Callable[[TensorAxis], TokenDispatcher]
"""Makes a mixture's dispatcher (`TokenDispatcher` says what it has to do) for the ranks of ep."""


def _build_deepep(axis: TensorAxis) -> TokenDispatcher:
    from trainer.distributed.deepep import DeepEPDispatcher  # which imports a package that few have

    return DeepEPDispatcher(axis)


_BACKENDS: dict[str, ExpertBackend] = {"standard": ExchangingDispatcher, "deepep": _build_deepep}


def register_expert_backend(name: str, backend: ExpertBackend) -> None:
    """Add a way for rows to travel to the table, for use as `parallelism.expert_parallel_comm_backend`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _BACKENDS:
        raise ValueError(f"a way for rows to travel named {name!r} is already registered")
    _BACKENDS[name] = backend


def get_expert_backend(name: str) -> ExpertBackend:
    """Look a way for rows to travel up in the table.

    Raises:
        ValueError: the name is unknown. The message lists the known ones.
    """
    if name not in _BACKENDS:
        raise ValueError(
            f"parallelism.expert_parallel_comm_backend = {name}: unknown. Known: {', '.join(_BACKENDS)}. One of your own is "
            "registered with register_expert_backend by the module that experimental.custom_import names"
        )
    return _BACKENDS[name]
