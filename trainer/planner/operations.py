"""What an operation asks of a device: floating-point operations by kind, bytes of memory, bytes on the network."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from models.common.grouped_mm import GROUPED_MM, GROUPED_MM_BACKWARD
from trainer.components.loss import ACCUMULATE_WEIGHT_GRADIENT
from trainer.distributed.sequence_collectives import get_group
from trainer.distributed.sharded_attention import OPERATION as SHARDED_ATTENTION

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """One kernel's. FLOPs count a multiply-add as two."""

    kind: str
    """matmul, float8 matmul, grouped matmul, attention, attention backward, memory, host copy (over PCIe), or host (on the CPU)."""
    flops: float = 0.0
    shape: tuple[int, ...] = ()
    """Of a matrix product: (M, N, K). Of attention: (queries, keys, head size)."""
    bytes: int = 0
    """Read and written."""
    name: str = ""
    """Of the operation."""


def describe(operation: Any, args: tuple[Any, ...], outputs: Any, *, name: str = "") -> Work:
    """Return the work of an operation that was called with `args`. Tensors need only have a shape and a dtype."""
    size = sum(sum_bytes(list_tensors(part)) for part in (args, outputs, _list_updated(operation, args)))
    packet = getattr(operation, "overloadpacket", operation)
    formula = _FORMULAS.get(packet)
    if formula is None:
        return Work("memory", bytes=size, name=name or str(packet))
    kind, flops, shape = formula(*args)
    return Work(kind, float(as_number(flops)), tuple(map(as_number, shape)), size, name or str(packet))


