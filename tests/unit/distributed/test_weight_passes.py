"""The order of a graph, to which unit a node belongs, and versions of torch. What the passes make of real graphs is tested on several ranks."""

import pytest
import torch
from torch import fx

from trainer.config.errors import UserError
from trainer.distributed.compiler_versions import check_torch
from trainer.distributed.weight_passes import WeightPasses, sort

PASSES = WeightPasses(
    shard_groups=frozenset({"1"}),
    replicate_groups=frozenset(),
    units=(("tok_embeddings",), ("layers.1",), ("layers.10",), ("norm", "output")),
    kept=frozenset({3, 4}),
    joins=True,
)


def _build_graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {name: graph.call_function(torch.neg, (x,), name=name) for name in "abc"}
    nodes["d"] = graph.call_function(torch.add, (nodes["a"], nodes["c"]), name="d")
    graph.output(nodes["d"])
    return graph, nodes


def _names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("after", "expected"),
    [({}, "abcd"), ({"a": "b"}, "bacd"), ({"a": "c", "b": "d"}, "cadb"), ({"a": "bc"}, "bcad")],
)
def test_sort_moves_only_what_has_to_wait(after: dict[str, str], expected: str) -> None:
    graph, nodes = _build_graph()
    sort(graph, {nodes[name]: [nodes[source] for source in sources] for name, sources in after.items()})
    graph.lint()
    assert _names(graph) == list(expected)


def test_sort_refuses_what_waits_for_itself() -> None:
    graph, nodes = _build_graph()
    with pytest.raises(RuntimeError, match="wait for each other"):
        sort(graph, {nodes["a"]: [nodes["d"]]})


@pytest.mark.parametrize(
    ("key", "path", "unit"),
    [
        ("nn_module_stack", "L['self'].tok_embeddings", 0),
        ("nn_module_stack", "L['self'].layers.1.attention.wq", 1),
        ("fwd_nn_module_stack", "L['self'].layers.10.attention_norm", 2),
        ("nn_module_stack", "L['self']._modules['layers']._modules['10'].ffn_norm", 2),
        ("nn_module_stack", "L['self'].output", 3),
        ("nn_module_stack", "L['self'].elsewhere", 4),
        ("stack_trace", "", 4),
    ],
)
def test_node_belongs_to_the_unit_of_its_module(key: str, path: str, unit: int) -> None:
    _, nodes = _build_graph()
    nodes["a"].meta[key] = {"outer": ("L['self']", object), "inner": (path, object)}
    assert PASSES.find_unit(nodes["a"]) == unit


def test_graph_that_gathers_nothing_is_refused() -> None:
    graph, _ = _build_graph()
    with pytest.raises(RuntimeError, match=r"tok_embeddings.*layers\.10.*output"):
        PASSES.change_joint(fx.GraphModule(torch.nn.Module(), graph))


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0", "2.13.1+cpu"])
def test_known_versions_pass(version: str) -> None:
    check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.12.1", "2.14.0", "2.130.0", "3.0"])
def test_unknown_versions_fail_with_a_way_out(version: str) -> None:
    with pytest.raises(UserError, match=f"this is torch {version}.*fsdp2"):
        check_torch(version)
