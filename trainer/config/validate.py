"""What is wrong with a configuration in itself: ranges, and settings that do not go together.

Imports no torch, and looks at nothing but the configuration, the number of processes and the file system.
What depends on the model, the tokenizer or the data set is checked by `trainer.preflight`.
"""

import fnmatch
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from trainer.config.changes import MODEL_ARGS
from trainer.config.durations import parse_duration
from trainer.config.errors import Problem
from trainer.config.fields import get_leaves, get_value, show, suggest
from trainer.config.ranges import find_range_problems
from trainer.config.schema import JobConfig
from trainer.config.unavailable import find_refusals, find_settings_without_effect
from trainer.config.validate_experts import EXPERT_RULES, find_lent_ranks_problems
from trainer.config.validate_optimizer import OPTIMIZER_RULES
from trainer.config.validate_parallel import (
    DEGREES,
    PARALLEL_RULES,
    PARALLEL_WARNING_RULES,
    find_batch_problems,
    find_degree_problems,
    resolve_shard_degree,
)
from trainer.config.validate_pipeline import PIPELINE_RULES, PIPELINE_WARNING_RULES
from trainer.config.validate_quantize import QUANTIZE_RULES, QUANTIZE_WARNING_RULES
from trainer.config.validate_simple_fsdp import SIMPLE_FSDP_RULES, SIMPLE_FSDP_WARNING_RULES

CHECKPOINT_PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state", "float8", "rng")

_NOT_EMPTY = (
    "job.dump_folder",
    "profiling.save_traces_folder",
    "profiling.save_memory_snapshot_folder",
    "metrics.save_tb_folder",
    "model.name",
    "model.flavor",
    "model.hf_assets_path",
    "optimizer.name",
    "training.dataset",
    "data.cache_dir",
    "data.text_key",
    "data.split",
    "checkpoint.folder",
    "compile.backend",
    "comm.save_traces_folder",
    "validation.dataset",
)


def find_problems(
    config: JobConfig, *, world_size: int | None, broken_keys: Collection[str] = ()
) -> tuple[list[Problem], list[Problem]]:
    """Everything that keeps the configuration from being run, and everything that is only worth a warning.

    Args:
        config: the configuration.
        world_size: number of processes; None leaves out the rules about it.
        broken_keys: settings whose value could not be read, so that `config` has another: what involves them is left out.

    Returns:
        Problems and warnings.
    """
    problems = [*find_range_problems(config), *find_refusals(config)]
    # A rule about several settings would only repeat, confusingly, that one of them is wrong in itself.
    wrong_alone = {key for problem in problems for key in problem.keys} | set(broken_keys)
    of_world: list[Problem] = []
    if world_size is not None and not wrong_alone.intersection(DEGREES):
        of_world = find_degree_problems(config, world_size)
        if not of_world:
            config = resolve_shard_degree(config, world_size)
            of_world = find_batch_problems(config, world_size, wrong_alone)
            of_world += find_lent_ranks_problems(config, world_size)
    for rule in _RULES:
        problems.extend(p for p in rule(config) if not wrong_alone.intersection(p.keys))
    problems.extend(p for p in of_world if not wrong_alone.intersection(p.keys))
    warnings = [*find_settings_without_effect(config)]
    for rule in _WARNING_RULES:
        warnings.extend(rule(config))

    def readable(found: list[Problem]) -> list[Problem]:
        return [p for p in found if not set(broken_keys).intersection(p.keys)]

    return readable(problems), [w for w in readable(warnings) if not wrong_alone.intersection(w.keys)]


def _check_not_empty(config: JobConfig) -> Iterator[Problem]:
    for key in _NOT_EMPTY:
        if not get_value(config, key).strip():
            yield Problem(f'{key} = "": must not be empty.', (key,))


