"""Parallelisms that do not fit the model: its plan, its heads, its layers. Imports no torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from models.plan import ParallelPlan
from trainer.config.errors import Problem
from trainer.config.fields import format_choices
from trainer.config.pipeline_layout import LAYERS_PER_STAGE, PARTS, list_stage_modules, plan_pipeline
from trainer.config.schedules import SCHEDULE, SCHEDULE_CSV
from trainer.config.schema_parallel import CompileConfig, ParallelismConfig
from trainer.config.validate_experts import EP, ETP
from trainer.config.validate_parallel import CP, PP, SHARD, TP
from trainer.config.validate_pipeline import find_schedule

_MODEL_KEYS = ("model.name", "model.flavor")
# Numbers in bf16 that make 16 bytes.
_GROUPED_MULTIPLE = 8
_METHOD = "parallelism.context_parallel_method"


class Model(NamedTuple):
    """What the checks know of the model."""

    args: Any
    """See `models.registry.ModelArgs`. What a user's own args do not have is left unchecked."""
    plan: ParallelPlan
    name: str
    """As a message has it: which flavor of which family."""


def find_parallel_model_problems(
    model: Model, parallelism: ParallelismConfig, compilation: CompileConfig | None = None
) -> Iterator[Problem]:
    """Yield what keeps the model from being spread, and compiled, as the settings say."""
    if compilation is not None:
        yield from _check_whole_graph(model, parallelism, compilation)
    if parallelism.tensor_parallel_degree > 1:
        yield from _check_tensor_parallel(model, parallelism)
    if parallelism.context_parallel_degree > 1:
        yield from _check_context_parallel(model, parallelism)
    if parallelism.pipeline_parallel_degree > 1:
        yield from _check_pipeline_parallel(model, parallelism)
    if max(parallelism.expert_parallel_degree, parallelism.expert_tensor_parallel_degree) > 1:
        yield from _check_expert_parallel(model, parallelism)


def _check_whole_graph(model: Model, parallelism: ParallelismConfig, compilation: CompileConfig) -> Iterator[Problem]:
    compiles = compilation.enable and "model" in compilation.components and compilation.scope == "model"
    if compiles and model.plan.experts and parallelism.tensor_parallel_degree > 1:
        message = (
            f"compile.scope = model: {model.name} has experts, which {TP} = {parallelism.tensor_parallel_degree} spreads over ranks: the "
            "exchange of rows can be in no graph. Use block."
        )
        yield Problem(message, ("compile.scope", TP, *_MODEL_KEYS))


def _check_expert_parallel(model: Model, parallelism: ParallelismConfig) -> Iterator[Problem]:
    degree, cut = parallelism.expert_parallel_degree, parallelism.expert_tensor_parallel_degree
    if not model.plan.experts:
        key, value = (EP, degree) if degree > 1 else (ETP, cut)
        yield Problem(f"{key} = {value}: {model.name} has no experts. Use 1.", (key, *_MODEL_KEYS))
        return
    n_experts = getattr(model.args, "n_experts", None) or 0
    if n_experts % degree:
        choices = format_choices(d for d in range(1, n_experts + 1) if n_experts % d == 0)
        message = f"{EP} = {degree}: must divide n_experts = {n_experts} of {model.name}, for each rank to have as many. Use {choices}."
        yield Problem(message, (EP, *_MODEL_KEYS))
    width = getattr(model.args, "moe_hidden_dim", None) or 0
    if cut > 1 and width % (cut * _GROUPED_MULTIPLE):
        message = (
            f"{ETP} = {cut}: moe_hidden_dim = {width} of {model.name} must be a multiple of {cut} x {_GROUPED_MULTIPLE}: rows of a "
            "grouped matrix product begin at multiples of 16 bytes. Use 1, or another width."
        )
        yield Problem(message, (ETP, TP, *_MODEL_KEYS))


def _refuse_without_plan(key: str, degree: int, model: Model, attribute: str, instead: str) -> Problem:
    message = (
        f"{key} = {degree}: {model.name} cannot be split so, since its plan has no `{attribute}` (models.plan.ParallelPlan). "
        f"Use 1, and {instead}."
    )
    return Problem(message, (key, *_MODEL_KEYS))


def _get_heads(args: Any) -> tuple[int, int]:
    """Return the numbers of query heads and of key and value heads; zeros where the args do not tell."""
    heads = getattr(args, "n_heads", None) or 0
    return heads, getattr(args, "n_kv_heads", None) or heads


