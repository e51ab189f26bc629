"""What is wrong with the parallelisms of a configuration, as far as it is known without the model.

`trainer.preflight_parallel` has the rules that need the model, `validate_pipeline` those about pipeline schedules alone.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from math import prod

from trainer.config.errors import Problem
from trainer.config.fields import format_choices, get_leaves, get_value, show
from trainer.config.schema import JobConfig

TP = "parallelism.tensor_parallel_degree"
CP = "parallelism.context_parallel_degree"
PP = "parallelism.pipeline_parallel_degree"
REPLICATE = "parallelism.data_parallel_replicate_degree"
SHARD = "parallelism.data_parallel_shard_degree"

DEGREES = (REPLICATE, SHARD, CP, TP, PP)

_BALANCER = "parallelism.context_parallel_load_balancer"
_METHOD = "parallelism.context_parallel_method"
_ROTATE = "parallelism.context_parallel_rotate_method"
_ASYNC_TP = "parallelism.enable_async_tensor_parallel"
_COLLECTIVES = "parallelism.fsdp_collectives"
_PREFETCH = "parallelism.fsdp_prefetch"
_RESHARD = "parallelism.fsdp_reshard_after_forward"
_WIRE = "training.gradient_wire_dtype"

# Settings that say how a parallelism is done, by the degree above 1 that they need to do anything.
_DETAILS = {
    TP: (_ASYNC_TP, "parallelism.disable_loss_parallel"),
    CP: (_METHOD, _BALANCER, _ROTATE),
    PP: (
        "parallelism.module_fqns_per_model_part",
        "parallelism.pipeline_parallel_first_stage_less_layers",
        "parallelism.pipeline_parallel_last_stage_less_layers",
        "parallelism.pipeline_parallel_layers_per_stage",
        "parallelism.pipeline_parallel_schedule",
        "parallelism.pipeline_parallel_schedule_csv",
        "parallelism.pipeline_parallel_microbatch_size",
    ),
}


def get_degree(config: JobConfig, key: str) -> int:
    """Return a degree, or 1 where it is less: that has been said, and no rule should divide by it."""
    return max(1, get_value(config, key))


def list_multiples_near(value: int, step: int) -> list[int]:
    """Return the positive multiples of `step` next to `value`, which is none."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def find_degree_problems(config: JobConfig, world_size: int) -> list[Problem]:
    """Parallel degrees whose product is not the number of processes."""
    degrees = {key: get_value(config, key) for key in DEGREES}
    product = 1
    for key, degree in degrees.items():
        product *= 1 if key == SHARD and degree == -1 else degree
    written = ", ".join(f"{key} = {degree}" for key, degree in degrees.items() if degree != 1)
    if degrees[SHARD] == -1:
        if world_size % product:
            message = (
                f"{written}: the other degrees multiply to {product}, which does not divide the {world_size} processes. "
                f"Lower a degree, or start a multiple of {product} processes."
            )
            return [Problem(message, DEGREES)]
    elif product != world_size:
        message = (
            f"{written or 'all parallel degrees = 1'}: they multiply to {product}, but there are {world_size} processes. "
            f"Set {SHARD} = -1 to take what the others leave, or start {product} processes (NGPU={product})."
        )
        return [Problem(message, DEGREES)]
    return []


