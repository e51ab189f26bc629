"""Context parallelism equals one process: attention alone, and a model with data parallelism, recomputation and a compiler."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.attention.flex_attention as flex_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from models.common import attention
from models.common.attention import DotProductAttention, build_document_mask
from models.plan import ParallelPlan
from tests.distributed.cases import ARGS, EAGER_COMPILE, Case, Outcome, list_parameters, run_case, run_reference
from tests.distributed.harness import RankFailedError, run_distributed
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed import sharded_attention
from trainer.distributed.context_parallel import apply_context_parallel
from trainer.distributed.sequence_collectives import exchange_heads, join_sequence
from trainer.distributed.sequence_split import SequenceSplit

METHODS: dict[str, dict[str, Any]] = {
    "allgather": {"context_parallel_method": "allgather"},
    "ring": {"context_parallel_method": "ring"},
    "ring_alltoall": {"context_parallel_method": "ring", "context_parallel_rotate_method": "alltoall"},
    "ulysses": {"context_parallel_method": "ulysses"},
}
UNBALANCED = {"context_parallel_load_balancer": None}
PLAINLY_SPLIT = {
    f"{name}_unbalanced": {**settings, **UNBALANCED} for name, settings in METHODS.items() if name != "ulysses"
}
SHARDED = {name: settings for name, settings in (METHODS | PLAINLY_SPLIT).items() if name != "ulysses"}

SEQ_LEN = 32
DOCUMENTS = ((5, 1, 26), (32,), (3, 29))


def make_positions() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# --- attention alone ---


class _Network(nn.Module):
    """Nothing but attention, called as a model is. Takes and returns (B, S, N, H)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DotProductAttention()

    def forward(self, *qkv: torch.Tensor, positions: Any = None, mask: Any = None) -> torch.Tensor:
        return self.attention(*(x.transpose(1, 2) for x in qkv), mask=mask).transpose(1, 2)


def _build_network(settings: dict[str, Any]) -> tuple[_Network, SequenceSplit]:
    parallelism = ParallelismConfig(**settings)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    network, plan = _Network(), ParallelPlan(fsdp_units=(), blocks="attention", attention="attention")
    apply_context_parallel(network, plan=plan, mesh=mesh, parallelism=parallelism)
    return network, SequenceSplit.from_config(mesh, parallelism)


def _make_inputs(batch: int, dtype: torch.dtype = torch.float32, v_head_dim: int = 16) -> list[torch.Tensor]:
    """Return q, k and v, and the weights with which outputs enter a loss: (B, S, heads, H). Groups of two query heads."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 16), (4, 16), (4, v_head_dim), (8, v_head_dim))
    return [torch.randn(batch, SEQ_LEN, *size, generator=generator).to(dtype) for size in sizes]


def _attend(network: nn.Module, inputs: list[torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    """Return the output and the gradients of q, k and v."""
    *qkv, weights = inputs
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = network(*leaves, **kwargs)
    out.backward(weights)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _compare_attention(
    methods: dict[str, dict], batch: int, dtype: torch.dtype, documents: bool, v_head_dim: int = 16
) -> dict[str, list[float]]:
    """Return the errors of this rank's output, dq, dk and dv, by method, against one process in double precision."""
    inputs = _make_inputs(batch, dtype, v_head_dim)
    positions = make_positions()[:batch] if documents else None
    mask = None if positions is None else build_document_mask(positions, device_type="cpu")
    expected = _attend(_Network(), [x.double() for x in inputs], mask=mask)
    errors = {}
    for name, settings in methods.items():
        network, split = _build_network(settings)
        mask = None if positions is None else split.build_mask(positions)
        actual = _attend(network, [split.take(x) for x in inputs], mask=mask, positions=split.positions(SEQ_LEN, "cpu"))
        errors[name] = [relative_error(a.double(), split.take(e)) for a, e in zip(actual, expected, strict=True)]
    return errors


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("batch", "dtype", "tolerance"), [(1, torch.float32, 1e-6), (3, torch.float32, 1e-6), (2, torch.bfloat16, 1e-2)]
)
def test_causal_attention_equals_one_process(ranks: int, batch: int, dtype: torch.dtype, tolerance: float) -> None:
    for rank, errors in enumerate(
        run_distributed(_compare_attention, ranks, METHODS | PLAINLY_SPLIT, batch, dtype, False)
    ):
        assert max(max(found) for found in errors.values()) <= tolerance, f"rank {rank}: {errors}"