def _check_tensor_parallel(model: Model, parallelism: ParallelismConfig) -> Iterator[Problem]:
    degree = parallelism.tensor_parallel_degree
    if not model.plan.tp:
        yield _refuse_without_plan(TP, degree, model, "tp", f"shard with {SHARD}")
        return
    heads, kv_heads = _get_heads(model.args)
    widths = {"hidden_dim": getattr(model.args, "hidden_dim", None) or 0}
    if getattr(model.args, "n_shared_experts", 0):
        widths["n_shared_experts x moe_hidden_dim"] = model.args.n_shared_experts * model.args.moe_hidden_dim

    dim, vocabulary = (getattr(model.args, name, None) or 0 for name in ("dim", "vocab_size"))

    def cuts_vocabulary(candidate: int) -> bool:
        return vocabulary % candidate == 0 or dim % candidate == 0  # by rows, or else kept by columns

    def fits(candidate: int) -> bool:
        # Fewer key and value heads than ranks are repeated, each for the same number of ranks.
        kv_heads_fit = kv_heads % candidate == 0 or candidate % kv_heads == 0
        widths_fit = not any(width % candidate for width in widths.values()) and cuts_vocabulary(candidate)
        return heads % candidate == 0 and kv_heads_fit and widths_fit

    if heads and not fits(degree):
        feed_forward = "".join(f", divide {name} = {width}" for name, width in widths.items() if width)
        if not cuts_vocabulary(degree):
            feed_forward += f", divide vocab_size = {vocabulary} or dim = {dim}"
        message = (
            f"{TP} = {degree}: must divide n_heads = {heads} of {model.name}{feed_forward}, and divide n_kv_heads = {kv_heads} "
            f"or be a multiple of it. Use {format_choices(d for d in range(1, heads + 1) if fits(d))}."
        )
        yield Problem(message, (TP, *_MODEL_KEYS))


def _check_context_parallel(model: Model, parallelism: ParallelismConfig) -> Iterator[Problem]:
    degree, tp = parallelism.context_parallel_degree, max(1, parallelism.tensor_parallel_degree)
    if not model.plan.attention:
        yield _refuse_without_plan(
            CP, degree, model, "attention", "activation_checkpoint.mode = full to make room for long sequences"
        )
        return
    all_heads, all_kv_heads = _get_heads(model.args)
    if not all_heads or parallelism.context_parallel_method != "ulysses":
        return
    # Of one tensor-parallel rank. Key and value heads are repeated where there are fewer than ranks.
    heads, kv_heads = max(1, all_heads // tp), max(1, all_kv_heads // tp)

    def fits(candidate: int) -> bool:
        return heads % candidate == 0 and kv_heads % candidate == 0

    if not fits(degree):
        others = [candidate for candidate in range(2, kv_heads + 1) if fits(candidate)]
        remedy = f"Use {format_choices(others)}, or" if others else "Use"
        share = f" on each of {tp} tensor-parallel ranks" if tp > 1 else ""
        message = (
            f"{CP} = {degree} with {_METHOD} = ulysses: the degree must divide the heads, and {model.name} has {heads} query "
            f"heads and {kv_heads} key and value heads{share}. {remedy} {_METHOD} = allgather or ring."
        )
        yield Problem(message, (CP, _METHOD, TP, *_MODEL_KEYS))


def _check_pipeline_parallel(model: Model, parallelism: ParallelismConfig) -> Iterator[Problem]:
    degree = parallelism.pipeline_parallel_degree
    if not model.plan.stages:
        yield _refuse_without_plan(PP, degree, model, "stages", f"shard with {SHARD}")
        return
    if getattr(model.args, "tie_embeddings", False):
        message = (
            f"{PP} = {degree}: {model.name} has tied embeddings, one matrix for the first and the last stage. "
            f"Use 1, and shard with {SHARD} or {TP}."
        )
        yield Problem(message, (PP, *_MODEL_KEYS))
    n_blocks = getattr(model.args, "n_layers", None)
    if n_blocks is None or not _has_schedule(parallelism):
        return
    try:
        plan = model.plan
        modules = list_stage_modules(plan.stages, blocks=plan.blocks, n_blocks=n_blocks, last_stage=plan.last_stage)
        plan_pipeline(parallelism, modules)
    except ValueError as error:
        text = str(error)
        message = text if text.startswith("parallelism.") else f"{PP} = {degree} with {model.name}: {text}"
        yield Problem(message, (PP, PARTS, LAYERS_PER_STAGE, SCHEDULE, SCHEDULE_CSV, *_MODEL_KEYS))


def _has_schedule(parallelism: ParallelismConfig) -> bool:
    """Whether the schedule is there. That it is not has been said already."""
    try:
        find_schedule(parallelism)
    except ValueError:
        return False
    return True
