"""Expert parallelism: each rank has some of the experts, and tokens travel to them (Lepikhin et al., arXiv 2006.16668).

Experts see the ranks as `ParallelDims.build_expert_mesh` tells: ep borrows from the ranks of data, of context parallelism and,
where experts are not cut themselves, of tensor parallelism, each of which has tokens of its own. Where they are
(`expert_tensor_parallel_degree`), the ranks of tp bring their tokens together first, and add their results up.

How rows travel is a dispatcher's affair: `trainer.distributed.expert_backends` has the table of them.
"""

import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import Placement, Shard, distribute_tensor
from torch.utils._python_dispatch import _disable_current_modes

from models.common.moe import GroupedExperts, MoE
from models.common.token_dispatch import Rows
from models.plan import ParallelPlan, match_modules
from trainer.distributed.expert_backends import get_expert_backend
from trainer.distributed.expert_dispatch import GatheringDispatcher
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.tensor_collectives import TensorAxis


def apply_expert_parallel(model: nn.Module, *, plan: ParallelPlan, dims: ParallelDims, backend: str) -> None:
    """Spread the plan's mixtures over the experts' meshes of `dims`, in place, on the meta device. Before all else.

    backend: how rows travel (`parallelism.expert_parallel_comm_backend`). FSDP has to shard the experts over `efsdp`, apart from
    their blocks.

    Raises:
        ValueError: experts that cannot be dealt out or cut evenly.
    """
    modules = dict(model.named_modules())
    for name in match_modules(plan.experts, modules) if plan.experts else []:
        mixture = modules[name]
        assert isinstance(mixture, MoE), f"{name} is a {type(mixture).__name__}, no mixture of experts"
        dispatcher = mixture.dispatcher
        if dims.ep > 1:
            axis = TensorAxis.from_group(dims.mesh("ep").get_group())
            dispatcher = get_expert_backend(backend)(axis)
        if dims.etp > 1:
            axis = TensorAxis.from_group(dims.mesh("etp").get_group())
            dispatcher = GatheringDispatcher(dispatcher, axis, mixture.router.n_experts)
        mixture.dispatcher = dispatcher
        mixture.experts.__class__ = SeparateExperts
        _place_experts(mixture.experts, name, dims)


class SeparateExperts(GroupedExperts):
    """Experts that FSDP gathers and reduces apart from their block."""

    def __call__(self, rows: Rows) -> Tensor:
        # Where a block is recomputed but for its choices, torch counts every operation in it, and those of FSDP's hooks, which
        # differ from pass to pass, would not add up.
        with _disable_current_modes():
            return super().__call__(rows)


def _place_experts(experts: GroupedExperts, name: str, dims: ParallelDims) -> None:
    """Make the weights DTensors: experts are dealt out over ep, the hidden width of each is cut over etp."""
    if dims.ep == 1 and dims.etp == 1:
        return
    mesh = dims.mesh("experts")
    for weight_name, hidden_dim in (("w1", 1), ("w2", 2), ("w3", 1)):
        weight = getattr(experts, weight_name)
        placements: list[Placement] = [Shard(0)] if dims.ep > 1 else []
        placements += [Shard(hidden_dim)] if dims.etp > 1 else []
        for placement, degree in zip(placements, mesh.shape, strict=True):
            assert isinstance(placement, Shard)
            if weight.shape[placement.dim] % degree:
                raise ValueError(
                    f"{name}.experts.{weight_name} has {weight.shape[placement.dim]} in dim {placement.dim}, which {degree} ranks "
                    "cannot share evenly: choose another parallelism.expert_parallel_degree or expert_tensor_parallel_degree"
                )
        local = distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)
        setattr(experts, weight_name, nn.Parameter(local, weight.requires_grad))
