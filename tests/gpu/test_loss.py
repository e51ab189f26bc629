"""The chunked loss on a GPU: within the rounding of its dtype of the exact one, and light on memory."""

import functools

import pytest
import torch
import torch.nn.functional as F

from trainer.components.loss import IGNORE_INDEX, LinearCrossEntropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOKENS, DIM, VOCAB = 1000, 256, 5003
# Largest relative errors, in the 2-norm, of the loss and of the gradients. Half a unit in bf16's last place is 0.2%.
TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 1e-2)}


def make_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2, TOKENS // 2, DIM, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, generator=generator, device="cuda") / DIM**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, TOKENS // 2), generator=generator, device="cuda")
    labels[0, 7:99] = IGNORE_INDEX
    return hidden, weight, labels


@functools.cache
def compute_reference(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Loss and gradients in float64, from the same inputs."""
    hidden, weight, labels = make_inputs(dtype)
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t()).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    (loss / TOKENS).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("compile_backend", [None, "inductor"], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_and_gradients_equal_double(dtype: torch.dtype, compile_backend: str | None) -> None:
    expected_loss, *expected_gradients = compute_reference(dtype)
    of_loss, of_gradients = TOLERANCES[dtype]
    torch._dynamo.reset()
    for chunk_size in (384, 0):  # the last of three chunks is shorter
        hidden, weight, labels = make_inputs(dtype)
        loss = LinearCrossEntropy(chunk_size=chunk_size, compile_backend=compile_backend)(hidden, weight, labels)
        (loss / TOKENS).backward()
        assert loss.dtype == torch.float32
        assert relative_error(loss.detach(), expected_loss) <= of_loss
        for tensor, expected in zip((hidden, weight), expected_gradients, strict=True):
            assert tensor.grad is not None
            assert tensor.grad.dtype == dtype
            assert relative_error(tensor.grad, expected) <= of_gradients, chunk_size


def test_gradient_of_the_weight_loses_nothing_between_chunks() -> None:
    """With chunks added up in bf16 the error would grow with their number."""
    _, _, expected = compute_reference(torch.bfloat16)
    errors = []
    for chunk_size in (0, 20):
        hidden, weight, labels = make_inputs(torch.bfloat16)
        (LinearCrossEntropy(chunk_size=chunk_size)(hidden, weight, labels) / TOKENS).backward()
        assert weight.grad is not None
        errors.append(relative_error(weight.grad, expected))
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_without_gradients_equals_double(dtype: torch.dtype) -> None:
    hidden, weight, labels = make_inputs(dtype)
    with torch.no_grad():
        loss = LinearCrossEntropy(chunk_size=384)(hidden, weight, labels)
    assert relative_error(loss, compute_reference(dtype)[0]) <= TOLERANCES[dtype][0]


@pytest.mark.parametrize("compile_backend", [None, "inductor"], ids=["eager", "compiled"])
def test_logits_of_all_tokens_are_never_in_memory(compile_backend: str | None) -> None:
    tokens, dim, vocab, chunk_size = 8192, 64, 32768, 256
    torch._dynamo.reset()
    hidden = torch.randn(1, tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens), device="cuda")
    loss_fn = LinearCrossEntropy(chunk_size=chunk_size, compile_backend=compile_backend)
    for _ in range(2):  # the first compiles, which takes memory of its own
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_fn(hidden, weight, labels).backward()
        torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    logits = tokens * vocab * 2
    gradients = 3 * vocab * dim * 4 + 3 * tokens * dim * 2
    # In eager mode up to 8 tensors of a chunk's logits in fp32 exist at a time.
    assert used <= gradients + 8 * chunk_size * vocab * 4 + 2**22
    assert used < 0.9 * logits, "otherwise this test shows nothing"
