"""Where copy engines cannot be used: an explicit wish is refused on every rank, `auto` goes on without them."""

import socket
from unittest import mock

import torch
import torch.distributed as dist

from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from trainer.distributed.copy_engine import agree_on_obstacle, find_obstacle
from trainer.distributed.parallel_dims import ParallelDims
from trainer.parallelize import parallelize


def _parallelize(collectives: str) -> str:
    case = Case("case", parallelism={"fsdp_collectives": collectives})
    dims = ParallelDims.from_config(case.config.parallelism, dist.get_world_size())
    dims.build_mesh("cpu")
    with torch.device("meta"):
        model = Transformer(case.args)
    try:
        parallelize(model, plan=build_plan(case.args), dims=dims, config=case.config)
    except ValueError as error:
        return str(error)
    return ""


def test_wish_without_gpus_is_refused_and_auto_goes_on() -> None:
    for message in run_distributed(_parallelize, 2, "copy_engine"):
        assert message.startswith(
            "parallelism.fsdp_collectives = 'copy_engine' cannot be used: there is a rank without a GPU"
        )
        assert "'nccl'" in message
    assert run_distributed(_parallelize, 2, "auto") == ["", ""]


def _find_obstacle(hosts: list[str], reachable: dict[int, set[int]]) -> str | None:
    """What is found on made-up hosts, with one GPU a rank, of which each reaches some others."""
    rank = dist.get_rank()
    with (
        mock.patch.object(socket, "gethostname", return_value=hosts[rank]),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=rank),
        mock.patch.object(torch.cuda, "can_device_access_peer", side_effect=lambda own, other: other in reachable[own]),
    ):
        assert dist.group.WORLD is not None
        return find_obstacle(dist.group.WORLD)


def test_obstacle_of_one_rank_is_found_by_all() -> None:
    everything = {rank: {0, 1, 2} for rank in range(3)}
    assert run_distributed(_find_obstacle, 3, ["one"] * 3, everything) == [None] * 3
    for reason in run_distributed(_find_obstacle, 3, ["one", "one", "two"], everything):
        assert reason == "the sharding group spans the hosts one, two"
    for reason in run_distributed(_find_obstacle, 3, ["one"] * 3, {**everything, 1: {0}}):
        assert reason == "GPU 1 cannot reach the memory of the GPUs [2]"


def _agree(obstacles: list[str | None]) -> str | None:
    return agree_on_obstacle(obstacles[dist.get_rank()], torch.device("cpu"))


def test_obstacle_of_one_group_keeps_all_from_copy_engines() -> None:
    assert run_distributed(_agree, 2, [None, None]) == [None, None]
    assert run_distributed(_agree, 2, [None, "too far"]) == [
        "it cannot be used by the GPUs of another sharding group",
        "too far",
    ]