def _list_updated(operation: Any, args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments that an operation without results, such as a fused optimizer, reads and writes again."""
    if not isinstance(operation, torch._ops.OpOverload) or operation._schema.returns:
        return []
    return [
        value
        for argument, value in zip(operation._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.kwarg_only
    ]


def as_number(value: Any) -> Any:
    """Return a size as a number. In a graph that Dynamo made for several sizes it is made of symbols, which `sizes_known` has the
    values of; where it has not, they are those that the graph was traced with.
    """
    if isinstance(value, int | float):
        return value
    symbolic = value.node.expr
    known = symbolic.xreplace(_sizes) if _sizes else symbolic
    if not known.is_number:
        return value.node.hint
    return float(known) if isinstance(value, torch.SymFloat) else int(known)


@contextlib.contextmanager
def sizes_known(sizes: dict[Any, sympy.Integer]) -> Iterator[None]:
    """Have the symbols of a graph stand for these numbers."""
    _sizes.update(sizes)
    try:
        yield
    finally:
        for symbol in sizes:
            del _sizes[symbol]


_sizes: dict[Any, sympy.Integer] = {}


def list_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in arguments or results, of lists too, each once."""
    found: dict[int, Tensor] = {}
    _find_tensors(value, found)
    return list(found.values())


def _find_tensors(part: Any, found: dict[int, Tensor]) -> None:
    # No function inside `list_tensors`: one that calls itself is a circle of references, which would keep the tensors alive.
    if isinstance(part, Tensor):
        found[id(part)] = part
    elif isinstance(part, list | tuple):
        for item in part:
            _find_tensors(item, found)
    elif isinstance(part, dict):
        for item in part.values():
            _find_tensors(item, found)


def sum_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of tensors. An expanded one has those that are in memory."""
    return sum(_count_elements(x) * x.element_size() for x in tensors)


def _count_elements(x: Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= as_number(size) if as_number(stride) else 1
    return count


_Formula = Callable[..., tuple[str, float, tuple[int, ...]]]


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[str, float, tuple[int, ...]]:
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = a.shape[0] if a.dim() == 3 else 1
    kind = "matmul" if a.element_size() < 4 else "fp32 matmul"
    return kind, 2.0 * batch * m * n * k, (batch * m, n, k)


def _addmm(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> tuple[str, float, tuple[int, ...]]:
    return _mm(a, b)


def _scaled_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[str, float, tuple[int, ...]]:
    (m, k), n = a.shape, b.shape[-1]
    return "float8 matmul", 2.0 * m * n * k, (m, n, k)


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[str, float, tuple[int, ...]]:
    """Rows (R, I) with matrices (G, I, O); or columns (O, R) with rows (R, I), to (G, O, I)."""
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    return "grouped matmul", 2.0 * m * n * k, (m, n, k)


def _scaled_grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[str, float, tuple[int, ...]]:
    _kind, flops, shape = _grouped_mm(a, b)
    return "float8 matmul", flops, shape


def _own_grouped_mm(rows: Tensor, weights: Tensor, *_: Any) -> tuple[str, float, tuple[int, ...]]:
    shape = rows.shape[0], weights.shape[1], rows.shape[1]
    return "grouped matmul", 2.0 * shape[0] * shape[1] * shape[2], shape


def _own_grouped_mm_backward(grad: Tensor, rows: Tensor, *_: Any) -> tuple[str, float, tuple[int, ...]]:
    shape = grad.shape[0], rows.shape[1], grad.shape[1]
    return "grouped matmul", 4.0 * shape[0] * shape[1] * shape[2], shape


def _accumulate_weight_gradient(total: Tensor, dlogits: Tensor, *_: Any) -> tuple[str, float, tuple[int, ...]]:
    (vocab, dim), rows = total.shape, dlogits.shape[0]
    return "matmul", 2.0 * rows * vocab * dim, (vocab, dim, rows)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[str, float, tuple[int, ...]]:
    """Causal, of queries that are the whole sequence or a balanced part of it. q: (B, N, S, H); v: (B, M, T, V)"""
    batch, heads, seq, head_dim = q.shape
    keys = v.shape[2] / 2
    return "attention", 2.0 * batch * heads * seq * keys * (head_dim + v.shape[3]), (seq, v.shape[2], head_dim)


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> tuple[str, float, tuple[int, ...]]:
    """Five products for the forward pass' two: scores again, and gradients of scores, queries, keys and values."""
    _kind, flops, shape = _attention(q, k, v)
    head_dim, v_head_dim = q.shape[3], v.shape[3]
    return "attention backward", flops * (3 * head_dim + 2 * v_head_dim) / (head_dim + v_head_dim), shape


def _sharded(q: Tensor, k: Tensor, v: Tensor, group: str, *_: Any) -> tuple[str, float, tuple[int, ...]]:
    """q: (B, s, N, H); v: (B, s, M, V). With balanced parts each rank has its share of the causal triangle."""
    batch, seq, heads, head_dim = q.shape
    keys = seq * get_group(group).size()
    return "attention", 1.0 * batch * heads * seq * keys * (head_dim + v.shape[3]), (seq, keys, head_dim)


def _sharded_backward(
    _: Tensor, q: Tensor, k: Tensor, v: Tensor, __: Tensor, ___: Tensor, group: str, *____: Any
) -> tuple[str, float, tuple[int, ...]]:
    _kind, flops, shape = _sharded(q, k, v, group)
    head_dim, v_head_dim = q.shape[3], v.shape[3]
    return "attention backward", flops * (3 * head_dim + 2 * v_head_dim) / (head_dim + v_head_dim), shape


_FORMULAS: dict[Any, _Formula] = {
    _ATEN.mm: _mm,
    _ATEN.bmm: _mm,
    _ATEN.addmm: _addmm,
    _ATEN.baddbmm: _addmm,
    _ATEN._scaled_mm: _scaled_mm,
    _ATEN._grouped_mm: _grouped_mm,
    _ATEN._scaled_grouped_mm: _scaled_grouped_mm,
    GROUPED_MM.overloadpacket: _own_grouped_mm,
    GROUPED_MM_BACKWARD.overloadpacket: _own_grouped_mm_backward,
    ACCUMULATE_WEIGHT_GRADIENT.overloadpacket: _accumulate_weight_gradient,
    _ATEN._scaled_dot_product_cudnn_attention: _attention,
    _ATEN._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    SHARDED_ATTENTION.overloadpacket: _sharded,
    torch.ops.bloomery.sharded_attention_backward: _sharded_backward,
}