def test_values_of_another_size_than_keys_equal_one_process() -> None:
    for errors in run_distributed(_compare_attention, 2, METHODS, 2, torch.float32, False, 10):
        assert max(max(found) for found in errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_inside_documents_equals_one_process(ranks: int) -> None:
    methods = {name: (METHODS | PLAINLY_SPLIT)[name] for name in ("allgather", "allgather_unbalanced", "ulysses")}
    for rank, errors in enumerate(run_distributed(_compare_attention, ranks, methods, 3, torch.float32, True)):
        assert max(max(found) for found in errors.values()) <= 1e-6, f"rank {rank}: {errors}"


def _accept(*_: Any) -> None:
    pass


def _get_flex_attention() -> Any:
    return flex_file.flex_attention


def _get_create_block_mask() -> Any:
    return flex_file.create_block_mask


@contextlib.contextmanager
def _flex_attention_on_cpu() -> Iterator[None]:
    """Let FlexAttention run backward on the CPU, op by op. Slow, and refused by torch for that alone."""
    with (
        mock.patch.object(flex_file, "_validate_device", new=_accept),
        mock.patch.object(attention, "_compiled_flex_attention", new=_get_flex_attention),
        mock.patch.object(attention, "_compiled_create_block_mask", new=_get_create_block_mask),
    ):
        yield


def _compare_block_mask(method: str, compiled: bool) -> list[float]:
    """As `_compare_attention`, with the masks that CUDA devices get."""
    inputs, positions = _make_inputs(3), make_positions()
    expected = _attend(_Network(), inputs, mask=build_document_mask(positions, device_type="cpu"))
    network, split = _build_network(METHODS[method])
    queries = None if split.masks_whole_sequence else split.positions(SEQ_LEN, "cpu")
    if compiled:
        network.attention.forward = torch.compile(network.attention.forward, backend="aot_eager", fullgraph=True)
    with _flex_attention_on_cpu():
        mask = build_document_mask(positions, device_type="cuda", queries=queries)
        actual = _attend(network, [split.take(x) for x in inputs], mask=mask, positions=split.take(positions))
    return [relative_error(a, split.take(e)) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_flex_attention_equals_one_process(method: str, compiled: bool) -> None:
    for errors in run_distributed(_compare_block_mask, 2, method, compiled):
        assert max(errors) <= 1e-6, errors


# --- balance ---


def _measure_areas(methods: dict[str, dict]) -> dict[str, tuple[int, int]]:
    """Return how many pairs of a query and a key this rank computes, forward and backward, by method."""
    areas: dict[str, tuple[int, int]] = {}
    for name, settings in methods.items():
        network, split = _build_network(settings)
        counts = {"forward": 0, "backward": 0}

        def count(direction: str, original: Any, first: int, counts: dict = counts) -> Any:
            def counted(*args: torch.Tensor, causal: bool) -> Any:
                queries, keys = args[first].shape[1], args[first + 1].shape[1]
                counts[direction] += queries * (queries + 1) // 2 if causal else queries * keys
                return original(*args, causal=causal)

            return counted

        with (
            mock.patch.object(sharded_attention, "attend", count("forward", sharded_attention.attend, 0)),
            mock.patch.object(
                sharded_attention, "attend_backward", count("backward", sharded_attention.attend_backward, 1)
            ),
        ):
            _attend(network, [split.take(x) for x in _make_inputs(1)], positions=split.positions(SEQ_LEN, "cpu"))
        areas[name] = counts["forward"], counts["backward"]
    return areas


def test_causal_balance_measured() -> None:
    ranks = 4
    measured = run_distributed(_measure_areas, ranks, SHARDED)
    for name in SHARDED:
        forward, backward = zip(*(areas[name] for areas in measured), strict=True)
        assert forward == backward, name
        # Every visible pair once, and nothing else.
        assert sum(forward) == SEQ_LEN * (SEQ_LEN + 1) // 2, name
        if name in METHODS:
            assert len(set(forward)) == 1, f"{name}: {forward}"
        else:
            assert list(forward) == sorted(set(forward)), f"{name}: later ranks of a plain split have more to do"


# --- a model ---

MODEL = dataclasses.replace(ARGS, dim=32, n_layers=2, n_heads=8, n_kv_heads=4)
FULL, OP = {"mode": "full"}, {"mode": "selective", "selective_ac_option": "op"}


def _case(name: str, ranks: int, cp: int, method: str, **more: Any) -> Case:
    settings = (METHODS | PLAINLY_SPLIT)[method]
    return Case(f"{method}_{name}", ranks, {"context_parallel_degree": cp, **settings}, base=MODEL, **more)


# Beside those of the table.
CASES = [
    *(_case("cp2", 2, 2, method) for method in PLAINLY_SPLIT),
    *(_case("cp4", 4, 4, method) for method in METHODS),
    _case("cp4_documents", 4, 4, "allgather", documents=True),
    _case("cp2_documents", 2, 2, "allgather_unbalanced", documents=True),
    _case("cp2_compile_ac_full", 2, 2, "ring", compile=EAGER_COMPILE, activation_checkpoint=FULL),
    _case("cp2_compile_ac_op", 2, 2, "ulysses", compile=EAGER_COMPILE, activation_checkpoint=OP),
    _case("cp2_compile_inductor_ac_op", 2, 2, "allgather", compile={"enable": True}, activation_checkpoint=OP),
]


@functools.cache
def _reference(documents: bool) -> Outcome:
    return run_reference(Case("reference", documents=documents, base=MODEL))


@pytest.mark.parametrize(
    "case",
    list_parameters(
        CASES,
        exhaustive=["allgather_cp2_compile_inductor_ac_op", "ring_cp2_compile_ac_full", "ulysses_cp2_compile_ac_op"],
    ),
)
def test_run_equals_one_process(case: Case) -> None:
    expected = _reference(case.documents)
    for rank, actual in enumerate(run_distributed(run_case, case.world_size, case, timeout=240.0, reuse=True)):
        assert actual.losses == pytest.approx(expected.losses, rel=1e-5), f"loss on rank {rank}"
        for kind in ("gradients", "parameters"):
            tensors, references = getattr(actual, kind), getattr(expected, kind)
            assert tensors.keys() == references.keys()
            errors = {name: relative_error(tensors[name], references[name]) for name in references}
            assert max(errors.values()) <= 1e-5, f"{kind} on rank {rank}: {errors}"


def _count_attention(case: Case) -> tuple[int, int]:
    """Return how often a run attends forward and backward."""
    with (
        mock.patch.object(sharded_attention, "attend", wraps=sharded_attention.attend) as forward,
        mock.patch.object(sharded_attention, "attend_backward", wraps=sharded_attention.attend_backward) as backward,
    ):
        run_case(case)
    return forward.call_count, backward.call_count


@pytest.mark.parametrize(
    ("section", "compiled", "times"),
    [(FULL, False, 2), (OP, False, 1), (OP, True, 1)],
    ids=["full", "op", "op_compiled"],
)
def test_recomputation_by_operation_keeps_attention(section: dict, compiled: bool, times: int) -> None:
    case = _case("ac", 2, 2, "ring", activation_checkpoint=section, compile=EAGER_COMPILE if compiled else {})
    for forward, backward in run_distributed(_count_attention, 2, case):
        assert backward > 0
        assert forward == times * backward


def _count_flops() -> int:
    network, split = _build_network(METHODS["allgather"])
    with FlopCounterMode(display=False) as counter:
        _attend(network, [split.take(x) for x in _make_inputs(3)], positions=split.positions(SEQ_LEN, "cpu"))
    return counter.get_total_flops()


def test_flops_are_counted_alike_on_all_ranks() -> None:
    # The compiler weighs recomputation by them. 2 matmuls forward and 5 backward, over half of all pairs, on two ranks.
    batch, heads, head_dim = 3, 8, 16
    flops = (2 + 5) * 2 * batch * heads * head_dim * SEQ_LEN * SEQ_LEN // 2
    assert run_distributed(_count_flops, 2) == [flops // 2] * 2


# --- what is refused ---


def _run_network(settings: dict[str, Any], heads: int = 8, **kwargs: Any) -> None:
    network, split = _build_network(settings)
    q, k, v, _ = (split.take(x) for x in _make_inputs(1))
    network(q, k[:, :, :heads], v[:, :, :heads], **kwargs)


@pytest.mark.parametrize(
    ("method", "heads", "kwargs", "message"),
    [
        ("allgather", 4, {}, r"SequenceSplit\.split"),
        ("ring", 4, {"positions": 0, "mask": torch.ones(1, 1, 16, 32, dtype=torch.bool)}, "'allgather' or 'ulysses'"),
        (
            "allgather",
            4,
            {"positions": 0, "mask": torch.ones(1, 1, 16, 16, dtype=torch.bool)},
            r"SequenceSplit\.build_mask",
        ),
        (
            "ulysses",
            4,
            {"positions": 0, "mask": torch.ones(1, 1, 16, 32, dtype=torch.bool)},
            r"SequenceSplit\.build_mask",
        ),
        ("ulysses", 1, {"positions": 0}, "context_parallel_method = 'ulysses' cannot share out 1 heads"),
    ],
    ids=["no positions", "ring with a mask", "allgather with a local mask", "ulysses with a local mask", "few heads"],
)
def test_call_that_would_be_wrong_raises(method: str, heads: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RankFailedError, match=message):
        run_distributed(functools.partial(_run_network, **kwargs), 2, METHODS[method], heads)


def _apply(plan: ParallelPlan) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    with pytest.raises(ValueError, match=r".") as error:
        apply_context_parallel(_Network(), plan=plan, mesh=mesh, parallelism=ParallelismConfig())
    return str(error.value)


@pytest.mark.parametrize(("glob", "message"), [("", "ParallelPlan.attention"), ("layers.*", "layers.*")])
def test_plan_that_does_not_name_attention_raises(glob: str, message: str) -> None:
    plan = ParallelPlan(fsdp_units=(), blocks="attention", attention=glob)
    assert all(message in found for found in run_distributed(_apply, 2, plan))


def _exchange_there_and_back() -> bool:
    x = torch.randn(3, 8, 4, 2, generator=torch.Generator().manual_seed(dist.get_rank()))
    group_name = dist.group.WORLD.group_name
    return torch.equal(exchange_heads(exchange_heads(x, group_name, True), group_name, False), x)


def test_exchange_heads_there_and_back_changes_nothing() -> None:
    assert all(run_distributed(_exchange_there_and_back, 4))


def _get_gradients_by_layout() -> list[list[torch.Tensor]]:
    """Return the gradients of both operations for one gradient of their results, in three layouts of its memory."""
    group_name = dist.group.WORLD.group_name
    found = []
    for operation in (
        lambda x: join_sequence(x, group_name, True),
        lambda x: exchange_heads(x, group_name, True),
    ):
        x = torch.zeros(3, 8, 4, 2, requires_grad=True)
        out = operation(x)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
        layouts = (grad, grad.transpose(1, 2).contiguous().transpose(1, 2), grad.to(memory_format=torch.channels_last))
        found.append([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in layouts])
    return found


def test_gradients_come_in_any_layout() -> None:
    # The kernels of attention return theirs as they like.
    for found in run_distributed(_get_gradients_by_layout, 2):
        for contiguous, *others in found:
            assert contiguous.norm() > 0
            assert all(torch.equal(other, contiguous) for other in others)
