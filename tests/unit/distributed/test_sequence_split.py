"""How sequences are split over ranks: which tokens, which positions, which rows of a mask."""

import pytest
import torch

from models.common.attention import build_document_mask
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed.sequence_split import SequenceSplit, is_balanced


def make_splits(degree: int, balanced: bool, **more: bool) -> list[SequenceSplit]:
    return [SequenceSplit(rank=rank, degree=degree, balanced=balanced, **more) for rank in range(degree)]


def make_batch() -> dict[str, torch.Tensor]:
    tokens = torch.arange(2 * 24).view(2, 24)
    return {"tokens": tokens, "labels": tokens + 1}


def test_balanced_split_gives_each_rank_a_head_and_its_mirror_image() -> None:
    parts = [split.positions(12, "cpu").tolist() for split in make_splits(3, balanced=True)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_plain_split_gives_each_rank_neighbours() -> None:
    parts = [split.positions(12, "cpu").tolist() for split in make_splits(3, balanced=False)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_split_and_join_give_the_batch_back(degree: int, balanced: bool) -> None:
    batch = make_batch()
    splits = make_splits(degree, balanced)
    parts = [split.split(batch) for split in splits]
    for name, whole in batch.items():
        assert torch.equal(splits[-1].join(torch.stack([part[name] for part in parts])), whole)
    assert all(part["positions"].shape == part["tokens"].shape for part in parts)
    positions = splits[0].join(torch.stack([part["positions"] for part in parts]))
    assert torch.equal(positions, torch.arange(24).expand(2, -1))


def test_split_keeps_positions_that_restart_with_each_document() -> None:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 19), (12, 12))])
    for split in make_splits(2, balanced=True):
        part = split.split(make_batch() | {"positions": positions})
        assert torch.equal(part["positions"], positions[:, split.positions(24, "cpu")])


def test_take_of_another_rank_is_what_that_rank_takes() -> None:
    tokens = make_batch()["tokens"]
    mine, theirs = make_splits(2, balanced=True)
    assert torch.equal(mine.take(tokens, rank=1), theirs.take(tokens))


@pytest.mark.parametrize(("balanced", "seq_len", "multiple"), [(True, 20, 8), (False, 22, 4)])
def test_length_that_cannot_be_split_raises(balanced: bool, seq_len: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=rf"{seq_len} tokens .* multiples of {multiple}\b"):
        make_splits(4, balanced)[0].positions(seq_len, "cpu")


def test_batch_of_different_shapes_raises() -> None:
    with pytest.raises(ValueError, match=r"one shape"):
        make_splits(2, balanced=True)[0].split({"tokens": torch.zeros(2, 8), "labels": torch.zeros(2, 4)})


@pytest.mark.parametrize("balanced", [False, True])
def test_mask_has_the_rows_of_this_ranks_queries(balanced: bool) -> None:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 19), (12, 12))])
    whole = build_document_mask(positions, device_type="cpu")
    for split in make_splits(4, balanced):
        assert torch.equal(split.build_mask(positions), whole[:, :, split.positions(24, "cpu")])


def test_mask_of_ulysses_is_for_the_whole_sequence() -> None:
    positions = torch.arange(24).expand(2, -1)
    split = make_splits(2, balanced=False, masks_whole_sequence=True)[1]
    assert torch.equal(split.build_mask(positions), build_document_mask(positions, device_type="cpu"))


@pytest.mark.parametrize(
    ("method", "balancer", "balanced"),
    [
        ("allgather", "headtail", True),
        ("ring", "headtail", True),
        ("ring", None, False),
        ("ulysses", "headtail", False),
    ],
)
def test_is_balanced_as_the_settings_say(method: str, balancer: str | None, balanced: bool) -> None:
    section = ParallelismConfig(context_parallel_method=method, context_parallel_load_balancer=balancer)  # type: ignore[arg-type]
    assert is_balanced(section) is balanced