def resolve_shard_degree(config: JobConfig, world_size: int) -> JobConfig:
    """Return the configuration with a shard degree of -1 replaced by what the others leave. They must fit the processes."""
    section = config.parallelism
    if section.data_parallel_shard_degree != -1:
        return config
    others = prod(get_value(config, key) for key in DEGREES if key != SHARD)
    resolved = dataclasses.replace(section, data_parallel_shard_degree=world_size // others)
    return dataclasses.replace(config, parallelism=resolved)


def find_batch_problems(config: JobConfig, world_size: int, wrong_alone: Collection[str]) -> list[Problem]:
    """A global batch that does not come out even over the data-parallel ranks."""
    keys = ("training.global_batch_size", "training.local_batch_size")
    training = config.training
    ranks = world_size // (get_degree(config, TP) * get_degree(config, CP) * get_degree(config, PP))
    in_one_pass = training.local_batch_size * ranks
    if training.global_batch_size == -1 or set(wrong_alone).intersection(keys):
        return []
    if training.global_batch_size % in_one_pass == 0:
        return []
    near = format_choices(list_multiples_near(training.global_batch_size, in_one_pass))
    message = (
        f"training.global_batch_size = {training.global_batch_size}: must be a multiple of training.local_batch_size "
        f"x data-parallel ranks = {training.local_batch_size} x {ranks} = {in_one_pass}. Use {near}, "
        "or another local batch size."
    )
    return [Problem(message, keys)]


def _check_sequence_lengths(config: JobConfig) -> Iterator[Problem]:
    """Sequences that ranks cannot share evenly: context and tensor parallelism give each an equal part."""
    factors = {key: get_degree(config, key) for key in (TP, CP) if get_degree(config, key) > 1}
    section = config.parallelism
    if (
        CP in factors
        and section.context_parallel_load_balancer == "headtail"
        and section.context_parallel_method != "ulysses"
    ):
        factors[f"2 parts a rank ({_BALANCER} = headtail)"] = 2
    parts = prod(factors.values())
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    involved = tuple(key for key in (TP, CP) if key in factors)
    for key, length in lengths.items():
        if length % parts:
            near = format_choices(list_multiples_near(length, parts))
            product = f" = {' x '.join(map(str, factors.values()))}" if len(factors) > 1 else ""
            message = (
                f"{key} = {length}: must be a multiple of {' x '.join(factors)}{product} = {parts}, for all ranks to get "
                f"equal parts of a sequence. Use {near}, or other degrees."
            )
            yield Problem(message, (key, *involved))


def _check_context_parallel(config: JobConfig) -> Iterator[Problem]:
    """Ways to cut sequences and to attend over ranks that are not there, or not for document masks."""
    section = config.parallelism
    if section.context_parallel_degree <= 1:
        return
    if section.context_parallel_load_balancer == "ptrr":
        message = f"{_BALANCER} = ptrr: is not available. Use headtail, or none for one contiguous part a rank."
        yield Problem(message, (_BALANCER, CP))
    if section.context_parallel_method == "ring" and config.model.attn_mask_type == "block_causal":
        message = (
            f"{_METHOD} = ring: cannot keep attention inside documents (model.attn_mask_type = block_causal), since it knows "
            "no mask but the causal one. Use allgather or ulysses, or model.attn_mask_type = causal."
        )
        yield Problem(message, (_METHOD, "model.attn_mask_type", CP))


def _check_async_tensor_parallel(config: JobConfig) -> Iterator[Problem]:
    """Async tensor parallelism without the compiler, which is what joins matmuls and their communication."""
    section = config.parallelism
    if section.tensor_parallel_degree <= 1 or not section.enable_async_tensor_parallel:
        return
    if not compiles_model(config):
        reason, remedy = "the model is not compiled", "Set compile.enable = true with model in compile.components"
    elif config.compile.get_backend()[0] != "inductor":
        reason, remedy = f"compile.backend = {config.compile.backend}", "Set compile.backend = inductor"
    else:
        return
    message = (
        f"{_ASYNC_TP} = true: joins matmuls and their communication in the compiler inductor, but {reason}, so that nothing would "
        f"happen. {remedy}, or {_ASYNC_TP} = false."
    )
    yield Problem(message, (_ASYNC_TP, TP, "compile.enable", "compile.components", "compile.backend"))


def _check_muon(config: JobConfig) -> Iterator[Problem]:
    """Muon with matrices that are cut in two ways and lie in host memory."""
    tensor_parallel = config.parallelism.tensor_parallel_degree > 1
    if config.optimizer.name == "Muon" and tensor_parallel and config.training.enable_cpu_offload:
        message = (
            f"optimizer.name = Muon: does not go with training.enable_cpu_offload = true and {TP} above 1 together: it would "
            "gather whole matrices on the GPU, and have their updates there. Use AdamW, or leave one of the others out."
        )
        yield Problem(message, ("optimizer.name", "training.enable_cpu_offload", TP))


def _check_copy_engine(config: JobConfig) -> Iterator[Problem]:
    """Copy engines under a pipeline, whose stages gather and reduce in an order that they were never tried in."""
    degree = config.parallelism.pipeline_parallel_degree
    if degree > 1 and config.parallelism.fsdp_collectives == "copy_engine":
        message = (
            f"{_COLLECTIVES} = copy_engine: is not available with {PP} = {degree}, since each stage would need buffers of its "
            "own, in the order of its schedule. Use nccl or auto."
        )
        yield Problem(message, (_COLLECTIVES, PP))


def _check_gradient_wire(config: JobConfig) -> Iterator[Problem]:
    """Gradients in float8 where something else carries them."""
    section = config.parallelism
    if config.training.gradient_wire_dtype is None:
        return
    if section.fsdp_collectives != "nccl":
        message = (
            f"{_WIRE} = float8: is carried by the process group, and {_COLLECTIVES} = {section.fsdp_collectives} has gradients "
            f"carried by copy engines. Use {_COLLECTIVES} = nccl, or leave {_WIRE} out."
        )
        yield Problem(message, (_WIRE, _COLLECTIVES))
    if not _shards(config) and section.data_parallel_replicate_degree > 1:
        message = (
            f"{_WIRE} = float8: is for the gradients of weights that FSDP shards, and {SHARD} = 1 leaves replicas, whose gradients "
            f"are all-reduced. Set {SHARD} above 1 (or -1), or leave {_WIRE} out."
        )
        yield Problem(message, (_WIRE, SHARD, CP, REPLICATE))


def _shards(config: JobConfig) -> bool:
    """Whether FSDP shards weights. A shard degree of -1, which only the number of processes resolves, may."""
    return config.parallelism.data_parallel_shard_degree != 1 or config.parallelism.context_parallel_degree > 1


def _warn_details_without_degree(config: JobConfig) -> Iterator[Problem]:
    """Settings of a parallelism that is off."""
    for degree_key, keys in _DETAILS.items():
        if get_value(config, degree_key) != 1:
            continue
        for key in keys:
            value = get_value(config, key)
            if value != get_leaves()[key].default:
                yield Problem(f"{key} = {show(value)} has no effect: {degree_key} is 1.", (key, degree_key))


def _warn_parallel(config: JobConfig) -> Iterator[Problem]:
    """Settings without effect beside other settings of the same parallelism."""
    section = config.parallelism
    rotates = section.context_parallel_rotate_method != get_leaves()[_ROTATE].default
    if section.context_parallel_degree > 1 and rotates and section.context_parallel_method != "ring":
        message = (
            f"{_ROTATE} = {section.context_parallel_rotate_method} has no effect: it belongs to {_METHOD} = ring, and that "
            f"is {section.context_parallel_method}."
        )
        yield Problem(message, (_ROTATE, _METHOD))
    if _shards(config):
        return
    replicates = section.data_parallel_replicate_degree > 1
    # Tensor parallelism has FSDP shard experts over its ranks.
    is_whole = section.tensor_parallel_degree == 1
    unused = {
        _COLLECTIVES: section.fsdp_collectives == "copy_engine",
        _WIRE: config.training.gradient_wire_dtype is not None and not replicates,
        _PREFETCH: section.fsdp_prefetch > 0 and is_whole,
        # Without replicas it still says when copies in another dtype are freed.
        _RESHARD: section.fsdp_reshard_after_forward != "default" and is_whole and replicates,
    }
    for key in (key for key, is_set in unused.items() if is_set):
        message = f"{key} = {get_value(config, key)} has no effect: {SHARD} and {CP} are 1, so that no weight is sharded by FSDP."
        yield Problem(message, (key, SHARD, CP))


def _warn_costs(config: JobConfig) -> Iterator[Problem]:
    """What is right, but slower than it looks."""
    if config.optimizer.name == "Muon" and config.parallelism.tensor_parallel_degree > 1:
        message = (
            f"optimizer.name = Muon with {TP} = {config.parallelism.tensor_parallel_degree}: every GPU gathers each whole matrix "
            "and orthogonalizes it, where without tensor parallelism they share that work out."
        )
        yield Problem(message, ("optimizer.name", TP))


def compiles_model(config: JobConfig) -> bool:
    """Whether the blocks of the model are compiled."""
    return config.compile.enable and "model" in config.compile.components


Rule = Callable[[JobConfig], Iterator[Problem]]

PARALLEL_RULES: tuple[Rule, ...] = (
    _check_sequence_lengths,
    _check_context_parallel,
    _check_async_tensor_parallel,
    _check_muon,
    _check_copy_engine,
    _check_gradient_wire,
)

PARALLEL_WARNING_RULES: tuple[Rule, ...] = (_warn_details_without_degree, _warn_parallel, _warn_costs)
