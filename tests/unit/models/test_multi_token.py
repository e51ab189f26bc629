"""Multi-token prediction: what is ahead of each token, and losses and gradients against the paper's equations."""

import pytest
import torch

from models.common.multi_token import IGNORE_INDEX, shift_ahead
from models.deepseek_v3.model import Transformer
from tests.unit.models.test_deepseek_v3_model import (
    ARGS,
    DOCUMENTS,
    assert_same_gradients,
    build_strong_model,
    get_gradients,
    make_labels,
    make_positions,
    make_tokens,
    sum_loss,
)


def test_shift_ahead_stops_at_the_end_and_at_documents() -> None:
    tokens = torch.tensor([[10, 11, 12, 20, 21, 22, 23]])
    labels = torch.tensor([[11, 12, -100, 21, 22, 23, 24]])
    moved, targets = shift_ahead(tokens, labels, depth=2)
    assert targets[0, :, 0].tolist() == [12, -100, 21, 22, 23, 24, -100]
    assert targets[0, :, 1].tolist() == [-100, 21, 22, 23, 24, -100, -100]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    moved, targets = shift_ahead(tokens, labels, depth=2, positions=positions)
    assert moved.shape == targets.shape == (1, 7, 2)
    assert targets[0, :, 0].tolist() == [12, -100, -100, 22, 23, 24, -100]
    assert targets[0, :, 1].tolist() == [-100, -100, -100, 23, 24, -100, -100]
    for k in (1, 2):
        has_label = targets[0, :, k - 1] != -100
        assert torch.equal(moved[0, has_label, k - 1], tokens[0, has_label.nonzero().flatten() + k])


def test_shift_ahead_beyond_the_sequence_has_no_labels() -> None:
    tokens = torch.tensor([[1, 2]])
    _, targets = shift_ahead(tokens, tokens, depth=4)
    assert targets[0].tolist() == [[2, -100, -100, -100], [-100, -100, -100, -100]]


def predict_plainly(model: Transformer, tokens: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The summed loss of each depth, the main one first, for one document that fills its rows: in equations 21 to 24."""
    args, depth = model.args, model.args.mtp_depth
    seq = tokens.shape[1]
    h = model.tok_embeddings(tokens)
    for layer in range(args.n_layers):
        h, _ = model.layers[str(layer)](h)
    h = model.norm(h)
    losses = [sum_loss(h, model.output.weight, labels)]
    for k in range(1, depth + 1):
        # Depth k has only the first seq - k tokens.
        block = model.layers[str(args.n_layers + k - 1)]
        ahead = model.tok_embeddings(tokens[:, k:])
        both = torch.cat((block.enorm(ahead), block.hnorm(h[:, : seq - k])), dim=-1)
        mixed = both @ block.eh_proj.weight.t()
        mixed = mixed + block.attention(block.attention_norm(mixed))
        mixed = mixed + block.moe(block.ffn_norm(mixed))[0]
        h = block.norm(mixed)
        losses.append(sum_loss(h, model.output.weight, labels[:, k:]))
    return losses


@pytest.mark.parametrize("mtp_depth", [1, 2])
def test_multi_token_prediction_equals_reference_with_gradients(mtp_depth: int) -> None:
    model, tokens = build_strong_model(mtp_depth=mtp_depth, mtp_weight=0.4), make_tokens()
    labels = tokens.roll(-1, dims=1)
    loss = model(tokens, labels=labels, loss_fn=sum_loss)
    main, *ahead = predict_plainly(model, tokens, labels)
    expected = main + 0.4 / mtp_depth * sum(ahead)
    torch.testing.assert_close(loss, expected)
    own = [model.layers[str(ARGS.n_layers + k)].depth_loss.total for k in range(mtp_depth)]
    torch.testing.assert_close(own, [x.detach() for x in ahead])
    assert_same_gradients(get_gradients(loss, model), get_gradients(expected, model))


def test_multi_token_prediction_stays_inside_documents() -> None:
    model = build_strong_model(mtp_depth=2, attn_mask_type="block_causal")
    separate = build_strong_model(mtp_depth=2)
    tokens, positions = make_tokens(batch=1), make_positions(batch=1)
    labels = tokens.roll(-1, dims=1)
    labels[:, torch.tensor(DOCUMENTS).cumsum(0) - 1] = IGNORE_INDEX
    packed = model(tokens, positions=positions, labels=labels, loss_fn=sum_loss)
    parts = zip(tokens.split(DOCUMENTS, dim=1), labels.split(DOCUMENTS, dim=1), strict=True)
    total = sum(separate(t, labels=y, loss_fn=sum_loss) for t, y in parts)
    torch.testing.assert_close(packed, total)
    assert_same_gradients(get_gradients(packed, model), get_gradients(total, separate))


def test_multi_token_prediction_takes_what_is_ahead_from_the_caller() -> None:
    """A rank that has only a part of each sequence cannot look beyond its end."""
    model, tokens = build_strong_model(mtp_depth=2), make_tokens()
    labels = make_labels(tokens)
    moved, targets = shift_ahead(tokens, labels, depth=2)
    loss = model(tokens, labels=labels, loss_fn=sum_loss)
    given = model(tokens, labels=labels, loss_fn=sum_loss, mtp_tokens=moved, mtp_labels=targets)
    assert torch.equal(loss, given)
    targets[:, :, 1] = IGNORE_INDEX
    fewer = model(tokens, labels=labels, loss_fn=sum_loss, mtp_tokens=moved, mtp_labels=targets)
    assert not torch.equal(loss, fewer)


def test_logits_and_validation_are_of_the_next_token_alone() -> None:
    deep, plain, tokens = build_strong_model(mtp_depth=2), build_strong_model(), make_tokens()
    plain.load_state_dict({name: x for name, x in deep.state_dict().items() if name in plain.state_dict()})
    assert torch.equal(deep(tokens), plain(tokens))
    labels = make_labels(tokens)
    deep.eval()
    assert torch.equal(deep(tokens, labels=labels, loss_fn=sum_loss), plain(tokens, labels=labels, loss_fn=sum_loss))
