"""The loss of a vocabulary that is cut over ranks equals that of one process, in value and in both gradients."""

import collections
import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import RankFailedError, run_distributed
from trainer.components.loss import IGNORE_INDEX, LinearCrossEntropy

BATCH, SEQ, DIM = 2, 13, 8
# The last of 2, of 3 and of 4 ranks has fewer rows than the others; of 5 rows the last of 4 ranks has none.
VOCABS = {2: 31, 3: 31, 4: 5}


def _make_inputs(vocab: int, dtype: torch.dtype, ignored: Any = (3, 17)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, DIM, generator=generator).to(dtype)
    weight = torch.randn(vocab, DIM, generator=generator).to(dtype)
    labels = torch.randint(0, vocab, (BATCH, SEQ), generator=generator)
    labels.view(-1)[list(ignored)] = IGNORE_INDEX
    return hidden, weight, labels


def _compute_reference(vocab: int, dtype: torch.dtype = torch.float32, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """Loss and gradients of one process in float64."""
    hidden, weight, labels = _make_inputs(vocab, dtype, **inputs)
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t()).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    (loss / 7).backward()
    return loss.detach(), hidden.grad, weight.grad


class _Watch(TorchDispatchMode):
    """Counts collectives, and keeps the shapes of all matrices that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: collections.Counter = collections.Counter()
        self.matrices: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "wait" not in func._schema.name:
            self.collectives[func._schema.name.partition("::")[2]] += 1
        if type(out) is torch.Tensor and out.dim() == 2:
            self.matrices.add(tuple(out.shape))
        return out


def _compute(vocab: int, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **inputs: Any) -> dict[str, Any]:
    """One loss over all ranks, forward and backward, and the loss again without gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    hidden, whole, labels = _make_inputs(vocab, dtype, **inputs)
    weight = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    hidden.requires_grad_()
    loss_fn = LinearCrossEntropy(tp_group=mesh.get_group(), **settings)
    watch = _Watch()
    with contextlib.nullcontext() if "compile_backend" in settings else watch:
        loss = loss_fn(hidden, weight, labels)
        (loss / 7).backward()
    with torch.no_grad():
        loss_without_gradient = loss_fn(hidden, weight, labels)
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == (Shard(0),)
    assert weight.grad.dtype == hidden.grad.dtype == dtype
    dist.all_reduce(hidden.grad)  # what the backward of the gather does
    return {
        "results": (loss.detach(), hidden.grad, weight.grad.full_tensor()),
        "without_gradient": loss_without_gradient,
        "collectives": dict(watch.collectives),
        "rows": weight.to_local().shape[0],
        "matrices": watch.matrices,
    }


def _check(outcomes: list[dict[str, Any]], expected: tuple[torch.Tensor, ...], rtol: float, atol: float) -> None:
    for outcome in outcomes:
        assert outcome["results"][0].dtype == torch.float32
        for got, reference in zip(outcome["results"], expected, strict=True):
            torch.testing.assert_close(got.double(), reference, rtol=rtol, atol=atol)
        torch.testing.assert_close(outcome["without_gradient"].double(), expected[0], rtol=rtol, atol=atol)
        assert torch.equal(outcome["results"][0], outcomes[0]["results"][0]), "ranks disagree"


def _compute_all(vocab: int, all_settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_compute(vocab, settings) for settings in all_settings]


@pytest.mark.parametrize("ranks", VOCABS)
@pytest.mark.parametrize("loss_parallel", [True, False])
def test_loss_and_gradients_equal_one_process(ranks: int, loss_parallel: bool) -> None:
    vocab = VOCABS[ranks]
    all_settings = [{"chunk_size": size, "loss_parallel": loss_parallel} for size in (0, 1, 5, 26, 4096)]
    by_rank = run_distributed(_compute_all, ranks, vocab, all_settings, reuse=True)
    assert len({outcomes[0]["rows"] for outcomes in by_rank}) > 1, "otherwise all shards are equal"
    for outcomes in zip(*by_rank, strict=True):
        _check(list(outcomes), _compute_reference(vocab), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "loss_parallel"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
def test_compiled_loss_equals_one_process(backend: str, loss_parallel: bool) -> None:
    settings = {"chunk_size": 13, "compile_backend": backend, "loss_parallel": loss_parallel}
    outcomes = run_distributed(_compute, 2, 31, settings, timeout=240, reuse=True)
    _check(outcomes, _compute_reference(31), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_parallel", [True, False])
def test_bfloat16_stays_within_rounding(loss_parallel: bool) -> None:
    settings = {"chunk_size": 5, "loss_parallel": loss_parallel}
    outcomes = run_distributed(_compute, 2, 31, settings, torch.bfloat16)
    _check(outcomes, _compute_reference(31, torch.bfloat16), rtol=3e-2, atol=3e-2)


def _compute_extremes() -> tuple[dict[str, Any], bool]:
    ignored = _compute(31, {"chunk_size": 4}, ignored=range(BATCH * SEQ))
    mesh = init_device_mesh("cpu", (2,))
    hidden, whole, labels = _make_inputs(31, torch.float32)
    weight = distribute_tensor(whole * 1e4, mesh, [Shard(0)], src_data_rank=None)
    loss = LinearCrossEntropy(chunk_size=5, tp_group=mesh.get_group())(hidden, weight, labels)
    return ignored, bool(loss.isfinite())


def test_ignored_labels_give_zero_and_large_logits_no_overflow() -> None:
    for ignored, is_finite in run_distributed(_compute_extremes, 2):
        assert all(tensor.abs().max() == 0 for tensor in ignored["results"])
        assert is_finite


@pytest.mark.parametrize("loss_parallel", [True, False])
def test_one_collective_a_chunk_and_never_all_logits(loss_parallel: bool) -> None:
    outcome = run_distributed(_compute, 2, 31, {"chunk_size": 5, "loss_parallel": loss_parallel})[0]
    n_chunks = -(-BATCH * SEQ // 5)
    assert outcome["collectives"] == {"all_gather_into_tensor": n_chunks}
    logits = {shape for shape in outcome["matrices"] if shape[1] in (outcome["rows"], 31) and shape[0] != DIM}
    assert logits
    assert max(rows * width for rows, width in logits) <= 5 * (outcome["rows"] if loss_parallel else 32)


def _misuse(with_group: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, labels = _make_inputs(31, torch.float32)
    if not with_group:
        weight = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
    LinearCrossEntropy(tp_group=mesh.get_group() if with_group else None)(hidden, weight, labels)


@pytest.mark.parametrize(("with_group", "message"), [(True, "the weight is a DTensor"), (False, "needs tp_group")])
def test_group_and_weight_that_do_not_fit_are_refused(with_group: bool, message: str) -> None:
    with pytest.raises(RankFailedError, match=message):
        run_distributed(_misuse, 2, with_group)
