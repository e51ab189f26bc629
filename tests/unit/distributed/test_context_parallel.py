from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from models.common.router import Router
from models.deepseek_v3.model import Transformer
from models.deepseek_v3.plan import build_plan
from tests.unit.models.test_deepseek_v3_model import ARGS
from trainer.config.schema_parallel import ParallelismConfig
from trainer.distributed.context_parallel import apply_context_parallel


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def double(counts: torch.Tensor) -> torch.Tensor:
    return 2 * counts


@pytest.mark.usefixtures("_one_rank")
def test_routers_go_on_to_sum_over_other_ranks_of_their_sequences() -> None:
    """Those of tensor parallelism, which comes before. One function for all, so that compiled blocks share a graph."""
    model = Transformer(ARGS)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.sum_over_sequence = double
    mesh = init_device_mesh("cpu", (1,))
    apply_context_parallel(model, plan=build_plan(ARGS), mesh=mesh, parallelism=ParallelismConfig())
    assert len({router.sum_over_sequence for router in routers}) == 1 < len(routers)
    assert routers[0].sum_over_sequence(torch.tensor([[1.0, 3.0]])).tolist() == [[2.0, 6.0]]
