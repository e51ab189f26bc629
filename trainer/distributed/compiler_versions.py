"""All that differs between the versions of torch in what SimpleFSDP asks of the compiler, and the private names that it asks by."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx

from trainer.config.errors import UserError

# Tried on each of these. The passes work on graphs whose form torch promises to nobody.
_SUPPORTED = ("2.11", "2.13")


def check_torch(version: str = torch.__version__) -> None:
    """Check that the passes were tried on this torch.

    Raises:
        UserError: they were not.
    """
    if not version.startswith(tuple(f"{supported}." for supported in _SUPPORTED)):
        raise UserError(
            f"parallelism.data_parallel_implementation = 'simple_fsdp' with compile.enable was tried on torch "
            f"{' and '.join(_SUPPORTED)}, and this is torch {version}: its graphs may have another form. Set 'fsdp2', or compile.enable "
            "= false, or add the version to trainer/distributed/compiler_versions.py once the tests of SimpleFSDP pass on it"
        )


def changing_joint_graph(change: Callable[..., fx.GraphModule]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which each joint graph of forward and backward is given to `change`."""
    return functorch_config.patch("joint_custom_pass", change)


def overlap_automatically(gm: fx.GraphModule) -> None:
    """Join and reorder the collectives of a forward or backward graph, in place, by torch's own estimates of times."""
    from torch._inductor.fx_passes.overlap_scheduling import schedule_overlap_bucketing

    with _estimates_without_gpu():
        schedule_overlap_bucketing(gm, collective_bucketing=True, **_get_estimators())
    gm.recompile()


def overlap_automatically_in_inductor() -> None:
    """The same as a part of inductor, from now on in this process."""
    options = inductor_config.aten_distributed_optimizations
    options.enable_overlap_scheduling = True
    options.collective_bucketing = True
    options.insert_overlap_deps = True
    for name, value in _get_estimators().items():
        setattr(options, name, value)


def _get_estimators() -> dict[str, Any]:
    # Measured times differ between ranks, whose orders of collectives must not. 2.11 brings them into line itself; it cannot do
    # without a GPU.
    measures = torch.__version__.startswith("2.13.")
    return {"compute_estimator": "analytical"} if measures else {}


@contextlib.contextmanager
def _estimates_without_gpu() -> Any:
    """Both versions ask triton for the memory bandwidth, which the CPU builds do not have."""
    if torch.cuda.is_available():
        yield
        return
    import torch._inductor.utils as inductor_utils
    import torch.utils._runtime_estimation as estimation

    modules: tuple[Any, ...] = (estimation, inductor_utils)
    asked = inductor_utils.get_gpu_dram_gbps
    for module in modules:
        module.get_gpu_dram_gbps = lambda: 100
    try:
        yield
    finally:
        for module in modules:
            module.get_gpu_dram_gbps = asked


def keep_order(graph: fx.Graph, after: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
    """Tell inductor, which would bring nodes into an order of its own, what comes after what."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    preserve_node_ordering(graph, {node: OrderedSet(sources) for node, sources in after.items()})
