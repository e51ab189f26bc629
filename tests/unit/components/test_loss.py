"""The chunked loss equals the plain composition, in value and in both gradients."""

import pytest
import torch
import torch.nn.functional as F

from trainer.components.loss import IGNORE_INDEX, LinearCrossEntropy


def make_inputs(dtype=torch.float32, ignored=(3, 17)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 13, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(31, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 31, (2, 13), generator=generator)
    labels.view(-1)[list(ignored)] = IGNORE_INDEX
    return hidden, weight, labels


def reference(hidden, weight, labels):
    logits = (hidden.double() @ weight.double().t()).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("chunk_size", [0, 1, 5, 13, 26, 4096])
@pytest.mark.parametrize("compile_backend", [None, "aot_eager"])
def test_loss_and_gradients_equal_the_plain_composition(chunk_size, compile_backend):
    hidden, weight, labels = make_inputs()
    loss = LinearCrossEntropy(chunk_size=chunk_size, compile_backend=compile_backend)(hidden, weight, labels)
    (loss / 7).backward()
    got = (loss.detach().clone(), hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None
    expected_loss = reference(hidden, weight, labels)
    (expected_loss / 7).backward()
    torch.testing.assert_close(got[0], expected_loss.detach().float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[1], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[2], weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_bfloat16_stays_within_rounding_of_the_reference(chunk_size):
    hidden, weight, labels = make_inputs(torch.bfloat16)
    loss = LinearCrossEntropy(chunk_size=chunk_size)(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    got_hidden, got_weight = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = reference(hidden, weight, labels)
    expected.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-2, atol=0)
    torch.testing.assert_close(got_hidden, hidden.grad, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(got_weight, weight.grad, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_without_gradients_the_same_loss_comes_out(chunk_size):
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        loss = LinearCrossEntropy(chunk_size=chunk_size)(hidden, weight, labels)
    torch.testing.assert_close(loss, reference(hidden, weight, labels).detach().float(), rtol=1e-6, atol=1e-5)


def test_all_labels_ignored_gives_zero_loss_and_zero_gradients():
    hidden, weight, labels = make_inputs(ignored=range(26))
    loss = LinearCrossEntropy(chunk_size=4)(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max().item() == 0.0
    assert weight.grad.abs().max().item() == 0.0


def test_extreme_logits_do_not_overflow():
    hidden, weight, labels = make_inputs()
    loss = LinearCrossEntropy(chunk_size=5)(hidden * 1e4, weight, labels)
    assert torch.isfinite(loss)


def test_a_whole_microbatch_of_logits_is_never_held():
    """Every intermediate of vocabulary width has at most chunk_size rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 31:
                rows.append(out.shape[0])
            return out

    hidden, weight, labels = make_inputs()
    with Watch():
        LinearCrossEntropy(chunk_size=5)(hidden, weight, labels).backward()
    rows = [r for r in rows if r != 8]  # weight.t() is (8, 31)
    assert rows
    assert max(rows) == 5
