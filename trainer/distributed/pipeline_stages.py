"""The parts of a model that one rank of a pipeline has.

What is asked of a model, besides a plan with `stages`: a module that the plan names there may be missing, a block from
the container that holds it, another by being None. `forward(inputs, *, labels, loss_fn, ...)` then runs what is there:
without its first module it takes hidden states (batch, seq, dim) for tokens, without its last it returns them and gets
neither labels nor loss_fn. The other arguments (positions, mask) go to every stage. `param_inits` lists the parameters
that are there. A model with a loss beside the one of its output, made anywhere in it, has an attribute `loss_gradient`: a
stage that is not the last finds there what all losses are multiplied with, and adds that loss's gradient itself.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from models.plan import ParallelPlan, match_modules
from trainer.config.pipeline_layout import PipelineLayout, list_stage_modules, plan_pipeline
from trainer.config.schema_parallel import ParallelismConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, on this rank."""

    index: int
    module: nn.Module
    """The part of the model. Its children are those of the model, the same objects."""
    layout: PipelineLayout
    """The whole pipeline."""
    copied: tuple[str, ...] = ()
    """Modules of the first stage of which the last one has copies (`models.plan.ParallelPlan.last_stage_copies`)."""

    @property
    def is_first(self) -> bool:
        """Whether it takes tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it gives the loss."""
        return self.index == len(self.layout.stages) - 1


def split_into_stages(
    model: nn.Module, *, plan: ParallelPlan, parallelism: ParallelismConfig, rank: int
) -> list[Stage]:
    """Leave in `model`, still on the meta device, what rank `rank` of the pipeline has, and return its stages in order.

    Names stay, so that optimizer, checkpoints and first weights go by `model` as ever; its own forward is not for use
    any more. Techniques that change modules may go by `model` or by the stages, but what hooks into a whole (FSDP's
    root) goes by the stages. Copies of modules that the plan wants in the last stage stay in `model` until `separate_copies`.

    Raises:
        ValueError: such stages cannot be made, or the schedule cannot run them; `plan_pipeline` has the rules.
    """
    n_blocks = len(match_modules(plan.blocks, [name for name, _ in model.named_modules()]))
    modules = list_stage_modules(plan.stages, blocks=plan.blocks, n_blocks=n_blocks, last_stage=plan.last_stage)
    layout = plan_pipeline(parallelism, modules)
    units = {module.name for module in modules}
    _check_whole(model, units)
    last = len(layout.stages) - 1
    kept = {
        index: {*layout.stages[index], *(plan.last_stage_copies if index == last else ())}
        for index in layout.stages_of(rank)
    }
    stages = [
        Stage(index, _copy_part(model, units - names), layout, plan.last_stage_copies) for index, names in kept.items()
    ]
    _drop(model, units.difference(*kept.values()))
    return stages


def separate_copies(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Take the last stage's copies of modules out of `model`, which is left with parameters of its own alone.

    After tensor parallelism, which goes by `model`, and before data parallelism, which goes by the stages.
    """
    for stage in stages:
        for name in stage.copied if stage.is_last else ():
            if any(other.is_first for other in stages):
                setattr(stage.module, name, _copy_leaf(model.get_submodule(name)))
            else:
                _drop(model, [name])


def _copy_leaf(module: nn.Module) -> nn.Module:
    """Return a copy of a module without children, with parameters of its own, on the meta device as they are."""
    assert not list(module.children()), "only modules without children are copied"
    part = _copy_part(module, ())
    for name, parameter in module.named_parameters(recurse=False):
        part._parameters[name] = nn.Parameter(torch.empty_like(parameter.detach()), parameter.requires_grad)
    return part


def _check_whole(model: nn.Module, units: Collection[str]) -> None:
    """Check that each parameter belongs to one unit.

    Raises:
        ValueError: one belongs to none or to several, so that it would be in several stages, each with a gradient of
            its own.
    """
    units_of: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        holders = {prefix for end in range(len(parts)) if (prefix := ".".join(parts[:end])) in units}
        if not holders:
            raise ValueError(f"{name} is in none of the plan's `stages`, so that no stage of a pipeline has it")
        units_of.setdefault(parameter, set()).update(holders)
    for shared in units_of.values():
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(sorted(shared))} share a parameter, which stages of a pipeline cannot (tied "
                "embeddings). Set parallelism.pipeline_parallel_degree = 1, or use a model.flavor without tied "
                "embeddings"
            )


def _copy_part(module: nn.Module, dropped: Collection[str], prefix: str = "") -> nn.Module:
    """Return a copy of `module` without the dropped modules. The containers of these are copied too, all else is
    shared."""
    part = copy.copy(module)
    # Tables of children and of hooks are the copy's own; what they hold is shared. Buffers are given memory in one place.
    part.__dict__.update(
        {
            key: copy.copy(value)
            for key, value in vars(module).items()
            if isinstance(value, dict | set) and key != "_buffers"
        }
    )
    for name, child in module.named_children():
        full_name = f"{prefix}{name}"
        if any(other.startswith(f"{full_name}.") for other in dropped):
            part._modules[name] = _copy_part(child, dropped, f"{full_name}.")
    if not prefix:
        _drop(part, dropped)
    return part


def _drop(model: nn.Module, names: Collection[str]) -> None:
    """Take modules out of a model: out of the container that holds them, or by putting None in their place."""
    for full_name in names:
        parent_name, _, name = full_name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.ModuleDict):
            del parent[name]
        else:
            setattr(parent, name, None)
