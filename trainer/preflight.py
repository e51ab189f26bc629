"""Everything about a configuration that can be known before torch is loaded: the last stop before a run begins."""

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from models.registry import get_model_spec
from trainer.components.data.sources import check_source_path, get_source_spec
from trainer.components.hf_files import find_weights
from trainer.components.tokenizer import build_tokenizer
from trainer.config.errors import ConfigError, Problem
from trainer.config.fields import get_value, suggest
from trainer.config.manager import COMMAND_LINE, DEFAULT, LoadedConfig
from trainer.config.schema import JobConfig
from trainer.config.schema_training import TrainingConfig, ValidationConfig
from trainer.config.switches import find_switched_off
from trainer.config.validate import find_problems
from trainer.preflight_parallel import Model, find_parallel_model_problems

logger = logging.getLogger(__name__)

OPTIMIZER_NAMES = ("AdamW", "Adam", "Muon", "AdamW8bit", "AdamWFp8", "AdamW4bit")
"""Names in the optimizer table, which itself imports torch. A test compares the two."""

EXPERT_BACKEND_NAMES = ("standard", "deepep")
"""Names in the table of ways to experts, which imports torch as well."""

# Backends of torch.compile that every torch has. Of another torch itself is asked, which takes two seconds to import.
_USUAL_COMPILERS = ("inductor", "aot_eager", "eager")

_TABLES = {
    "optimizer.name": ("optimizer", OPTIMIZER_NAMES),
    "parallelism.expert_parallel_comm_backend": ("way to the experts", EXPERT_BACKEND_NAMES),
}


def check(loaded: LoadedConfig, world_size: int | None, *, log_warnings: bool = True, needs_files: bool = True) -> None:
    """Logs the warnings about a loaded configuration, and raises all of its problems at once.

    Args:
        loaded: what `load_config` returned; its own problems come first.
        world_size: number of processes; None leaves out the rules about it.
        log_warnings: False where another process says them already.
        needs_files: False where data, tokenizer and weights need not be there, for a plan.

    Raises:
        ConfigError: something is wrong.
    """
    problems, warnings = find_problems(loaded.config, world_size=world_size, broken_keys=loaded.broken_keys)
    # Only what is wrong in itself speaks for its key: of a combination, another key may be the one to blame.
    wrong_alone = {p.keys[0] for p in problems if len(p.keys) == 1}.union(loaded.broken_keys)
    find_more = find_preflight_problems if needs_files else find_layout_problems
    problems += [p for p in find_more(loaded.config) if not wrong_alone.intersection(p.keys)]
    report = [*loaded.problems, *(_add_origins(problem, loaded.origins) for problem in problems)]
    if log_warnings:
        of_data = find_preflight_warnings(loaded.config) if needs_files else ()
        told = {key for found in (*problems, *warnings) for key in found.keys}
        typed = [key for key, origin in loaded.origins.items() if origin == COMMAND_LINE and key not in told]
        in_vain = [*find_switched_off(loaded.config, typed), *find_model_warnings(loaded.config)]
        for warning in [*loaded.warnings, *warnings, *in_vain, *of_data]:
            logger.warning("%s", _add_origins(warning, loaded.origins))
    if report:
        raise ConfigError(report)


def check_registered(loaded: LoadedConfig, *, needs_files: bool = True) -> None:
    """Checks what `check` left to the user's module (`experimental.custom_import`), which is imported by now: its names
    must be registered, and what they stand for must fit the rest. Imports torch. needs_files: as there.

    Raises:
        ConfigError: something is wrong.
    """
    from trainer.components.optimizer import get_optimizer_builder
    from trainer.distributed.expert_backends import get_expert_backend

    config = loaded.config
    without_module = dataclasses.replace(config.experimental, custom_import="")
    find_more = find_preflight_problems if needs_files else find_layout_problems
    problems = [
        problem
        for problem in find_more(dataclasses.replace(config, experimental=without_module))
        if problem.keys[0] not in _TABLES  # which can be asked themselves now
    ]
    for key, look_up in zip(_TABLES, (get_optimizer_builder, get_expert_backend), strict=True):
        try:
            look_up(get_value(config, key))
        except ValueError as error:
            problems.append(Problem(_sentence(error), (key,)))
    if problems:
        raise ConfigError(_add_origins(problem, loaded.origins) for problem in problems)


