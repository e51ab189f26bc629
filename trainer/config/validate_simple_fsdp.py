"""What SimpleFSDP, and the compilation of a whole model, do not go with, as far as it is known without the model."""

from collections.abc import Callable, Iterator

from trainer.config.errors import Problem
from trainer.config.fields import get_value
from trainer.config.schema import JobConfig
from trainer.config.validate_experts import EP
from trainer.config.validate_parallel import PP, compiles_model, get_degree

IMPLEMENTATION = "parallelism.data_parallel_implementation"
BACKEND = "compile.backend"
OVERRIDE = "compile.model_backend_override"
PASSES = "compile.graph_passes"
SCOPE = "compile.scope"
_RESHARD = "parallelism.fsdp_reshard_after_forward"


def is_simple(config: JobConfig) -> bool:
    """Whether data parallelism is SimpleFSDP's."""
    return config.parallelism.data_parallel_implementation == "simple_fsdp"


def _check_company(config: JobConfig) -> Iterator[Problem]:
    """What hangs on FSDP2's own hooks."""
    if not is_simple(config):
        return
    section = config.parallelism
    refused = (
        ("training.enable_cpu_offload", config.training.enable_cpu_offload, "it gathers on the device. Use false"),
        (
            "parallelism.fsdp_collectives",
            section.fsdp_collectives == "copy_engine",
            "the compiler knows no other collectives than the process group's. Use nccl",
        ),
        (
            "parallelism.fsdp_accumulation",
            section.fsdp_accumulation == "unsharded",
            "each backward pass reduces its gradients. Use auto or sharded",
        ),
        (
            "training.gradient_wire_dtype",
            config.training.gradient_wire_dtype is not None,
            "it reduces by the process group's own reduce-scatter. Leave it out",
        ),
        (
            "parallelism.enable_async_tensor_parallel",
            section.enable_async_tensor_parallel and section.tensor_parallel_degree > 1,
            "inductor's pass for it was never tried on graphs that gather weights. Use false",
        ),
    )
    for key, applies, reason in refused:
        if applies:
            message = f"{key}: does not go with {IMPLEMENTATION} = simple_fsdp: {reason}, or {IMPLEMENTATION} = fsdp2."
            yield Problem(message, (key, IMPLEMENTATION))


def _check_passes(config: JobConfig) -> Iterator[Problem]:
    """Passes over graphs that hold no collectives of weights, or are none of a backend that has passes."""
    backend, passes = config.compile.get_backend()
    given = BACKEND if config.compile.model_backend_override is None else OVERRIDE
    key = PASSES if get_value(config, given) == backend else given
    value = get_value(config, key)
    if passes == "none" or not compiles_model(config):
        return
    if not is_simple(config):
        message = (
            f"{key} = {value}: there are collectives of weights in compiled graphs with {IMPLEMENTATION} = simple_fsdp alone. Set "
            f"that, or {given} = {backend} and {PASSES} = none."
        )
        yield Problem(message, (key, IMPLEMENTATION))
    if backend not in ("aot_eager", "inductor"):
        message = (
            f"{key} = {value}: only aot_eager and inductor have passes. Use one of them as {given}, or {PASSES} = none."
        )
        yield Problem(message, (key, BACKEND, PASSES))
    if key != PASSES and config.compile.graph_passes == "transformer_block_bucketing":
        message = f"{key} = {value}: already says which passes, and {PASSES} = {config.compile.graph_passes} others. Use {key} = {backend}."
        yield Problem(message, (key, PASSES))


def _check_scope(config: JobConfig) -> Iterator[Problem]:
    """One graph of all of a model in which something has to happen outside of graphs."""
    if config.compile.scope != "model" or not compiles_model(config):
        return
    if not is_simple(config):
        message = f"{SCOPE} = model: the hooks of FSDP2 around each block can be in no graph. Use block, or {IMPLEMENTATION} = simple_fsdp."
        yield Problem(message, (SCOPE, IMPLEMENTATION))
    if get_degree(config, EP) > 1:
        message = (
            f"{SCOPE} = model: the exchange of rows between ranks with {EP} = {config.parallelism.expert_parallel_degree} can be in no "
            "graph, since the host has to know how many there are. Use block."
        )
        yield Problem(message, (SCOPE, EP))


def _warn_without_effect(config: JobConfig) -> Iterator[Problem]:
    """Settings of SimpleFSDP that do nothing beside others."""
    section = config.parallelism
    if not is_simple(config):
        return
    if section.fsdp_prefetch:
        message = f"parallelism.fsdp_prefetch = {section.fsdp_prefetch} has no effect with {IMPLEMENTATION} = simple_fsdp: {PASSES} says when to gather."
        yield Problem(message, ("parallelism.fsdp_prefetch", IMPLEMENTATION))
    frees = section.fsdp_reshard_after_forward == "always" or get_degree(config, PP) == 1
    if not compiles_model(config) and section.fsdp_reshard_after_forward != "never" and frees:
        message = (
            f"{IMPLEMENTATION} = simple_fsdp without compile.enable keeps all gathered weights from forward to backward, whatever "
            f"{_RESHARD} says: it is the compiler that gathers them anew. Set compile.enable = true with model in compile.components."
        )
        yield Problem(message, (IMPLEMENTATION, "compile.enable", _RESHARD))
    if compiles_model(config) and config.compile.scope == "block" and get_degree(config, EP) == 1:
        message = (
            f"{SCOPE} = block with {IMPLEMENTATION} = simple_fsdp gathers the weights of a block when it begins, and nothing hides that: "
            f"its graph does not reach into the next. Set {SCOPE} = model and {PASSES} = transformer_block_bucketing."
        )
        yield Problem(message, (SCOPE, IMPLEMENTATION, PASSES))


Rule = Callable[[JobConfig], Iterator[Problem]]

SIMPLE_FSDP_RULES: tuple[Rule, ...] = (_check_company, _check_passes, _check_scope)

SIMPLE_FSDP_WARNING_RULES: tuple[Rule, ...] = (_warn_without_effect,)
