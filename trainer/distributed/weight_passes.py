"""What becomes of SimpleFSDP's gathers and reductions in a compiled graph: freed after forward or kept, joined by unit, moved apart.

Two passes. The first works on the joint graph, before it is cut into forward and backward: it joins the collectives of each unit
into one, and marks what backward shall gather anew, where nothing else would tell the partitioner. The second orders each of the two
graphs: a unit's gather starts before the one before it is waited for, a reduction is waited for once the next has started. So does
FSDP2 by its streams and hooks.
"""

import heapq
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

logger = logging.getLogger(__name__)

_functional = torch.ops._c10d_functional
GATHER = _functional.all_gather_into_tensor.default
SCATTER = _functional.reduce_scatter_tensor.default
REDUCE = _functional.all_reduce.default
WAIT = _functional.wait_tensor.default

_aten = torch.ops.aten

# What makes a weight of what was gathered, and can be made again at no cost worth a gathered weight's memory.
_RESHAPING = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.slice.Tensor,
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.clone.default,
    _aten.alias.default,
    _aten.view.dtype,
}

# Larger than that of any region of activation checkpointing, whose rules would else be applied to what is marked here.
_REGION = 1_000_000

Dependencies = dict[fx.Node, list[fx.Node]]
"""Nodes, and what they have to come after besides what they compute with."""