def check_conversion(loaded: LoadedConfig, *, local_rank: int, world_size: int) -> None:
    """Checks what only the model's layers and this process's device tell of `model.converters`. Imports torch.

    Raises:
        ConfigError: something is wrong.
    """
    from trainer.preflight_low_precision import find_conversion_problem

    config = loaded.config
    args, problems = _find_args(config)
    assert not problems, "`check` comes first"
    reason = find_conversion_problem(
        get_model_spec(config.model.name),
        args,
        converters=config.model.converters,
        quantize=config.quantize,
        parallelism=config.parallelism,
        training=config.training,
        local_rank=local_rank,
        world_size=world_size,
    )
    if reason is not None:
        problem = Problem(_sentence(ValueError(reason)), ("model.converters",))
        raise ConfigError([_add_origins(problem, loaded.origins)])


def find_preflight_problems(config: JobConfig) -> Iterator[Problem]:
    """What does not fit the model, the tokenizer, the data sets or the user's own module.

    Names that the user's module (`experimental.custom_import`) may register are accepted: the module is not imported.
    """
    yield from find_layout_problems(config)
    yield from _check_data_sets(config)
    yield from _check_stores(config)
    yield from _check_hugging_face(config)
    yield from _check_tokenizer(_find_args(config)[0], config)


def find_layout_problems(config: JobConfig) -> Iterator[Problem]:
    """What does not fit the model, of all that decides memory and speed: nothing about files."""
    yield from _check_custom_import(config)
    yield from _check_tables(config)
    if not config.experimental.custom_import:
        yield from _check_compilers(config)
    args, problems = _find_args(config)
    yield from problems
    if args is not None:
        yield from _check_args(args, config)
        yield from _check_parallelism(args, config)


def _add_origins(problem: Problem, origins: dict[str, str]) -> str:
    """The problem's sentence, and where each of its settings was set."""
    given = [origins[key] for key in problem.keys if origins.get(key, DEFAULT) != DEFAULT]
    return f"{problem} [{', '.join(dict.fromkeys(given))}]" if given else str(problem)


def _check_custom_import(config: JobConfig) -> Iterator[Problem]:
    key, name = "experimental.custom_import", config.experimental.custom_import
    if not name:
        return
    if not _is_importable(name):
        message = f"{key} = {name}: no such module. It must be importable as `import {name}`:"
        yield Problem(f"{message} start from the folder that holds it, or add that folder to PYTHONPATH.", (key,))


