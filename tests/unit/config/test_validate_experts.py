"""Degrees of expert parallelism that do not go with the other degrees."""

import pytest

from tests.unit.config.test_validate_parallel import CP, PP, SHARD, TP, find
from trainer.config import validate_experts

EP = "parallelism.expert_parallel_degree"
ETP = "parallelism.expert_tensor_parallel_degree"
REPLICATE = "parallelism.data_parallel_replicate_degree"


@pytest.mark.parametrize(
    ("settings", "lent", "choices"),
    [
        ({EP: 3}, f"{SHARD} x {CP} x {TP} = 8 with", "Use 1, 2, 4 or 8"),
        ({EP: 16}, f"{SHARD} x {CP} x {TP} = 8 with", "Use 1, 2, 4 or 8"),
        ({EP: 8, PP: 2}, "= 4 with", "Use 1, 2 or 4"),
        ({EP: 8, REPLICATE: 2}, "= 4 with", "Use 1, 2 or 4"),
        ({EP: 8, TP: 2, ETP: 2}, f"{SHARD} x {CP} = 4 with", "Use 1, 2 or 4"),
        ({EP: 2, REPLICATE: 8, SHARD: 1}, "= 1 with", "Use 1,"),
    ],
)
def test_degree_that_the_lent_ranks_cannot_be_divided_by_is_refused(settings, lent, choices):
    (problem,), _ = find(settings, world_size=8)
    assert problem.startswith(f"{EP} = {settings[EP]}: must divide the ranks that it borrows, ")
    assert lent in problem
    assert choices in problem


@pytest.mark.parametrize(
    "settings",
    [
        {EP: 8},
        {EP: 2},
        {EP: 8, CP: 2},
        {EP: 8, CP: 2, TP: 2},
        {EP: 4, TP: 2, ETP: 2},
        {EP: 4, PP: 2},
        {EP: 2, REPLICATE: 4},
    ],
    ids=str,
)
def test_degree_that_divides_the_lent_ranks_is_in_order(settings):
    assert find(settings, world_size=8)[0] == []


@pytest.mark.parametrize(("settings", "choices"), [({TP: 4, ETP: 2}, "Use 1 or 4."), ({ETP: 2}, "Use 1.")])
def test_experts_are_whole_or_cut_over_all_ranks_of_tensor_parallelism(settings, choices):
    (problem,), _ = find(settings, world_size=8)
    assert problem.startswith(f"{ETP} = 2: must be 1, ")
    assert choices in problem


def test_degrees_that_do_not_fit_the_processes_are_all_that_is_said():
    (problem,), _ = find({EP: 16, TP: 3, "training.seq_len": 96}, world_size=8)
    assert "multiply to 3" in problem


def test_deepep_needs_its_package_and_bfloat16(monkeypatch):
    settings = {
        EP: 2,
        "parallelism.expert_parallel_comm_backend": "deepep",
        "training.mixed_precision_param": "float32",
    }
    missing, dtype = find(settings, world_size=8)[0]
    assert "the package deep_ep is not installed" in missing
    assert "training.mixed_precision_param = float32" in dtype
    monkeypatch.setattr(validate_experts.importlib.util, "find_spec", lambda name: object())
    assert find(settings | {"training.mixed_precision_param": "bfloat16"}, world_size=8) == ([], [])
