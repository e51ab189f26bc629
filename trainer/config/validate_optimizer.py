"""What is wrong with the settings of the optimizer, as far as it is known without the model."""

from collections.abc import Callable, Iterator

from trainer.config.errors import Problem
from trainer.config.schema import JobConfig

LOW_BIT_OPTIMIZERS = ("AdamW8bit", "AdamWFp8", "AdamW4bit")
"""Names of optimizers whose moments are codes of few bits."""
_OFFLOAD = "training.enable_cpu_offload"
_IMPLEMENTATION = "optimizer.implementation"


def find_moments_key(config: JobConfig) -> str | None:
    """Return the setting by which the moments have another dtype than the parameters, if one does."""
    section = config.optimizer
    if section.name in LOW_BIT_OPTIMIZERS:
        return "optimizer.name"
    is_same = section.state_dtype in (None, config.training.dtype) and section.state_dtype != "bfloat16"
    return None if is_same else "optimizer.state_dtype"


def _check_patterns(config: JobConfig) -> Iterator[Problem]:
    for index, group in enumerate(config.optimizer.param_groups):
        if not group.match.strip():
            message = f"optimizer.param_groups, item {index + 1}: match is missing. It is a glob over parameter names."
            yield Problem(message, ("optimizer.param_groups",))
    if any(not pattern.strip() for pattern in config.optimizer.no_decay):
        yield Problem("optimizer.no_decay: an empty pattern matches nothing. Leave it out.", ("optimizer.no_decay",))


def _check_moments(config: JobConfig) -> Iterator[Problem]:
    """Moments in low precision where there are none, or no kernel for them."""
    section = config.optimizer
    if section.state_dtype is not None and section.name not in ("AdamW", "Adam"):
        message = (
            f"optimizer.state_dtype = {section.state_dtype}: is for the moments of AdamW and Adam, and optimizer.name = "
            f"{section.name} has states of its own. Leave it out, or take one of these."
        )
        yield Problem(message, ("optimizer.state_dtype", "optimizer.name"))
        return
    key = find_moments_key(config)
    if key is None:
        return
    what = f"{key} = {section.name if key == 'optimizer.name' else section.state_dtype}"
    if section.implementation != "fused":
        message = (
            f"{what}: has one implementation, a fused kernel, and {_IMPLEMENTATION} = {section.implementation} is another. "
            f"Leave {_IMPLEMENTATION} out."
        )
        yield Problem(message, (key, _IMPLEMENTATION))
    if config.training.enable_cpu_offload:
        message = (
            f"{what}: has no fast kernel on the host, where {_OFFLOAD} = true keeps the moments, and saves nothing on the GPU. Use "
            f"{_OFFLOAD} = false, or AdamW with moments in the dtype of the parameters."
        )
        yield Problem(message, (key, _OFFLOAD))


Rule = Callable[[JobConfig], Iterator[Problem]]

OPTIMIZER_RULES: tuple[Rule, ...] = (_check_patterns, _check_moments)