@dataclass(frozen=True)
class WeightPasses:
    """The passes over the graphs of one run."""

    shard_groups: frozenset[str]
    """Names of the process groups that weights are gathered over."""
    replicate_groups: frozenset[str]
    """Names of those that hold copies."""
    units: tuple[tuple[str, ...], ...]
    """Paths of the modules of each unit, in the order of forward, where one graph has them all. Empty: each graph is a unit."""
    kept: frozenset[int]
    """Units whose weights stay gathered from forward to backward, by their place in `units`. `len(units)` is what is in none."""
    joins: bool
    """Whether to join the collectives of a unit, and to order them."""
    gathers_all: bool = True
    """Whether there is no graph without a weight that is sharded, such as those of experts that are each on one rank."""

    def change_joint(self, gm: fx.GraphModule, _: Any = None) -> fx.GraphModule:
        """Join and mark collectives in a joint graph, in place, and return it.

        Raises:
            RuntimeError: weights are sharded, but some unit gathers none here, so that nothing would be freed or joined.
        """
        graph = gm.graph
        gathers = self.list_collectives(graph, GATHER)
        count = len(gathers)
        if self.shard_groups and self.gathers_all:
            self._check_found(gathers, self.list_collectives(graph, SCATTER))
        if self.joins:
            gathers = [self._join(graph, nodes, join_gathers) for nodes in self._group(gathers)]
            for target, join in ((SCATTER, join_scatters), (REDUCE, join_reduces)):
                for of_unit in self._group(self.list_collectives(graph, target)):
                    self._join(graph, of_unit, join)
            sort(graph, {})
        for node in gathers:
            self._mark(node)
        graph.lint()
        gm.recompile()
        logger.info("a compiled graph gathers %d weights by %d collectives", count, len(gathers))
        return gm

    def order(self, graph: fx.Graph) -> Dependencies:
        """Move collectives apart in a forward or backward graph, in place. Return what comes after what for that reason."""
        after: Dependencies = {}
        for target in (GATHER, SCATTER, REDUCE):
            for start, following in itertools.pairwise(self.list_collectives(graph, target)):
                after[_get_wait(start)] = [following]
        sort(graph, after)
        graph.lint()
        return after

    def list_collectives(self, graph: fx.Graph, target: Any) -> list[fx.Node]:
        """Return the nodes that gather weights, or reduce their gradients, in the order of the graph.

        Context parallelism may gather keys, and reduce their gradients, over the very same ranks: these come of weights that were
        gathered, and go into gradients that will be reduced.
        """
        groups = self.replicate_groups if target is REDUCE else self.shard_groups
        found = [node for node in graph.nodes if node.target is target and node.args[-1] in groups]
        if target is GATHER:
            others = _spread(graph.nodes, found, lambda node: node.all_input_nodes)
        elif target is SCATTER:
            others = _spread(reversed(graph.nodes), found, lambda node: node.users)
        else:
            others = set()
        return [node for node in found if node not in others]

    def find_unit(self, node: fx.Node) -> int:
        """Return the place in `units` of the one that a node belongs to."""
        path = _get_path(node)
        for place, names in enumerate(self.units):
            if any(path == name or path.startswith(f"{name}.") for name in names):
                return place
        return len(self.units)

    def _check_found(self, gathers: Sequence[fx.Node], scatters: Sequence[fx.Node]) -> None:
        found = {self.find_unit(node) for node in gathers}
        strays = [node for node in scatters if self.find_unit(node) not in found]
        expected = range(len(self.units)) if self.units else (0,)
        missing = [self.units[place] if self.units else "its block" for place in expected if place not in found]
        if missing or strays:
            missing += map(_get_path, strays)
            raise RuntimeError(
                f"SimpleFSDP finds no weights gathered in a compiled graph for: {', '.join(map(str, missing))}. Nothing of them would "
                "be freed after forward, or joined: the module's forward may read weights by another way than its attributes, or "
                "this torch describes the modules of a graph in another way. Set compile.enable = false, or "
                "parallelism.data_parallel_implementation = fsdp2"
            )

    def _group(self, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """Return the collectives that can be one: of one unit, dtype and process group."""
        groups: dict[Any, list[fx.Node]] = {}
        for node in nodes:
            key = (self.find_unit(node), node.args[1:], node.meta["val"].dtype)
            groups.setdefault(key, []).append(node)
        return list(groups.values())

    def _join(self, graph: fx.Graph, nodes: list[fx.Node], join: "Callable[[_Builder, list[fx.Node]], Any]") -> fx.Node:
        if len(nodes) == 1:
            return nodes[0]
        builder = _Builder(graph, nodes)
        start, results = join(builder, nodes)
        for node, result in zip(nodes, results, strict=True):
            wait = _get_wait(node)
            wait.replace_all_uses_with(result)
            graph.erase_node(wait)
            graph.erase_node(node)
        return start

    def _mark(self, gather: fx.Node) -> None:
        """Say whether backward gathers a weight anew, or forward keeps it: all that is between its shard and its first use."""
        keeps = self.find_unit(gather) in self.kept
        made = [*_list_upstream(gather), gather]
        stack = [gather]
        while stack:
            for user in stack.pop().users:
                if user.target is WAIT or user.target in _RESHAPING:
                    made.append(user)
                    stack.append(user)
        for node in made:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = _REGION


# Joining.


class _Builder:
    """Adds nodes to a graph, in place of some that are to be one."""

    def __init__(self, graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
        self.graph = graph
        self.anchor = nodes[-1]
        self.meta = {key: value for key, value in nodes[0].meta.items() if key not in ("val", "tensor_meta")}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call, and work out the shape of what it returns."""
        with self.graph.inserting_after(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        values, its_kwargs = fx.map_arg((args, kwargs), lambda argument: argument.meta["val"])
        node.meta = {**self.meta, "val": target(*values, **its_kwargs)}
        self.anchor = node
        return node


def join_gathers(build: _Builder, nodes: Sequence[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """Gather several shards as one: (ranks, all shards), of which each weight is some columns."""
    _, ranks, group = nodes[0].args
    shards = [node.args[0] for node in nodes]
    packed = build(_aten.cat.default, [build(_aten.view.default, shard, [-1]) for shard in shards])
    start = build(GATHER, packed, ranks, group)
    rows = build(_aten.view.default, build(WAIT, start), [ranks, -1])
    results = []
    for node, (begin, end) in zip(nodes, _list_ranges(shards), strict=True):
        columns = build(_aten.slice.Tensor, rows, 1, begin, end)
        whole = build(_aten.clone.default, columns, memory_format=torch.contiguous_format)
        results.append(build(_aten.view.default, whole, list(node.meta["val"].shape)))
    return start, results


def join_scatters(build: _Builder, nodes: Sequence[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """Reduce-scatter several gradients as one: (ranks, all shards), to a row of which each shard is a part."""
    _, operation, ranks, group = nodes[0].args
    rows = [build(_aten.view.default, node.args[0], [ranks, -1]) for node in nodes]
    packed = build(_aten.view.default, build(_aten.cat.default, rows, 1), [-1])
    start = build(SCATTER, packed, operation, ranks, group)
    return start, _unpack(build, build(WAIT, start), nodes)


def join_reduces(build: _Builder, nodes: Sequence[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """All-reduce several tensors as one."""
    _, operation, group = nodes[0].args
    packed = build(_aten.cat.default, [build(_aten.view.default, node.args[0], [-1]) for node in nodes])
    start = build(REDUCE, packed, operation, group)
    return start, _unpack(build, build(WAIT, start), nodes)


def _unpack(build: _Builder, packed: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the parts of one row, in the shapes of these nodes."""
    parts = [build(_aten.slice.Tensor, packed, 0, begin, end) for begin, end in _list_ranges(nodes)]
    shapes = [list(node.meta["val"].shape) for node in nodes]
    return [build(_aten.view.default, part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _list_ranges(nodes: Sequence[Any]) -> list[tuple[int, int]]:
    """Return begin and end of each node's elements, one after the other."""
    ends = [0]
    for node in nodes:
        ends.append(ends[-1] + node.meta["val"].numel())
    return list(itertools.pairwise(ends))


# Graphs.


def _get_path(node: fx.Node) -> str:
    """Return the path of the module whose forward made a node, or a gradient's, as far as the graph tells."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return ".".join(part for part in re.findall(r"\w+", path) if part not in ("L", "self", "_modules"))


def _get_wait(start: fx.Node) -> fx.Node:
    waits = [user for user in start.users if user.target is WAIT]
    assert len(waits) == len(start.users) == 1, f"{start} is waited for {len(waits)} times, by {list(start.users)}"
    return waits[0]


def _spread(
    nodes: Iterable[fx.Node], sources: Sequence[fx.Node], get_neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """Return the nodes that have a source before them, in the direction that `nodes` come in."""
    origins, reached = set(sources), set()
    for node in nodes:
        if any(neighbour in origins or neighbour in reached for neighbour in get_neighbours(node)):
            reached.add(node)
    return reached


def _list_upstream(node: fx.Node) -> list[fx.Node]:
    """Return all that a node is made of, but for the graph's inputs, and what ranks had to meet for: the scale of a float8 weight."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.op != "placeholder" and source.target is not WAIT and source not in found:
                found[source] = None
                stack.append(source)
    return list(found)


def sort(graph: fx.Graph, after: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
    """Bring nodes into an order that computes, and that keeps to `after`: else the one that they have.

    Raises:
        RuntimeError: there is none.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    sources = {node: {*node.all_input_nodes, *after.get(node, ())} for node in nodes}
    users: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node, its_sources in sources.items():
        for source in its_sources:
            users[source].append(node)
    missing = {node: len(its_sources) for node, its_sources in sources.items()}
    ready = [place[node] for node in nodes if not missing[node]]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in users[node]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])
    if len(order) != len(nodes):
        raise RuntimeError("SimpleFSDP cannot order a graph's collectives: some would have to wait for each other")
    last = graph._root
    for node in order:
        last.append(node)
        last = node
