from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from trainer.components.passes import Passes, build_passes
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.sequence_split import SequenceSplit

LABELS = torch.tensor([[1, 2, -100, 4, 5, 6, -100, -100]])


def make_passes(model: nn.Module | None = None, **options) -> Passes:
    return Passes(model or nn.Identity(), loss_fn=lambda *_: torch.zeros(()), **options)


def test_each_label_counts_on_the_rank_that_has_its_token() -> None:
    counts = [
        make_passes(split=SequenceSplit(rank, 2, balanced=True)).count_labels({"labels": LABELS}) for rank in range(2)
    ]
    # Rank 0 has the tokens 0, 1, 6 and 7.
    assert [count.item() for count in counts] == [2, 3]
    assert make_passes().count_labels({"labels": LABELS}) == 5


@pytest.mark.parametrize(("has_loss", "expected"), [(True, 5), (False, 0)])
def test_labels_of_a_pipeline_count_where_its_loss_is(has_loss: bool, expected: int) -> None:
    pipeline = SimpleNamespace(has_loss=has_loss)
    assert make_passes(pipeline=pipeline).count_labels({"labels": LABELS}) == expected


class Recorder(nn.Module):
    """Notes what it is called with."""

    def forward(self, inputs: torch.Tensor, **kwargs):
        self.inputs, self.kwargs = inputs, kwargs
        return torch.tensor(6.0, requires_grad=True)


def test_model_gets_its_part_of_sequences_with_positions() -> None:
    model = Recorder()
    passes = make_passes(model, split=SequenceSplit(1, 2, balanced=True))
    batch = {"tokens": torch.arange(8).unsqueeze(0), "labels": LABELS}
    loss = passes.forward_backward(batch, torch.tensor(3), is_last=True)
    assert loss == 2.0, "divided by the labels of the step"
    assert model.inputs.tolist() == model.kwargs["positions"].tolist() == [[2, 3, 4, 5]]
    assert model.kwargs["labels"].tolist() == [[-100, 4, 5, 6]]
    assert model.kwargs["mask"] is None


def test_model_gets_a_mask_of_documents() -> None:
    model = Recorder()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    batch = {"tokens": torch.arange(8).unsqueeze(0), "labels": LABELS, "positions": positions}
    loss, count = make_passes(model).evaluate(batch)
    assert (loss, count) == (6.0, 5), "summed, not divided"
    mask = model.kwargs["mask"]
    assert mask.shape == (1, 1, 8, 8)
    assert mask[0, 0, 4].tolist() == [False, False, False, True, True, False, False, False]


def test_tokens_ahead_are_found_in_whole_sequences() -> None:
    """Rank 1 has the tokens 2 to 5; what comes after 5 is rank 0's."""
    model = Recorder()
    passes = make_passes(model, split=SequenceSplit(1, 2, balanced=True), mtp_depth=2)
    batch = {"tokens": torch.arange(8).unsqueeze(0), "labels": LABELS}
    passes.forward_backward(batch, torch.tensor(3), is_last=True)
    assert model.kwargs["mtp_tokens"].tolist() == [[[3, 4], [4, 5], [5, 6], [6, 7]]]
    assert model.kwargs["mtp_labels"].tolist() == [[[4, 5], [5, 6], [6, -100], [-100, -100]]]
    passes.evaluate(batch)
    assert "mtp_tokens" not in model.kwargs, "validation is of the next token alone"


def test_pipeline_of_a_model_of_unknown_width_is_refused() -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_degree > 1 needs the width"):
        build_passes(
            nn.Linear(2, 2),
            [object()],  # type: ignore[list-item]  # it is not looked at
            args=None,
            loss_fn=lambda *_: torch.zeros(()),
            dims=ParallelDims(world_size=1),
            parallelism=ParallelismConfig(),
            training=TrainingConfig(),
            splits_backward=True,
            device=torch.device("cpu"),
        )
