"""A backend of torch.compile that compiles nothing: graphs are cut into forward and backward as Inductor cuts them, and "run" on
fake tensors kernel by kernel, so that what they keep and what they need is known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table

from trainer.distributed.weight_passes import WeightPasses
from trainer.planner.graph_plan import (
    Kernel,
    base_of,
    count_bytes,
    example_of,
    get_call,
    is_number,
    is_view,
    list_kernels,
    list_written,
)
from trainer.planner.network import Transfer, describe_collective, list_inner_transfers
from trainer.planner.operations import Work, as_number, describe, sizes_known
from trainer.planner.recorder import Recorder

Backend = Callable[..., Any]


def build_backend(recorder: Recorder, passes: WeightPasses | None = None) -> Backend:
    """Return the backend, which leaves its traces in `recorder`. passes: over graphs that gather weights"""

    def compile_graph(module: fx.GraphModule, _: Sequence[Any]) -> Callable[[list[Any]], Any]:
        if passes is not None and passes.joins:
            passes.order(module.graph)
        graph = _PlannedGraph(module, recorder)

        def run(args: list[Any]) -> Any:
            return graph.run(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        inference_compiler=compile_graph,
        partition_fn=partition_fn,
        decompositions=select_decomp_table,
    )


class _PlannedGraph:
    """One graph, forward or backward."""

    def __init__(self, module: fx.GraphModule, recorder: Recorder) -> None:
        graph = module.graph
        self._recorder = recorder
        self._module = module
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._constants = [node for node in graph.nodes if node.op == "get_attr"]
        self._output = next(node for node in graph.nodes if node.op == "output")
        self._kernels = list_kernels(graph)
        self._steps: dict[tuple[int, ...], list[_Step]] = {}
        """By the sizes that the graph leaves open."""
        self._arrivals: dict[fx.Node, float] = {}
        """When collectives under way will be done."""

    def run(self, args: list[Any]) -> list[Any]:
        """Take the steps of the graph. args: its inputs, which are let go of where the graph reads them last."""
        values: dict[fx.Node, Any] = dict(zip(self._inputs, args, strict=True))
        args.clear()
        for node in self._constants:
            values[node] = getattr(self._module, str(node.target))
        sizes = _find_sizes(values)
        with sizes_known(sizes):
            return self._take_steps(values, tuple(map(int, sizes.values())))

    def _take_steps(self, values: dict[fx.Node, Any], sizes: tuple[int, ...]) -> list[Any]:
        if sizes not in self._steps:
            self._steps[sizes] = [
                (kernel, _describe_kernel(kernel), _list_inner_transfers(kernel)) for kernel in self._kernels
            ]
        for kernel, work, transfers in self._steps[sizes]:
            node = kernel.node
            if work is None:
                self._communicate(node, values)
            else:
                values[node] = self._make_result(node, values)
                self._recorder.spend(work)
            for transfer in transfers:
                self._recorder.send(transfer, waits=True)
            for gone in kernel.frees:
                values.pop(gone, None)
        return [self._look(part, values) for part in self._output.args[0]]

    def _make_result(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return self._look(node.all_input_nodes[0], values)
        written = list_written(node)
        if written:
            return *example_of(node)[: -len(written)], *(self._write_to(base, values) for base in written)
        return self._make(example_of(node))

    def _write_to(self, base: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Return what is written to in place: of an input a copy, as Inductor does."""
        return self._make(example_of(base)) if base_of(base).op == "placeholder" else self._look(base, values)

    def _make(self, example: Any) -> Any:
        if isinstance(example, tuple | list):
            return tuple(self._make(part) for part in example)
        if not isinstance(example, Tensor):
            return example
        shape, stride = (tuple(map(as_number, sizes)) for sizes in (example.shape, example.stride()))
        return self._recorder.make(shape, stride, example.dtype)

    def _communicate(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """A collective, or the wait for it."""
        if getattr(node.target, "overloadpacket", None) is torch.ops._c10d_functional.wait_tensor:
            start = node.all_input_nodes[0]
            values[node] = self._look(start, values)
            compute = self._recorder.streams.current
            compute.clock = max(compute.clock, self._arrivals.pop(start, 0.0))
            return
        values[node] = self._make_result(node, values)
        transfer = describe_collective(node.target, fx.map_arg(node.args, example_of), dict(node.kwargs))
        if transfer is not None:
            self._arrivals[node] = self._recorder.send(transfer, waits=False)

    def _look(self, part: Any, values: dict[fx.Node, Any]) -> Any:
        """Return the value of what a graph returns: a result, or a view of one."""
        if not isinstance(part, fx.Node):
            return part
        if is_number(part):
            return as_number(example_of(part))
        if part in values:
            return values[part]
        assert is_view(part), f"{part} was not kept"
        args = fx.map_arg(part.args, lambda node: self._look(node, values))
        kwargs = fx.map_arg(part.kwargs, lambda node: self._look(node, values))
        return part.target(*args, **kwargs)  # type: ignore[operator]


_Step = tuple[Kernel, Work | None, list[Transfer]]


def _find_sizes(values: dict[fx.Node, Any]) -> dict[Any, sympy.Integer]:
    """Return the numbers that the symbols in a graph's inputs stand for."""
    sizes: dict[Any, sympy.Integer] = {}
    for node, value in values.items():
        example = example_of(node)
        if isinstance(example, torch.SymInt):
            _note_size(sizes, example, value)
        elif isinstance(example, Tensor):
            for size, number in zip(example.shape, value.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    _note_size(sizes, size, number)
    return sizes


def _note_size(sizes: dict[Any, sympy.Integer], size: torch.SymInt, number: int) -> None:
    if size.node.expr.is_symbol:
        sizes[size.node.expr] = sympy.Integer(number)


def _list_inner_transfers(kernel: Kernel) -> list[Transfer]:
    return [] if kernel.is_fused else list_inner_transfers(kernel.node.target, fx.map_arg(kernel.node.args, example_of))


def _describe_kernel(kernel: Kernel) -> Work | None:
    """Return the work of a kernel; None for communication."""
    node = kernel.node
    target = node.target
    if getattr(target, "namespace", "") == "_c10d_functional":
        return None
    if kernel.is_fused:
        size = count_bytes(node) + sum(kernel.reads.values()) - kernel.shared_reads
        return Work("memory", bytes=max(size, 0), name=f"fused {node.name}")
    operation, args = get_call(node)
    return describe(operation, fx.map_arg(args, example_of), example_of(node), name=node.name)