def _is_importable(name: str) -> bool:
    """Whether a module can be found. Unlike `importlib.util.find_spec` alone, this imports no parent package either."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    spec = importlib.util.find_spec(parts[0])
    for end in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(".".join(parts[:end]), list(spec.submodule_search_locations))
    return spec is not None


def _check_tables(config: JobConfig) -> Iterator[Problem]:
    if config.experimental.custom_import:
        return
    for key, (thing, names) in _TABLES.items():
        name = get_value(config, key)
        if name not in names:
            message = f"{key} = {name}: unknown {thing}.{suggest(name, names)} Known: {', '.join(names)}."
            yield Problem(
                f"{message} One of your own is registered by the module that experimental.custom_import names.", (key,)
            )


def _check_compilers(config: JobConfig) -> Iterator[Problem]:
    """Backends of torch.compile that this torch has not. Imports torch for a name that is not among the usual ones."""
    section, names = config.compile, {}
    if "loss" in section.components:
        names["compile.backend"] = section.get_loss_backend()
    if "model" in section.components:
        key = "model_backend_override" if section.model_backend_override else "backend"
        names[f"compile.{key}"], _ = section.get_backend()
    unusual = [key for key, name in names.items() if section.enable and name not in _USUAL_COMPILERS]
    if not unusual:
        return
    from torch._dynamo import list_backends

    every = list_backends(exclude_tags=())  # those for debugging, too, which are not worth a mention
    known = sorted({*_USUAL_COMPILERS, "inductor_autobucketing", "aot_eager_autobucketing", *list_backends()})
    for key in unusual:
        if names[key] not in every:
            given = get_value(config, key)
            message = f"{key} = {given}: torch has no such backend.{suggest(given, known)} Known: {', '.join(known)}."
            remedy = "One of your own is registered (torch._dynamo.register_backend) by the module that experimental.custom_import names."
            yield Problem(f"{message} {remedy}", (key,))


def _check_hugging_face(config: JobConfig) -> Iterator[Problem]:
    """Weights to begin from that are not there, and models that have no way to or from them."""
    section = config.checkpoint
    if section.initial_load_in_hf:
        path_key = "checkpoint.initial_load_path" if section.initial_load_path else "model.hf_assets_path"
        path = section.initial_load_path or config.model.hf_assets_path
        try:
            find_weights(Path(path))
        except ValueError as error:
            message = f"checkpoint.initial_load_in_hf = true with {path_key} = {path}: {_sentence(error)}"
            yield Problem(message, (path_key, "checkpoint.initial_load_in_hf"))
    for key, is_set in (
        ("initial_load_in_hf", section.initial_load_in_hf),
        ("last_save_in_hf", section.last_save_in_hf),
    ):
        try:
            has_adapter = bool(get_model_spec(config.model.name).adapter_class)
        except ValueError:
            return  # said elsewhere
        if is_set and not has_adapter:
            message = f"checkpoint.{key} = true: model.name = {config.model.name} has no adapter to Hugging Face files."
            yield Problem(f"{message} Name one in its ModelSpec.adapter_class, or use false.", (f"checkpoint.{key}",))


class _DataSet(NamedTuple):
    """A data set that the run reads, and the settings that name it."""

    name: str
    path: str | None
    where: str
    path_key: str
    keys: tuple[str, ...]


def _list_data_sets(config: JobConfig) -> Iterator[_DataSet]:
    if config.data.sources:
        for index, source in enumerate(config.data.sources):
            where = f"data.sources, item {index + 1}: dataset = {source.dataset}"
            yield _DataSet(source.dataset, source.path, where, "path in this item", ("data.sources",))
    else:
        yield _name_data_set("training", config.training)
    if config.validation.enable:
        yield _name_data_set("validation", config.validation)


def _name_data_set(section_name: str, section: TrainingConfig | ValidationConfig) -> _DataSet:
    key, path_key = f"{section_name}.dataset", f"{section_name}.dataset_path"
    return _DataSet(section.dataset, section.dataset_path, f"{key} = {section.dataset}", path_key, (key, path_key))


def _check_data_sets(config: JobConfig) -> Iterator[Problem]:
    """Data sets with an unknown name, without the path that they need, or with a path where nothing is."""
    for data_set in _list_data_sets(config):
        if not data_set.name.strip():
            continue  # said already
        try:
            spec = get_source_spec(data_set.name)
        except ValueError as error:
            if not config.experimental.custom_import:
                yield Problem(f"{data_set.where}: {_sentence(error)}", data_set.keys)
            continue
        try:
            check_source_path(spec, data_set.path)
        except ValueError as error:
            # The table of data sets does not know which of several keys the path comes from.
            text = _sentence(error).replace("training.dataset_path", data_set.path_key)
            yield Problem(f"{data_set.where}: {text}", data_set.keys)


def find_preflight_warnings(config: JobConfig) -> Iterator[Problem]:
    """What will work, but may surprise."""
    for data_set in _list_data_sets(config):
        remedy, key = "data.streaming = true to begin at once", "data.streaming"
        if config.data.streaming:
            if data_set.path_key != "validation.dataset_path" or config.validation.steps >= 0:
                continue
            remedy, key = (
                "validation.steps to the batches of a validation, to have as many streamed",
                "validation.steps",
            )
        try:
            spec = get_source_spec(data_set.name)
        except ValueError:
            continue
        if spec.on_hub and not data_set.path:
            message = (
                f"{data_set.where}: the whole data set is downloaded and tokenized before the first step, unless that was "
                f"done before. Set {remedy}."
            )
            yield Problem(message, (*data_set.keys, key))


def find_model_warnings(config: JobConfig) -> Iterator[Problem]:
    """Changes of a flavor that nothing in its network heeds."""
    args, _ = _find_args(config)
    needs = {"mtp_weight": "mtp_depth", "bias_update": "uses_expert_bias", "bias_update_speed": "uses_expert_bias"}
    for name, value in config.model.get_changes().items():
        needed = needs.get(name)
        if args is not None and needed is not None and not getattr(args, needed, True):
            message = f"model.{name} = {value} has no effect: model.flavor = {config.model.flavor} has {needed} = {getattr(args, needed)}."
            yield Problem(message, (f"model.{name}", "model.flavor"))


def _check_stores(config: JobConfig) -> Iterator[Problem]:
    """Stores whose package is not installed, or that nothing knows."""
    for key in ("checkpoint.remote_folder", "checkpoint.initial_load_path"):
        url = get_value(config, key) or ""
        if "://" not in url:
            continue
        import fsspec  # late: it takes a while, and few runs need it

        try:
            fsspec.get_filesystem_class(url.partition("://")[0])
        except (ImportError, ValueError) as error:
            yield Problem(f"{key} = {url}: {_sentence(error)}", (key,))


def _find_args(config: JobConfig) -> tuple[Any, list[Problem]]:
    """Args of the model, adapted to the run; or None, and why there are none."""
    key = "model.name"
    try:
        spec = get_model_spec(config.model.name)
        key = "model.flavor"
        args = spec.get_args(config.model.flavor)
    except ValueError as error:
        if config.experimental.custom_import:
            return None, []
        return None, [Problem(f"{key} = {getattr(config.model, key[6:])}: {_sentence(error)}", (key,))]
    changes = config.model.get_changes()
    unknown = [name for name in changes if not hasattr(args, name)]
    if unknown:
        return None, [_refuse_change(name, changes[name], config) for name in unknown]
    given = [f"model.{name}" for name in changes]
    keys = ("model.name", "model.flavor", "model.attn_mask_type", "training.seq_len", "validation.seq_len", *given)
    seq_len = max(config.training.seq_len, config.validation.seq_len if config.validation.enable else 0)
    try:
        changed = dataclasses.replace(args, max_seq_len=seq_len, attn_mask_type=config.model.attn_mask_type, **changes)
        return changed, []
    except ValueError as error:
        return None, [Problem(f"model.name = {config.model.name}: {_sentence(error)}", keys)]


def _refuse_change(name: str, value: Any, config: JobConfig) -> Problem:
    key = f"model.{name}"
    message = (
        f"{key} = {value}: the models of model.name = {config.model.name} have nothing of this kind. Leave it out, or take "
        "deepseek_v3."
    )
    return Problem(message, (key, "model.name"))


def _check_args(args: Any, config: JobConfig) -> Iterator[Problem]:
    """Head counts that do not divide, for families whose args do not check it themselves."""
    keys = ("model.name", "model.flavor")
    name = f"model.flavor = {config.model.flavor} of {config.model.name}"
    heads, kv_heads = getattr(args, "n_heads", None), getattr(args, "n_kv_heads", None)
    if heads and args.dim % heads and not getattr(args, "head_dim", None):
        yield Problem(f"{name}: dim = {args.dim} must be a multiple of n_heads = {heads}.", keys)
    if heads and kv_heads and heads % kv_heads:
        yield Problem(f"{name}: n_heads = {heads} must be a multiple of n_kv_heads = {kv_heads}.", keys)


def _check_parallelism(args: Any, config: JobConfig) -> Iterator[Problem]:
    """Parallelisms that the model does not have, or that its sizes do not allow."""
    section = config.parallelism
    degrees = (
        *(section.tensor_parallel_degree, section.context_parallel_degree, section.pipeline_parallel_degree),
        *(section.expert_parallel_degree, section.expert_tensor_parallel_degree),
    )
    if max(degrees) <= 1:
        return
    plan = get_model_spec(config.model.name).build_plan(args)
    model = Model(args, plan, f"model.flavor = {config.model.flavor} of {config.model.name}")
    yield from find_parallel_model_problems(model, section, config.compile)


def _check_tokenizer(args: Any, config: JobConfig) -> Iterator[Problem]:
    key, path = "model.hf_assets_path", config.model.hf_assets_path
    if not path.strip():
        return
    try:
        tokenizer = build_tokenizer(path)
    except (ValueError, OSError, ImportError) as error:
        yield Problem(f"{key} = {path}: {_sentence(error)}", (key,))
        return
    if args is not None and tokenizer.vocab_size > args.vocab_size:
        message = (
            f"{key} = {path}: the tokenizer has {tokenizer.vocab_size} tokens, but model.flavor = {config.model.flavor} "
            f"has vocab_size = {args.vocab_size}. Take a flavor with a vocabulary at least as large, or another tokenizer."
        )
        yield Problem(message, (key, "model.flavor"))


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
