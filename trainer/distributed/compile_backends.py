"""What compiles a model with SimpleFSDP: a backend of torch.compile, and the passes over weights in its graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config as inductor_config
import torch.compiler.config
import torch.distributed as dist
import torch.nn as nn
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from models.plan import ParallelPlan
from trainer.config.schema_parallel import CompileConfig, ParallelismConfig
from trainer.distributed import compiler_versions, weight_passes
from trainer.distributed.flop_formulas import register_flop_formulas
from trainer.distributed.fsdp import find_experts, find_units, reshards_after_forward
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_passes import WeightPasses

Backend = Callable[..., Any]


def build_weight_backend(
    model: nn.Module, *, plan: ParallelPlan, dims: ParallelDims, parallelism: ParallelismConfig, section: CompileConfig
) -> Backend:
    """Return the backend for graphs that gather weights, of the blocks of `model` or of all of it.

    Raises:
        UserError: a version of torch that the passes were not tried on.
    """
    compiler_versions.check_torch()
    return build_backend(section, _build_passes(model, plan, dims, parallelism, section))


def _build_passes(
    model: nn.Module, plan: ParallelPlan, dims: ParallelDims, parallelism: ParallelismConfig, section: CompileConfig
) -> WeightPasses:
    experts = find_experts(model, plan) if dims.spreads_experts else []
    units: list[tuple[str, ...]] = []
    if section.scope == "model":
        paths = {module: name for name, module in model.named_modules()}
        units = [tuple(paths[module] for module in unit) for unit in find_units(model, plan)]
    last = [len(units) - 1, len(units)]  # the second is what is in no unit
    kept = [
        place
        for place in range(len(units) + 1)
        if not reshards_after_forward(parallelism, pp=dims.pp, used_again_at_once=bool(units) and place in last)
    ]
    return WeightPasses(
        shard_groups=_name_groups(dims, ("fsdp", "efsdp"), hybrid_axis=1),
        replicate_groups=_name_groups(dims, ("dp_replicate",), hybrid_axis=0),
        units=tuple(units),
        kept=frozenset(kept),
        joins=section.get_backend()[1] == "transformer_block_bucketing",
        gathers_all=all(dims.has_axis(axis) for axis in (("fsdp", "efsdp") if experts else ("fsdp",))),
    )


def _name_groups(dims: ParallelDims, axes: Sequence[str], hybrid_axis: int) -> frozenset[str]:
    """Return the names of the groups of these axes, and of that axis of the meshes that replicate and shard."""
    groups = [dims.mesh(axis).get_group() for axis in axes if dims.has_axis(axis)]
    hybrids = (dims.mesh(name) for name in ("hsdp", "ehsdp") if dims.has_axis(name))
    groups += [mesh.get_group(hybrid_axis) for mesh in hybrids if mesh.size(hybrid_axis) > 1]
    return frozenset(group.group_name for group in groups)


def build_backend(section: CompileConfig, passes: WeightPasses) -> Backend:
    """Return the backend of a section with these passes. One for all graphs of a process: blocks share theirs by it."""
    name, graph_passes = section.get_backend()
    if graph_passes == "auto_bucketing":
        register_flop_formulas()  # by which it estimates what hides a collective
    build = BUILDERS.get(name)
    compile_graph: Backend = torch._dynamo.lookup_backend(name) if build is None else build(passes, graph_passes)
    _tag_caches(passes, graph_passes)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        with compiler_versions.changing_joint_graph(passes.change_joint):
            return compile_graph(gm, example_inputs, **options)

    return backend


def _build_aot_eager(passes: WeightPasses, graph_passes: str) -> Backend:
    def compile_half(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if graph_passes == "auto_bucketing":
            compiler_versions.overlap_automatically(gm)
        elif passes.joins:
            passes.order(gm.graph)
            gm.recompile()
        return make_boxed_func(gm.forward)

    return aot_autograd(
        fw_compiler=compile_half,
        bw_compiler=compile_half,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )


def _build_inductor(passes: WeightPasses, graph_passes: str) -> Backend:
    # For the whole process: graphs of backward passes may be compiled only when they run.
    if graph_passes == "auto_bucketing":
        compiler_versions.overlap_automatically_in_inductor()
    elif passes.joins:
        inductor_config.post_grad_custom_post_pass = _OrderInInductor(passes)
    return torch._dynamo.lookup_backend("inductor")


class _OrderInInductor(CustomGraphPass):
    """Orders the collectives of a graph, and has inductor keep to that."""

    def __init__(self, passes: WeightPasses) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        compiler_versions.keep_order(graph, self.passes.order(graph))

    def uuid(self) -> Any:
        """Name what a cached graph depends on."""
        return get_hash_for_files((weight_passes.__file__, compiler_versions.__file__), repr(self.passes))


BUILDERS: dict[str, Callable[[WeightPasses, str], Backend]] = {
    "inductor": _build_inductor,
    "aot_eager": _build_aot_eager,
}
"""Of backends that know the passes over forward and backward graphs, by name. Any other has those over joint graphs alone."""


def _tag_caches(passes: WeightPasses, graph_passes: str) -> None:
    """Have graphs cached apart by what torch's keys leave out: passes over the joint graph, and the rank, whose shards may be shorter."""
    source = get_hash_for_files((weight_passes.__file__,)).hex()
    users = torch.compiler.config.cache_key_tag.partition("; simple_fsdp")[0]
    tag = f"{users}; simple_fsdp {graph_passes} {passes} {source} rank {dist.get_rank()}"
    torch.compiler.config.cache_key_tag = tag
