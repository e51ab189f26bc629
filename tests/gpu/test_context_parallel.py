"""Context parallelism on GPUs: the kernels behind its pieces, and each method against one process, eager and compiled."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

from models.common.attention import DotProductAttention, attention_kernels, build_document_mask
from models.plan import ParallelPlan
from tests.distributed.cases import ARGS, BF16, Case, run_case, run_reference
from tests.distributed.harness import run_distributed
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed import blockwise_attention
from trainer.distributed.blockwise_attention import attend, attend_backward, choose_kernel, merge_piece
from trainer.distributed.context_parallel import apply_context_parallel
from trainer.distributed.sequence_split import SequenceSplit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

METHODS: dict[str, dict[str, Any]] = {
    "allgather": {"context_parallel_method": "allgather"},
    "allgather_unbalanced": {"context_parallel_method": "allgather", "context_parallel_load_balancer": None},
    "ring": {"context_parallel_method": "ring"},
    "ring_alltoall": {"context_parallel_method": "ring", "context_parallel_rotate_method": "alltoall"},
    "ring_unbalanced": {
        "context_parallel_method": "ring",
        "context_parallel_rotate_method": "alltoall",
        "context_parallel_load_balancer": None,
    },
    "ulysses": {"context_parallel_method": "ulysses"},
}

SEQ_LEN = 1024
DOCUMENTS = ((100, 700, 224), (1, 1023), (512, 512))

# What rounding alone may do, in the 2-norm, to outputs and gradients of this size.
CEILINGS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def make_inputs(
    batch: int,
    queries: int = SEQ_LEN,
    keys: int = SEQ_LEN,
    dtype: Any = torch.float32,
    head_dims: tuple[int, int] = (64, 64),
) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the output, (B, S, heads, H), groups of two query heads."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, 8, head_dims[0]), (keys, 4, head_dims[0]), (keys, 4, head_dims[1]), (queries, 8, head_dims[1]))
    return [torch.randn(batch, *size, generator=generator).to("cuda", dtype) for size in sizes]


# --- the pieces, on one GPU ---


def attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return torch.einsum("bnst,btnh->bsnh", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(512, 512, True), (256, 768, False), (200, 331, False)])
@pytest.mark.parametrize(
    ("kernel", "dtype", "head_dims"),
    [
        ("cuDNN", torch.bfloat16, (64, 64)),
        ("flash", torch.bfloat16, (64, 64)),
        ("flash", torch.bfloat16, (192, 128)),
        ("memory-efficient", torch.bfloat16, (64, 64)),
        ("memory-efficient", torch.float32, (64, 64)),
        ("memory-efficient", torch.float32, (64, 32)),
        ("memory-efficient", torch.float32, (6, 6)),
        (None, torch.bfloat16, (20, 12)),
        (None, torch.bfloat16, (128, 128)),
        (None, torch.bfloat16, (192, 128)),
    ],
)
def test_kernel_equals_reference_with_gradients(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str | None,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    queries: int,
    keys: int,
    causal: bool,
    batch: int,
) -> None:
    if kernel == "cuDNN" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is used from Hopper on")
    if kernel is not None:  # else the one that a run would have
        monkeypatch.setattr(blockwise_attention, "choose_kernel", lambda *_: kernel)
    q, k, v, grad_out = make_inputs(batch, queries, keys, dtype, head_dims)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attend_plainly(*leaves, causal=causal)
    gradients = torch.autograd.grad(expected, leaves, grad_out.double())
    out, lse = attend(q, k, v, causal=causal)
    assert lse.shape == expected_lse.shape
    assert lse.dtype == torch.float32
    found = [out, lse, *attend_backward(grad_out, q, k, v, out, lse, causal=causal)]
    errors = [relative_error(a, e) for a, e in zip(found, (expected, expected_lse, *gradients), strict=True)]
    assert max(errors) <= CEILINGS[dtype], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_put_together_equal_reference_with_gradients(batch: int, dtype: torch.dtype) -> None:
    q, k, v, grad_out = make_inputs(batch, 512, 1024, dtype)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attend_plainly(*leaves, causal=False)
    gradients = torch.autograd.grad(expected, leaves, grad_out.double())
    parts = [[x[:, rows].contiguous() for x in (k, v)] for rows in (slice(0, 300), slice(300, 1024))]
    out, lse = attend(q, *parts[0], causal=False)
    merge_piece(out, lse, *attend(q, *parts[1], causal=False))
    (dq, dk, dv), (dq_more, dk_more, dv_more) = [
        attend_backward(grad_out, q, *part, out, lse, causal=False) for part in parts
    ]
    found = [out, lse, dq + dq_more, torch.cat((dk, dk_more), dim=1), torch.cat((dv, dv_more), dim=1)]
    errors = [relative_error(a, e) for a, e in zip(found, (expected, expected_lse, *gradients), strict=True)]
    assert max(errors) <= CEILINGS[dtype], errors


def test_merge_of_a_tail_leaves_the_head_alone() -> None:
    q, k, v, _ = make_inputs(2, 512, 512, torch.bfloat16)
    for begin in (0, 256):  # one after the other, as a graph for both
        out, lse = attend(q, k, v, causal=False)
        piece = attend(q[:, begin:].contiguous(), v, k, causal=False)
        plain, plain_lse = out.clone(), lse.clone()
        blockwise_attention._merge(plain[:, begin:], plain_lse[..., begin:], *piece)
        merge_piece(out[:, begin:], lse[..., begin:], *piece)
        torch.testing.assert_close(out, plain, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse, plain_lse)


def test_choose_kernel_on_this_gpu() -> None:
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    device = torch.device("cuda", torch.cuda.current_device())
    assert choose_kernel(device, torch.bfloat16, 128, 128) == ("cuDNN" if hopper else "flash")
    assert choose_kernel(device, torch.float32, 128, 128) == "memory-efficient"


# --- each method, on several GPUs ---


class _Network(nn.Module):
    """Nothing but attention, called as a model is. Takes and returns (B, S, N, H)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DotProductAttention()

    def forward(self, *qkv: torch.Tensor, positions: Any = None, mask: Any = None) -> torch.Tensor:
        return self.attention(*(x.transpose(1, 2) for x in qkv), mask=mask).transpose(1, 2)


