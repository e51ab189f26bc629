import pytest
import torch
import torch.nn as nn

from models.common.multi_token import IGNORE_INDEX, DepthLoss
from trainer.components.prediction_losses import PredictionLosses


def test_each_depth_is_a_mean_over_its_labels_and_the_rest_is_the_next_tokens() -> None:
    model = nn.ModuleList([DepthLoss(), nn.Linear(1, 1), DepthLoss()])
    losses = PredictionLosses(
        model, depth=2, weight=0.5, sum_over_ranks=lambda values: 2 * values, device=torch.device("cpu")
    )
    near, _, far = model
    for _ in range(2):  # microbatches
        near.add(torch.tensor(6.0), torch.tensor([1, 2, IGNORE_INDEX]))
        far.add(torch.tensor(4.0), torch.tensor([5, IGNORE_INDEX, IGNORE_INDEX]))
    # Two ranks alike: 24 and 16, over 8 and 4 labels. Of 10 labels of the next token, whose loss is 30.
    loss = torch.tensor((30 + 0.5 * (24 + 16) / 2) / 10)
    values = losses.measure(loss=loss, valid_tokens=torch.tensor(10))
    assert {key: value.item() for key, value in values.items()} == pytest.approx(
        {"mtp/main_loss": 3.0, "mtp/loss_1": 3.0, "mtp/loss_2": 4.0}
    )
    losses.begin_step()
    assert near.total == far.total == near.n_labels == far.n_labels == 0


def test_model_that_predicts_one_token_has_nothing_to_tell() -> None:
    losses = PredictionLosses(
        nn.Linear(1, 1), depth=0, weight=0.0, sum_over_ranks=pytest.fail, device=torch.device("cpu")
    )
    losses.begin_step()
    assert losses.measure(loss=torch.tensor(1.0), valid_tokens=torch.tensor(1)) == {}
