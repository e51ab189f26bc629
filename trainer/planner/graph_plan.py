"""What a compiled graph does on a GPU, in kernels: which tensors come to exist, when they are freed, what is computed.

Inductor fuses elementwise operations and reductions, so that most results of a graph are never in memory. A result is, here, if
the graph returns it, or if an operation reads it that is not fused: matrix products, attention, sorting, communication. The others
are computed where they are used. Kernels run in the order of the graph, and what nobody reads any more is freed at once, as
Inductor's generated code does.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from trainer.planner.operations import list_tensors, sum_bytes

_ATEN = torch.ops.aten

_UNFUSED = {
    _ATEN.mm,
    _ATEN.addmm,
    _ATEN.bmm,
    _ATEN.baddbmm,
    _ATEN._scaled_mm,
    _ATEN._grouped_mm,
    _ATEN._scaled_grouped_mm,
    _ATEN.convolution,
    _ATEN.sort,
    _ATEN.topk,
    _ATEN.scatter,
    _ATEN.scatter_add,
    _ATEN.index_put,
    _ATEN.cumsum,
    _ATEN.embedding_dense_backward,
    _ATEN._scaled_dot_product_cudnn_attention,
    _ATEN._scaled_dot_product_cudnn_attention_backward,
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_backward,
    _ATEN._scaled_dot_product_efficient_attention,
    _ATEN._scaled_dot_product_efficient_attention_backward,
}


@dataclass
class Kernel:
    """One step of a graph."""

    node: fx.Node
    is_fused: bool
    reads: dict[fx.Node, int] = field(default_factory=dict)
    """What has to be in memory, results of other kernels or inputs, and how many bytes of each are read."""
    frees: list[fx.Node] = field(default_factory=list)
    """What nobody reads after this."""
    shared: list[fx.Node] = field(default_factory=list)
    """What the fused kernels before have read or made as well: they are one in truth."""

    @property
    def shared_reads(self) -> int:
        """Bytes of that."""
        return sum(self.reads[node] for node in self.shared)


def is_view(node: fx.Node) -> bool:
    """Whether a result is another look at its first argument."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    packet = target.overloadpacket
    return target.is_view or packet in (_ATEN._unsafe_view, _ATEN.reshape, _ATEN.alias, _ATEN.detach, _ATEN.lift_fresh)


def is_unfused(node: fx.Node) -> bool:
    """Whether an operation is a kernel of its own, called with whole tensors."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True  # a higher-order operation
    return target.namespace not in ("aten", "prims") or target.overloadpacket in _UNFUSED


def is_number(node: fx.Node) -> bool:
    """Whether a node stands for a size, which the host knows, and no tensor."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def base_of(node: fx.Node) -> fx.Node:
    """Return what a chain of views looks at."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def list_kernels(graph: fx.Graph) -> list[Kernel]:
    """Return the kernels of a graph, in order."""
    output = next(node for node in graph.nodes if node.op == "output")
    returned = {base_of(node) for node in output.all_input_nodes}
    in_memory = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")} | returned
    calls = [node for node in graph.nodes if node.op == "call_function" and not is_view(node) and not is_number(node)]
    for node in calls:
        if is_unfused(node):
            in_memory.add(node)
            in_memory.update(base_of(arg) for arg in node.all_input_nodes if not is_number(arg))
        elif _writes_in_place(node):
            in_memory.add(node)
    sources: dict[fx.Node, frozenset[fx.Node]] = {}  # views, which may be of a part
    kernels: list[Kernel] = []
    for node in calls:
        views: set[fx.Node] = set()
        for arg in (arg for arg in node.all_input_nodes if not is_number(arg)):
            views |= {arg} if base_of(arg) in in_memory else sources[base_of(arg)]
        if node in in_memory:
            kernels.append(Kernel(node, not is_unfused(node), _count_reads(views)))
        else:
            sources[node] = frozenset(views)
    _find_last_reads(kernels, returned)
    _find_shared_reads(kernels)
    return kernels


def _count_reads(views: set[fx.Node]) -> dict[fx.Node, int]:
    """Return what views look at, and how many bytes of it they show. Of what several show it is taken that they are different parts."""
    reads: dict[fx.Node, int] = {}
    for view in sorted(views, key=lambda node: node.name):
        base = base_of(view)
        reads[base] = min(reads.get(base, 0) + count_bytes(view), count_bytes(base))
    return reads


def _writes_in_place(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _find_last_reads(kernels: list[Kernel], returned: set[fx.Node]) -> None:
    seen = set(returned)
    for kernel in reversed(kernels):
        for node in (*kernel.reads, kernel.node):
            if node not in seen:
                seen.add(node)
                kernel.frees.append(node)


def _find_shared_reads(kernels: list[Kernel]) -> None:
    """Fused kernels in a row that read the same are one: what they share is read once."""
    run: set[fx.Node] = set()
    for kernel in kernels:
        if not kernel.is_fused:
            run = set()
            continue
        kernel.shared = [node for node in kernel.reads if node in run]
        run |= {*kernel.reads, kernel.node}


def example_of(node: fx.Node) -> Any:
    """Return what a node stands for: a fake tensor, or several. Of what the graph does not say, as much as its parts do."""
    value = node.meta.get("val")
    if value is not None:
        return value
    parts: dict[Any, Any] = {user.args[1]: example_of(user) for user in node.users if user.target is operator.getitem}
    return tuple(parts.get(place) for place in range(1 + max(parts))) if parts else None


def count_bytes(node: fx.Node) -> int:
    """Return the bytes of what a node stands for."""
    return sum_bytes(list_tensors(example_of(node)))


def get_call(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the operation of a kernel, and all its arguments: that inside, where random numbers are kept for recomputation, or where the
    compiler has one that writes in place return what it has written.
    """
    args = (*node.args, *node.kwargs.values())
    name = getattr(node.target, "_name", "")
    if name == "run_and_save_rng_state":
        return args[0], args[1:]
    if name == "run_with_rng_state":
        return args[1], args[2:]
    if name == _WRITING:
        operation: Any = node.args[0]
        given: dict[str, Any] = dict(node.kwargs)
        for key, place in node.kwargs.items():
            if key.endswith(_PLACE):
                given[key[1 : -len(_PLACE)]] = given["_all_bases"][place]
        return operation, tuple(given[argument.name] for argument in operation._schema.arguments)
    return node.target, args


def list_written(node: fx.Node) -> list[Any]:
    """Return what an operation writes to in place that the compiler has return it: the last of its results."""
    bases: Any = node.kwargs["_all_bases"] if getattr(node.target, "_name", "") == _WRITING else ()
    return list(bases)


_WRITING = "auto_functionalized_v2"
_PLACE = "_base_index"