def _attend(network: nn.Module, inputs: list[torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    """Return the output and the gradients of q, k and v."""
    *qkv, grad_out = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = network(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def _compare_attention(settings: dict, batch: int, dtype: torch.dtype, documents: bool) -> dict[str, list[float]]:
    """Return the errors of output, dq, dk and dv against double precision: of one process, and of this rank, both ways."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))
    parallelism = ParallelismConfig(**settings)
    split = SequenceSplit.from_config(mesh, parallelism)
    inputs = make_inputs(batch, dtype=dtype)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS[:batch]]).cuda()
    whole_mask = build_document_mask(positions, device_type="cpu") if documents else None
    expected = _attend(_Network(), [x.double() for x in inputs], mask=whole_mask)
    alone_mask = build_document_mask(positions, device_type="cuda") if documents else None
    mask = split.build_mask(positions) if documents else None
    errors = {}
    with attention_kernels("cuda"):
        alone = _attend(_Network(), inputs, mask=alone_mask)
        errors["one process"] = [relative_error(a, e) for a, e in zip(alone, expected, strict=True)]
        for kind in ("eager", "compiled"):
            network, plan = _Network(), ParallelPlan(fsdp_units=(), blocks="attention", attention="attention")
            apply_context_parallel(network, plan=plan, mesh=mesh, parallelism=parallelism)
            if kind == "compiled":
                network.attention.forward = torch.compile(network.attention.forward, fullgraph=True)
            for _ in range(2):  # again in memory that has been used
                local = [split.take(x) for x in inputs]
                actual = _attend(network, local, mask=mask, positions=split.take(positions))
            errors[kind] = [relative_error(a, split.take(e)) for a, e in zip(actual, expected, strict=True)]
    return errors


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("batch", "dtype", "documents"),
    [
        (1, torch.float32, False),
        (3, torch.float32, False),
        (1, torch.bfloat16, False),
        (3, torch.bfloat16, False),
        (3, torch.float32, True),
        (3, torch.bfloat16, True),
    ],
    ids=lambda value: {True: "documents", False: "causal"}.get(value) if isinstance(value, bool) else None,
)
@pytest.mark.parametrize("method", METHODS)
def test_attention_equals_one_process(method: str, batch: int, dtype: torch.dtype, documents: bool, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    if documents and "ring" in method:
        pytest.skip("a ring takes no mask")
    results = run_distributed(
        _compare_attention, ranks, METHODS[method], batch, dtype, documents, backend="nccl", timeout=300.0
    )
    for rank, errors in enumerate(results):
        for kind in ("eager", "compiled"):
            assert max(errors[kind]) <= CEILINGS[dtype], f"rank {rank}: {errors}"
            # Pieces are rounded once more than the whole.
            for one, several in zip(errors["one process"], errors[kind], strict=True):
                assert several <= 3 * one + 1e-6, f"rank {rank}: {errors}"


# Heads of 16 features, the smallest that FlexAttention takes.
MODEL = dataclasses.replace(ARGS, dim=64, n_layers=2, n_heads=4, n_kv_heads=2)
COMPILED = {"enable": True}
OP = {"mode": "selective", "selective_ac_option": "op"}


def _case(name: str, ranks: int, **more: Any) -> Case:
    method, _, _ = name.partition("-")
    return Case(name, ranks, {"context_parallel_degree": 2, **METHODS[method]}, base=MODEL, **more)


CASES = [
    *(_case(f"{method}-eager", 2) for method in METHODS),
    _case("allgather-documents_compile_ac", 2, documents=True, compile=COMPILED, activation_checkpoint=OP),
    _case("ulysses-documents_compile_ac", 2, documents=True, compile=COMPILED, activation_checkpoint=OP),
    _case("allgather-fsdp2_compile_ac", 4, compile=COMPILED, activation_checkpoint=OP),
    _case("ring_alltoall-fsdp2_compile_ac", 4, compile=COMPILED, activation_checkpoint={"mode": "full"}),
    _case("allgather-fsdp2_bf16_compile", 4, training=BF16, compile=COMPILED, tolerance=4e-2),
]


def _run_both(case: Case) -> tuple[Any, Any]:
    with attention_kernels("cuda"):
        return run_reference(case, "cuda"), run_case(case, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_equals_one_process(case: Case) -> None:
    if torch.cuda.device_count() < case.world_size:
        pytest.skip(f"needs {case.world_size} CUDA devices")
    tolerance = max(case.tolerance, 1e-4)  # sums on a GPU come in another order
    for rank, (expected, actual) in enumerate(
        run_distributed(_run_both, case.world_size, case, backend="nccl", timeout=300.0)
    ):
        assert actual.losses == pytest.approx(expected.losses, rel=tolerance), f"loss on rank {rank}"
        errors = {name: relative_error(actual.gradients[name], expected.gradients[name]) for name in expected.gradients}
        assert max(errors.values()) <= tolerance, f"gradients on rank {rank}: {errors}"
