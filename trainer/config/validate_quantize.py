"""What is wrong with the settings of low precision, as far as it is known without the model."""

from collections.abc import Callable, Iterator

from trainer.config.errors import Problem
from trainer.config.fields import get_leaves, get_value, show
from trainer.config.schema import JobConfig
from trainer.config.schema_quantize import (
    FLOAT8_ALIGNMENT,
    FLOAT8_CONVERTERS,
    FLOAT8_EXPERTS_CONVERTER,
    SPEED_FILTER,
    Float8LinearConfig,
)
from trainer.config.validate_parallel import CP, PP, SHARD, TP, get_degree

CONVERTERS = "model.converters"
SECTION = "quantize.linear.float8"
_RECIPE = f"{SECTION}.recipe_name"
_ALL_GATHER = f"{SECTION}.enable_fsdp_float8_all_gather"
_PRECOMPUTE = f"{SECTION}.precompute_float8_dynamic_scale_for_fsdp"
_PAD = f"{SECTION}.pad_inner_dim"
_KINDS = ("input", "weight", "grad_output")


def uses_float8(config: JobConfig) -> bool:
    """Whether linear layers are to be converted."""
    return not FLOAT8_CONVERTERS.isdisjoint(config.model.converters)


def _check_all_gather(config: JobConfig) -> Iterator[Problem]:
    """Gathering weights in float8 by a recipe, or from a place, that it cannot be done for."""
    section = config.quantize.linear.float8
    if not uses_float8(config) or not section.enable_fsdp_float8_all_gather:
        return
    if (section.recipe_name or "").startswith("rowwise"):
        message = (
            f"{_ALL_GATHER} = true: needs one scale for each weight, and {_RECIPE} = {section.recipe_name} has one for each row, and "
            f"another for each column. Use tensorwise, or {_ALL_GATHER} = false."
        )
        yield Problem(message, (_ALL_GATHER, _RECIPE))
    if config.training.enable_cpu_offload:
        message = (
            f"{_ALL_GATHER} = true: does not go with training.enable_cpu_offload = true, since shards would be cast on the "
            "host. Set one of them to false."
        )
        yield Problem(message, (_ALL_GATHER, "training.enable_cpu_offload"))


# What TransformerEngine's layers and recipes have, too.
_TE_KEYS = {"backend", "recipe_name", "amax_history_len", "amax_compute_algo", "margin", "filter_fqns", "speed_table"}
_TE_KEYS |= {"keep_first_blocks", "keep_last_blocks"}


def _check_te(config: JobConfig) -> Iterator[Problem]:
    """What TransformerEngine's layers cannot be combined with here."""
    backend, section = f"{SECTION}.backend", config.quantize.linear.float8
    if not uses_float8(config) or section.backend != "te":
        return
    if section.recipe_name not in (None, "tensorwise", "delayed"):
        message = f"{backend} = te: has no {_RECIPE} = {section.recipe_name} here. Use tensorwise or delayed, or {backend} = native."
        yield Problem(message, (backend, _RECIPE))
    for key, leaf in get_leaves().items():
        name = key.rpartition(".")[2]
        if key == f"{SECTION}.{name}" and name not in _TE_KEYS and get_value(config, key) != leaf.default:
            message = f"{key} = {show(get_value(config, key))}: is for {backend} = native. Leave it out, or use native."
            yield Problem(message, (key, backend))
    # With its own layers compilation would break, and recomputation would leave its recipe.
    allowed: tuple[tuple[str, bool, str], ...] = (
        (TP, get_degree(config, TP) == 1, "1"),
        (PP, get_degree(config, PP) == 1, "1"),
        ("compile.enable", not (config.compile.enable and "model" in config.compile.components), "false"),
        ("activation_checkpoint.mode", config.activation_checkpoint.mode == "none", "none"),
    )
    for key, is_allowed, value in allowed:
        if not is_allowed:
            message = f"{key} = {show(get_value(config, key))}: does not go with {backend} = te. Use {value}, or {backend} = native."
            yield Problem(message, (key, backend))


def get_scalings(section: Float8LinearConfig) -> dict[str, str]:
    """Return how each kind of tensor is scaled."""
    default = section.recipe_name if section.recipe_name in ("delayed", "static") else "dynamic"
    return {kind: getattr(section, f"scaling_type_{kind}") or default for kind in _KINDS}


def _check_scalings(config: JobConfig) -> Iterator[Problem]:
    """Scales of single tensors by a recipe that has one for each row, and static ones that are given nowhere."""
    section = config.quantize.linear.float8
    if not uses_float8(config):
        return
    if (section.recipe_name or "").startswith("rowwise"):
        for name in (*(f"scaling_type_{kind}" for kind in _KINDS), "write_scales_file"):
            key = f"{SECTION}.{name}"
            if get_value(config, key) is not None:
                message = (
                    f"{key} = {get_value(config, key)}: is for recipes with one scale for each tensor, and {_RECIPE} = "
                    f"{section.recipe_name} has one for each row. Use tensorwise, delayed or static, or leave {name} out."
                )
                yield Problem(message, (key, _RECIPE))
        return
    for kind, scaling in get_scalings(section).items():
        scale_key = f"{SECTION}.static_scale_{kind}"
        if scaling == "static" and get_value(config, scale_key) is None and section.static_scales_file is None:
            key = f"{SECTION}.scaling_type_{kind}"
            message = (
                f"{key} = static: no scale is given. Set {scale_key}, or {SECTION}.static_scales_file to a file that a run with "
                "write_scales_file made."
            )
            yield Problem(message, (key, _RECIPE, scale_key))


