"""Which results of a graph come to exist, and when they are freed."""

import sympy
import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx.experimental.proxy_tensor import make_fx

from trainer.components.loss import ACCUMULATE_WEIGHT_GRADIENT
from trainer.planner.graph_plan import count_bytes, example_of, get_call, list_kernels, list_written
from trainer.planner.operations import sizes_known


def trace(function, *shapes):
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    return make_fx(function, tracing_mode="fake")(*inputs).graph


def test_only_what_products_read_and_what_is_returned_exists():
    def f(x, w):
        return ((x.exp() + 1).sigmoid() @ w).relu() * 2

    kernels = list_kernels(trace(f, (4, 8), (8, 2)))
    assert [(kernel.node.target.__name__, kernel.is_fused) for kernel in kernels] == [
        ("sigmoid.default", True),
        ("mm.default", False),
        ("mul.Tensor", True),
    ]
    first, product, last = kernels
    assert [node.name for node in first.frees] == ["x_1"]
    assert [node.name for node in product.frees] == ["sigmoid", "w_1"]
    assert [node.name for node in last.frees] == ["mm"]


def test_views_keep_what_they_look_at():
    def f(x, w):
        y = x @ w
        return y.t()[:1], y.exp()

    kernels = list_kernels(trace(f, (4, 8), (8, 2)))
    assert [kernel.node.target.__name__ for kernel in kernels] == ["mm.default", "exp.default"]
    assert kernels[1].frees == []


def test_kernels_in_a_row_read_what_they_share_once():
    def f(x):
        return x.exp(), x.sin()

    first, second = list_kernels(trace(f, (4, 8)))
    assert (first.shared_reads, second.shared_reads) == (0, 4 * 8 * 4)


def test_of_a_part_only_its_bytes_are_read():
    def f(x):
        return x[:1].exp(), x[:3].sin() + x[1:].cos()

    first, second = list_kernels(trace(f, (4, 8)))
    assert (sum(first.reads.values()), sum(second.reads.values())) == (8 * 4, 4 * 8 * 4)
    assert first.reads.keys() == second.reads.keys()


def test_sizes_that_a_graph_leaves_open_are_no_kernels_and_are_counted_as_they_are_known():
    def f(x, w):
        rows = x.shape[0] * 2
        return x.new_zeros(rows, 2) + (x @ w).repeat(2, 1), rows

    inputs = [torch.empty(shape, device="meta") for shape in ((4, 8), (8, 2))]
    graph = make_fx(f, tracing_mode="symbolic")(*inputs).graph
    product, result = list_kernels(graph)
    assert (count_bytes(product.node), count_bytes(result.node)) == (4 * 2 * 4, 8 * 2 * 4)
    (symbol,) = example_of(product.node).shape[0].node.expr.free_symbols
    with sizes_known({symbol: sympy.Integer(100)}):
        assert (count_bytes(product.node), count_bytes(result.node)) == (100 * 2 * 4, 200 * 2 * 4)


def test_operation_that_writes_in_place_is_found_inside_of_what_the_compiler_makes_of_it():
    graph = fx.Graph()
    hidden, total, dlogits = map(graph.placeholder, ("hidden", "total", "dlogits"))
    kwargs = {"dlogits": dlogits, "hidden": hidden, "_total_base_index": 0, "_all_bases": [total]}
    node = graph.call_function(auto_functionalized_v2, (ACCUMULATE_WEIGHT_GRADIENT,), kwargs)
    assert get_call(node) == (ACCUMULATE_WEIGHT_GRADIENT, (total, dlogits, hidden))
    assert list_written(node) == [total]
    assert list_written(graph.call_function(torch.ops.aten.neg.default, (hidden,))) == []