def _check_job(config: JobConfig) -> Iterator[Problem]:
    folder = Path(config.job.dump_folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    key = "job.dump_folder"
    if not existing.is_dir():
        yield Problem(f"{key} = {folder}: {existing} is a file. Name a folder.", (key,))
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem(f"{key} = {folder}: no permission to write in {existing}. Name another folder.", (key,))
    limit = config.job.time_limit
    if limit is not None and not parse_duration(limit):
        yield Problem(
            f"job.time_limit = {limit}: must be a time above 0, such as 3:50:00 or 1-12:00:00.", ("job.time_limit",)
        )
    save_key, save_file = "job.save_config_file", config.job.save_config_file
    if save_file is not None and not save_file.strip():
        yield Problem(f'{save_key} = "": must not be empty. Leave it out: config.toml is always written.', (save_key,))


def _check_profiling(config: JobConfig) -> Iterator[Problem]:
    section = config.profiling
    needed = section.profiler_warmup + section.profiler_active
    if section.enable_profiling and section.profile_freq < needed:
        message = (
            f"profiling.profile_freq = {section.profile_freq}: must be at least profiler_warmup + profiler_active = "
            f"{section.profiler_warmup} + {section.profiler_active} = {needed}."
        )
        keys = ("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active")
        yield Problem(message, keys)


def _check_metrics(config: JobConfig) -> Iterator[Problem]:
    for key, module, extra in (
        ("metrics.enable_wandb", "wandb", "wandb"),
        ("metrics.enable_tensorboard", "tensorboard", "tensorboard"),
    ):
        if get_value(config, key) and importlib.util.find_spec(module) is None:
            message = f"{key} = true: the package {module} is not installed. Install it (pip install {extra}),"
            yield Problem(f"{message} or set {key} = false.", (key,))


def _check_data(config: JobConfig) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        if not source.dataset.strip():
            message = f"data.sources, item {index + 1}: dataset is missing. It names the data set, as training.dataset."
            yield Problem(message, ("data.sources",))
    names = Counter(source.name or source.dataset for source in config.data.sources)
    for name in (name for name, count in names.items() if count > 1 and name.strip()):
        message = (
            f"data.sources: several sources are called {name}. Give each its own name, to tell them apart in logs."
        )
        yield Problem(message, ("data.sources",))


def _check_streaming(config: JobConfig) -> Iterator[Problem]:
    """What takes all documents, or an index of them, where they are read one after the other."""
    data, key = config.data, "data.streaming"
    if not data.streaming:
        return
    remedy = f"Set {key} = false to have the data prepared"
    if data.packing != "concat":
        message = f"data.packing = {data.packing}: looks at all documents first, which {key} = true cannot. {remedy}, or use concat."
        yield Problem(message, ("data.packing", key))
    if len(data.sources) > 1:
        yield Problem(f"data.sources: {len(data.sources)} sources, and {key} = true reads one. {remedy}, or leave one.", ("data.sources", key))  # fmt: skip
    name_key = "data.sources" if data.sources else "training.dataset"
    names = [source.dataset for source in data.sources] or [config.training.dataset]
    if names == ["prepared"]:
        message = (
            f"{name_key}: prepared token files need no streaming, and {key} = true cannot read them. Set {key} = false."
        )
        yield Problem(message, (name_key, key))


def _check_checkpoint(config: JobConfig) -> Iterator[Problem]:
    section = config.checkpoint
    if not section.enable:
        # Each of these, ignored, would quietly start from random weights or write nothing.
        wanted = {
            "checkpoint.load_step": section.load_step != -1,
            "checkpoint.initial_load_path": section.initial_load_path is not None,
            "checkpoint.initial_load_in_hf": section.initial_load_in_hf,
            "checkpoint.last_save_in_hf": section.last_save_in_hf,
            "checkpoint.load_only": section.load_only,
            "checkpoint.create_seed_checkpoint": section.create_seed_checkpoint,
        }
        for key in (key for key, is_set in wanted.items() if is_set):
            message = f"{key} = {show(get_value(config, key))}: needs checkpoint.enable = true, or leave it out."
            yield Problem(message, (key, "checkpoint.enable"))
    if section.last_save_in_hf and not section.last_save_model_only:
        message = "checkpoint.last_save_in_hf = true: needs checkpoint.last_save_model_only = true."
        yield Problem(message, ("checkpoint.last_save_in_hf", "checkpoint.last_save_model_only"))
    if section.initial_load_in_hf and not section.initial_load_model_only:
        message = "checkpoint.initial_load_in_hf = true: needs checkpoint.initial_load_model_only = true: such files hold weights alone."
        yield Problem(message, ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only"))
    if section.create_seed_checkpoint and section.load_only:
        message = "checkpoint.create_seed_checkpoint = true: cannot save with checkpoint.load_only = true. Set one."
        yield Problem(message, ("checkpoint.create_seed_checkpoint", "checkpoint.load_only"))
    for part in section.exclude_from_loading:
        if part not in CHECKPOINT_PARTS:
            key = "checkpoint.exclude_from_loading"
            near = suggest(part, CHECKPOINT_PARTS)
            message = f"{key}: {part} is no part of a checkpoint.{near} Parts: {', '.join(CHECKPOINT_PARTS)}."
            yield Problem(message, (key,))
    for glob in section.allow_config_change:
        if not fnmatch.filter(get_leaves(), glob) and not glob.startswith(MODEL_ARGS):
            key = "checkpoint.allow_config_change"
            near = suggest(glob, get_leaves())
            yield Problem(f"{key}: {glob} matches no setting.{near} Name dotted keys, or globs of them.", (key,))
    if section.enable and section.initial_load_path is not None:
        path = Path(section.initial_load_path)
        if "://" not in section.initial_load_path and not path.is_dir():
            key = "checkpoint.initial_load_path"
            yield Problem(f"{key} = {path}: there is no such folder. Name the folder of one checkpoint.", (key,))


def _check_places(config: JobConfig) -> Iterator[Problem]:
    """Folders on a disk, and URLs of stores, each where it belongs."""
    for key in ("job.dump_folder", "checkpoint.folder"):
        if "://" in get_value(config, key):
            message = f"{key} = {get_value(config, key)}: must be on a disk. Checkpoints are copied to a store with "
            yield Problem(f"{message}checkpoint.remote_folder.", (key,))
    key, remote = "checkpoint.remote_folder", config.checkpoint.remote_folder
    if remote is not None and "://" not in remote:
        yield Problem(f"{key} = {remote}: must be a URL, such as s3://bucket/run. A disk is job.dump_folder.", (key,))
    if remote is not None and not config.checkpoint.enable:
        yield Problem(f"{key} = {remote}: needs checkpoint.enable = true, or leave it out.", (key, "checkpoint.enable"))


def _check_credentials(config: JobConfig) -> Iterator[Problem]:
    """Settings are written to logs, reports and checkpoints, where no password belongs."""
    for key in get_leaves():
        if _CREDENTIALS.search(str(get_value(config, key))):
            message = f"{key}: the URL has a user or password in it, which would be written down with the settings."
            yield Problem(f"{message} Give them as the store's package reads them: by environment or file.", (key,))


_CREDENTIALS = re.compile(r"://[^/\s'\"]*@|://\S*[?&](?:[^=&]*(?:key|secret|token|password|sig)[^=&]*)=", re.IGNORECASE)


def _check_read_timeout(config: JobConfig) -> Iterator[Problem]:
    key, comm_key = "data.read_timeout_seconds", "comm.train_timeout_seconds"
    limit, of_collectives = config.data.read_timeout_seconds, config.comm.train_timeout_seconds
    if config.data.streaming and limit >= of_collectives:
        message = f"{key} = {limit}: must be below {comm_key} = {of_collectives}, so that a slow source is told as one,"
        yield Problem(
            f"{message} and not as ranks that wait for each other. Lower it, or raise {comm_key}.", (key, comm_key)
        )


def _check_rollback(config: JobConfig) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    for key in ("training.nonfinite_policy", "training.spike_policy"):
        if get_value(config, key) == "rollback" and not (checkpoint.enable and not checkpoint.load_only):
            message = (
                f"{key} = rollback: needs checkpoints to go back to (checkpoint.enable = true, and not load_only)."
            )
            yield Problem(f"{message} Set them, or take skip.", (key, "checkpoint.enable", "checkpoint.load_only"))


def _check_compile(config: JobConfig) -> Iterator[Problem]:
    if config.compile.enable and not config.compile.components:
        keys = ("compile.components", "compile.enable")
        yield Problem("compile.components = []: name model, loss or both, or set compile.enable = false.", keys)


def _check_activation_checkpoint(config: JobConfig) -> Iterator[Problem]:
    section = config.activation_checkpoint
    key = "activation_checkpoint.mode"
    if section.mode == "memory_budget" and not (config.compile.enable and "model" in config.compile.components):
        message = f"{key} = memory_budget: the compiler chooses what to recompute, so the model must be compiled. "
        remedy = "Set compile.enable = true with model in compile.components, or another mode."
        yield Problem(message + remedy, (key, "compile.enable", "compile.components"))
    option = section.selective_ac_option
    if option != "op" and not (option.isascii() and option.isdigit() and int(option) > 0):
        key = "activation_checkpoint.selective_ac_option"
        yield Problem(f"{key} = {option}: must be op or a number from 1 on, in quotes.", (key,))
    if section.determinism_check not in ("default", "none"):
        key = "activation_checkpoint.determinism_check"
        near = suggest(section.determinism_check, ("default", "none"))
        yield Problem(f"{key} = {section.determinism_check}: must be default or none.{near}", (key,))
    if section.debug and section.mode == "selective" and option == "op":
        keys = (
            "activation_checkpoint.debug",
            "activation_checkpoint.selective_ac_option",
            "activation_checkpoint.mode",
        )
        message = f"{keys[0]} = true: torch reports on recomputation of whole blocks alone. Use it with mode = full, or not at all."
        yield Problem(message, keys)


def _warn_schedule(config: JobConfig) -> Iterator[Problem]:
    span, steps = config.lr_scheduler.total_steps, config.training.steps
    if span is not None and span < steps:
        message = (
            f"lr_scheduler.total_steps = {span} is less than training.steps = {steps}: "
            "the learning rate stays at its end value for the rest."
        )
        yield Problem(message, ("lr_scheduler.total_steps", "training.steps"))


def _warn_misleading(config: JobConfig) -> Iterator[Problem]:
    if config.data.sources and config.training.dataset_path is not None:
        message = f"training.dataset_path = {config.training.dataset_path} has no effect: data.sources takes its place."
        yield Problem(message, ("training.dataset_path", "data.sources"))
    if config.debug.deterministic_warn_only and not config.debug.deterministic:
        message = "debug.deterministic_warn_only = true has no effect without debug.deterministic = true."
        yield Problem(message, ("debug.deterministic_warn_only", "debug.deterministic"))
    yield from _warn_of_default_validation(config)
    training, parallelism = config.training, config.parallelism
    accumulates = training.global_batch_size != -1 or (
        parallelism.pipeline_parallel_degree > 1
        and training.local_batch_size > parallelism.pipeline_parallel_microbatch_size
    )
    if training.dtype == "bfloat16" and accumulates and parallelism.fsdp_accumulation != "unsharded":
        message = (
            "training.dtype = bfloat16: gradients of several microbatches are added up in bfloat16, and small ones get "
            "lost. parallelism.fsdp_accumulation = unsharded adds them up in training.mixed_precision_reduce."
        )
        yield Problem(message, ("training.dtype", "training.global_batch_size"))
    checkpoint = config.checkpoint
    if checkpoint.enable and checkpoint.last_save_model_only and not checkpoint.load_only:
        message = (
            "checkpoint.last_save_model_only = true: the last checkpoint has the weights alone, so that the run cannot be "
            "prolonged from it. Set false to be able to."
        )
        yield Problem(message, ("checkpoint.last_save_model_only",))
    budget = config.activation_checkpoint
    if budget.visualize_memory_budget_pareto and budget.mode != "memory_budget":
        key = "activation_checkpoint.visualize_memory_budget_pareto"
        yield Problem(f"{key} = true has no effect without mode = memory_budget.", (key, "activation_checkpoint.mode"))


def _warn_of_default_validation(config: JobConfig) -> Iterator[Problem]:
    """Held-out data of a kind that the run is not trained on, because nobody named any."""
    key, name = "validation.dataset", config.validation.dataset
    trained = [source.dataset for source in config.data.sources] or [config.training.dataset]
    if config.validation.enable and name == get_leaves()[key].default and "stdlib" not in trained:
        message = (
            f"{key} = {name}: the default, Python source, is no held-out part of what the run is trained on ({', '.join(trained)}). "
            f"Name such a part as {key}."
        )
        yield Problem(message, (key,))


Rule = Callable[[JobConfig], Iterator[Problem]]

_RULES: tuple[Rule, ...] = (
    _check_not_empty,
    _check_job,
    _check_profiling,
    _check_metrics,
    _check_data,
    _check_streaming,
    _check_checkpoint,
    _check_rollback,
    _check_read_timeout,
    _check_places,
    _check_credentials,
    _check_compile,
    _check_activation_checkpoint,
    *OPTIMIZER_RULES,
    *PARALLEL_RULES,
    *EXPERT_RULES,
    *PIPELINE_RULES,
    *QUANTIZE_RULES,
    *SIMPLE_FSDP_RULES,
)

_WARNING_RULES: tuple[Rule, ...] = (
    _warn_schedule,
    _warn_misleading,
    *PARALLEL_WARNING_RULES,
    *PIPELINE_WARNING_RULES,
    *QUANTIZE_WARNING_RULES,
    *SIMPLE_FSDP_WARNING_RULES,
)