def _check_tokens(config: JobConfig) -> Iterator[Problem]:
    """Batches whose tokens the float8 products of a GPU cannot sum over."""
    section, training = config.quantize.linear.float8, config.training
    if not uses_float8(config) or section.pad_inner_dim or section.emulate:
        return
    if section.recipe_name == "rowwise_with_gw_hp":
        return
    in_pipeline = get_degree(config, PP) > 1
    rows_key = "parallelism.pipeline_parallel_microbatch_size" if in_pipeline else "training.local_batch_size"
    rows = get_value(config, rows_key)
    tokens = rows * training.seq_len // (get_degree(config, CP) * get_degree(config, TP))
    if tokens % FLOAT8_ALIGNMENT:  # they are summed over in gradients of weights
        message = (
            f"{rows_key} x training.seq_len = {rows} x {training.seq_len}: a rank's {tokens} tokens must be a multiple of "
            f"{FLOAT8_ALIGNMENT} for products in float8. Set {_PAD} = true, or change the sizes."
        )
        yield Problem(message, (rows_key, "training.seq_len", _PAD, CP, TP))


def _warn_without_converter(config: JobConfig) -> Iterator[Problem]:
    """Settings of float8 that is off."""
    for name in ("fqns", "emulate", "measure_freq"):
        key = f"{FLOAT8_EXPERTS_CONVERTER}.{name}"
        if get_value(config, key) and FLOAT8_EXPERTS_CONVERTER not in config.model.converters:
            message = f"{key} = {show(get_value(config, key))} has no effect: {CONVERTERS} does not name {FLOAT8_EXPERTS_CONVERTER}."
            yield Problem(message, (key, CONVERTERS))
    if uses_float8(config):
        return
    for key, leaf in get_leaves().items():
        if key.startswith(f"{SECTION}.") and key != f"{SECTION}.filter_fqns" and get_value(config, key) != leaf.default:
            message = f"{key} = {show(get_value(config, key))} has no effect: {CONVERTERS} does not name {SECTION}."
            yield Problem(message, (key, CONVERTERS))


def _warn_without_compilation(config: JobConfig) -> Iterator[Problem]:
    """Float8 to no end."""
    section = config.quantize.linear.float8
    if not uses_float8(config) or section.emulate or section.backend == "te":
        return
    if not config.compile.enable or "model" not in config.compile.components:
        message = (
            f"{CONVERTERS} has {SECTION} without compilation of the blocks: every cast is then a few passes over memory, and float8 slower "
            "than bfloat16. Set compile.enable = true."
        )
        yield Problem(message, (CONVERTERS, "compile.enable"))


def _warn_all_gather(config: JobConfig) -> Iterator[Problem]:
    """Gathering in float8 where nothing is gathered, and scales for it that nothing uses."""
    section = config.quantize.linear.float8
    if (
        uses_float8(config)
        and section.precompute_float8_dynamic_scale_for_fsdp
        and not section.enable_fsdp_float8_all_gather
    ):
        yield Problem(f"{_PRECOMPUTE} = true has no effect without {_ALL_GATHER} = true.", (_PRECOMPUTE, _ALL_GATHER))
    shards = get_value(config, SHARD) != 1 or get_degree(config, CP) > 1
    if uses_float8(config) and section.enable_fsdp_float8_all_gather and not shards:
        message = f"{_ALL_GATHER} = true has no effect: {SHARD} and {CP} are 1, so that no weight is gathered."
        yield Problem(message, (_ALL_GATHER, SHARD, CP))


def _warn_unused_scales(config: JobConfig) -> Iterator[Problem]:
    """Settings of a scaling that no tensor has, and a table that nothing reads."""
    section = config.quantize.linear.float8
    if not uses_float8(config):
        return
    scalings = get_scalings(section)
    has_static, has_delayed = "static" in scalings.values(), "delayed" in scalings.values()
    used = {
        **{f"static_scale_{kind}": scaling == "static" for kind, scaling in scalings.items()},
        "static_scales_file": has_static,
        "amax_history_len": has_delayed,
        "amax_compute_algo": has_delayed,
        "delayed_warmup_steps": has_delayed,
        "margin": has_delayed or section.write_scales_file is not None,
    }
    if section.speed_table is not None and SPEED_FILTER not in section.filter_fqns:
        key = f"{SECTION}.speed_table"
        message = (
            f"{key} = {show(section.speed_table)} has no effect: {SECTION}.filter_fqns does not have {SPEED_FILTER!r}."
        )
        yield Problem(message, (key, f"{SECTION}.filter_fqns"))
    for name, is_used in used.items():
        key = f"{SECTION}.{name}"
        value = get_value(config, key)
        if not is_used and value != get_leaves()[key].default:
            yield Problem(f"{key} = {show(value)} has no effect: no tensor is scaled so.", (key, _RECIPE))


Rule = Callable[[JobConfig], Iterator[Problem]]

QUANTIZE_RULES: tuple[Rule, ...] = (_check_all_gather, _check_scalings, _check_tokens, _check_te)

QUANTIZE_WARNING_RULES: tuple[Rule, ...] = (
    _warn_without_converter,
    _warn_without_compilation,
    _warn_all_gather,
    _warn_unused_scales,
)
