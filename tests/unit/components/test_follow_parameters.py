"""What needs one process. tests/distributed/test_follow_parameters.py shards."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from trainer.components.follow_parameters import follow_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 2)


def replace_weight(layer):
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 7.0))


def test_groups_and_their_settings_stay_and_parameters_are_the_new_ones():
    model = Net()
    optimizer = torch.optim.SGD([{"params": [model.second.weight, model.first.bias], "lr": 0.5}, {"params": [model.first.weight]}], lr=0.1)  # fmt: skip
    members = optimizer.param_groups[0]["params"]
    with follow_parameters(model, optimizer):
        replace_weight(model.first)
        replace_weight(model.second)
    # LBFGS, for one, keeps this list under another name.
    assert optimizer.param_groups[0]["params"] is members
    assert members[0] is model.second.weight
    assert members[1] is model.first.bias
    assert optimizer.param_groups[1]["params"][0] is model.first.weight
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_old_parameters_are_freed_as_soon_as_they_are_replaced():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    old = weakref.ref(model.first.weight)
    with follow_parameters(model, optimizer):
        replace_weight(model.first)
        gc.collect()
        assert old() is None


def test_optimizer_trains_what_the_model_has_also_after_an_error_inside():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with contextlib.suppress(torch.OutOfMemoryError), follow_parameters(model, optimizer):
        replace_weight(model.first)
        raise torch.OutOfMemoryError
    model.second(model.first(torch.ones(1, 4))).sum().backward()
    optimizer.step()
    assert not torch.equal(model.first.weight, torch.full_like(model.first.weight, 7.0))


def test_parameters_of_another_model_are_refused_before_anything_is_changed():
    model, other = Net(), Net()
    optimizers = torch.optim.SGD(model.parameters()), torch.optim.SGD(other.parameters())
    with pytest.raises(ValueError, match=r"SGD: parameter 0 of group 0, of shape \(4, 4\), is none of the model's"):
        follow_parameters(model, *optimizers).__enter__()
    assert optimizers[0].param_groups[0]["params"][0] is model.first.weight


def test_name_that_is_gone_is_told():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"^first.weight: the model has no parameter of this name"), follow_parameters(model, optimizer):  # fmt: skip
        model.first = None
