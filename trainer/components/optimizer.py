"""Optimizers by name, parameter groups by pattern, and a state that any sharding can load.

`build_optimizer` looks the name up in a table (AdamW, also with moments of few bits, Adam, Muon, and what `register_optimizer` added), sorts the
parameters into groups and returns an `Optimizers`: one or more torch optimizers over one model or its pipeline stages.
"""

import difflib
import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.components.fqn import as_model_parts, clean_fqn, named_parameters
from trainer.components.muon import ShardedMuon
from trainer.config.errors import UserError
from trainer.config.fields import suggest
from trainer.config.schema_training import OptimizerConfig, ParamGroupConfig
from trainer.low_precision.adam import LowPrecisionAdam
from trainer.low_precision.moments import FORMATS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter to train, with what the configuration says about it."""

    name: str
    """Fully qualified name, clean of wrappers."""
    parameter: nn.Parameter
    is_embedding: bool = False
    """It belongs to an `nn.Embedding`."""
    lr_scale: float = 1.0
    """Factor on the optimizer's learning rate."""
    weight_decay: float | None = None
    """Weight decay in place of the optimizer's own."""


OptimizerBuilder = Callable[
    [list[TrainedParameter], OptimizerConfig], torch.optim.Optimizer | list[torch.optim.Optimizer]
]
"""Makes one or more torch optimizers for the given parameters; each parameter goes to at most one of them."""


class Optimizers:
    """The torch optimizers over one model, as one object.

    State dict: `state.<parameter name>.<state name>`, such as `state.layers.0.ffn_norm.weight.exp_avg`. The tensors
    are the optimizer's own and are sharded as the parameters are, so that a checkpoint is read straight into them
    and fits any mesh. Learning rates, decay and the other settings are not part of it: they come from the
    configuration, so a changed `optimizer.lr` or `weight_decay` takes effect when a run is resumed.
    (`torch.distributed.checkpoint.state_dict` would restore the old ones, and takes a hidden first step, which Adam's
    bias correction counts, when the optimizer has not stepped yet.)
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], names: dict[nn.Parameter, str]) -> None:
        """`names`: the name of each parameter that the optimizers train."""
        self.optimizers = list(optimizers)
        self._names = names
        self._guessed: list[torch.optim.Optimizer] = []
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
        trained = [parameter for group in self.param_groups for parameter in group["params"]]
        assert len(trained) == len(set(trained)), "a parameter belongs to two optimizers or groups"
        assert all(parameter in names for parameter in trained), (
            "an optimizer trains a parameter that is not the model's"
        )

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers. `initial_lr` is a group's learning rate before the schedule."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def get_learning_rates(self) -> dict[str, float]:
        """Return the present learning rate of each torch optimizer, by its class: that of its first group."""
        return {type(optimizer).__name__: optimizer.param_groups[0]["lr"] for optimizer in self.optimizers}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters, unless `skip` says not to: then parameters, moments and step counts stay as they are.

        skip: 0-dim float32, 1.0 to skip and 0.0 not to, the same on all ranks. Adam and AdamW, fused or in low precision, read it on
            the parameters' device; for any other optimizer, and where it lies elsewhere, the host waits for its value.
        """
        if skip is not None and not all(_reads_skip_on_device(optimizer) for optimizer in self.optimizers):
            if bool(skip):
                return
            skip = None
        self._guessed.clear()
        for optimizer in self.optimizers:
            if skip is None:
                optimizer.step()
                continue
            # The name under which torch's fused kernels look for GradScaler's verdict. Where parameters are offloaded to the
            # CPU, torch would copy it there without waiting for the copy, and read whatever the memory holds.
            optimizer.found_inf = skip.to(optimizer.param_groups[0]["params"][0].device)  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every parameter: the live tensors, not copies. Makes it first where no step has yet."""
        return {f"state.{name}.{key}": state[key] for name, state in self._states() for key in state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the optimizers. What already is the live tensor (read in place) is left alone.

        Raises:
            ValueError: an entry is missing, surplus, or of another shape.
        """
        expected = self.state_dict()
        missing, surplus = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
        if missing or surplus:
            raise ValueError(f"optimizer state does not fit: missing {missing[:5]}, not known here {surplus[:5]}")
        for name, state in self._states():
            for key, live in state.items():
                value = state_dict[f"state.{name}.{key}"]
                if not isinstance(live, Tensor):
                    state[key] = value
                elif value is not live:
                    if value.shape != live.shape:
                        raise ValueError(f"optimizer state {name}.{key} has shape {value.shape}, not {live.shape}")
                    live.copy_(value)
        self._guessed.clear()

    def forget_guesses(self) -> None:
        """Drop the state of optimizers of unknown kind that `state_dict` made before a step, where none was loaded in its place.

        Its shapes are right, its values perhaps not: a step was taken for them, which NAdam, say, counts in a product of its own.
        """
        for optimizer in self._guessed:
            optimizer.state.clear()
        self._guessed.clear()

    def _states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for optimizer in self.optimizers:
            if _materialize_state(optimizer):
                self._guessed.append(optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in optimizer.state:
                        yield self._names[parameter], optimizer.state[parameter]


def build_optimizer(
    model: nn.Module | Sequence[nn.Module], *, section: OptimizerConfig, all_names: Iterable[str] | None = None
) -> Optimizers:
    """Build the optimizer named by `optimizer.name` for a model, or for the parts of it that this rank holds.

    Call it when the parameters are what they will be: sharded, and on their device. Frozen parameters are left out.
    all_names: parameter names of the whole model, where `model` is only a part of it; patterns are checked on these.

    Raises:
        ValueError: the name is unknown, or a pattern of `no_decay` or `param_groups` matches no parameter.
    """
    builder = get_optimizer_builder(section.name)
    parameters = _collect_parameters(model, section)
    if not parameters:
        raise ValueError("the model has no parameter to train: every one has requires_grad=False")
    _check_patterns(section, all_names or [p.name for p in parameters])
    built = builder(parameters, section)
    optimizers = Optimizers(
        [built] if isinstance(built, torch.optim.Optimizer) else built, {p.parameter: p.name for p in parameters}
    )
    _log_groups(optimizers)
    return optimizers


def register_optimizer(name: str, builder: OptimizerBuilder) -> None:
    """Add an optimizer to the table, for use as `optimizer.name`. `group_parameters` makes its parameter groups.

    Raises:
        ValueError: the name is taken.
    """
    if name in _BUILDERS:
        raise ValueError(f"an optimizer named {name!r} is already registered")
    _BUILDERS[name] = builder


def get_optimizer_builder(name: str) -> OptimizerBuilder:
    """Look an optimizer up in the table.

    Raises:
        ValueError: the name is unknown. The message lists the known ones.
    """
    if name in _BUILDERS:
        return _BUILDERS[name]
    raise ValueError(
        f"optimizer.name = {name!r} is not known.{suggest(name, _BUILDERS)} Known are {', '.join(sorted(_BUILDERS))}, "
        "and what a module named by experimental.custom_import registers."
    )


def group_parameters(parameters: Iterable[TrainedParameter], *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return torch parameter groups, one for each pair of learning rate and weight decay, in order of first use.

    Plain tensors and the DTensors of each mesh get groups of their own: fused kernels refuse them together.
    """
    groups: dict[tuple[float, float, DeviceMesh | None], list[nn.Parameter]] = {}
    for item in parameters:
        decay = weight_decay if item.weight_decay is None else item.weight_decay
        mesh = item.parameter.device_mesh if isinstance(item.parameter, DTensor) else None
        groups.setdefault((lr * item.lr_scale, decay, mesh), []).append(item.parameter)
    return [
        {"params": members, "lr": group_lr, "initial_lr": group_lr, "weight_decay": decay}
        for (group_lr, decay, _), members in groups.items()
    ]


def _collect_parameters(model: nn.Module | Sequence[nn.Module], section: OptimizerConfig) -> list[TrainedParameter]:
    embeddings = {
        weight
        for part in as_model_parts(model)
        for module in part.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    collected = []
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad:
            continue
        group = next((g for g in section.param_groups if _matches(name, g.match)), ParamGroupConfig())
        decay = group.weight_decay
        if decay is None and any(_matches(name, pattern) for pattern in section.no_decay):
            decay = 0.0
        collected.append(TrainedParameter(name, parameter, parameter in embeddings, group.lr_scale, decay))
    return collected


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _check_patterns(section: OptimizerConfig, names: Iterable[str]) -> None:
    names = [clean_fqn(name) for name in names]
    patterns = [("optimizer.no_decay", pattern) for pattern in section.no_decay]
    patterns += [("optimizer.param_groups.match", group.match) for group in section.param_groups]
    patterns += [("optimizer.muon.exclude", pattern) for pattern in section.muon.exclude]
    for key, pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            example = close[0] if close else names[0]
            raise UserError(
                f"{key}: the pattern {pattern!r} matches no parameter that is trained. Patterns are globs over whole "
                f"names, such as {example!r}"
            )


def _build_adam(
    kind: type[torch.optim.Adam], parameters: list[TrainedParameter], section: OptimizerConfig
) -> torch.optim.Optimizer:
    dtype = section.state_dtype
    is_plain = dtype == "float32" and all(p.parameter.dtype == torch.float32 for p in parameters)
    if dtype is not None and not is_plain:
        return _build_low_precision_adam(dtype, parameters, section, decoupled=kind is torch.optim.AdamW)
    return kind(
        group_parameters(parameters, lr=section.lr, weight_decay=section.weight_decay),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )


def _build_low_precision_adam(
    moments: str, parameters: list[TrainedParameter], section: OptimizerConfig, *, decoupled: bool = True
) -> torch.optim.Optimizer:
    return LowPrecisionAdam(
        group_parameters(parameters, lr=section.lr, weight_decay=section.weight_decay),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        moments=FORMATS[moments],
        decoupled=decoupled,
    )


def _build_muon(parameters: list[TrainedParameter], section: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for embeddings, output, norms and what `optimizer.muon.exclude` names."""
    muon = section.muon
    matrices = [p for p in parameters if _is_hidden_matrix(p, muon.exclude)]
    rest = [p for p in parameters if not _is_hidden_matrix(p, muon.exclude)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            ShardedMuon(
                group_parameters(matrices, lr=muon.lr, weight_decay=muon.weight_decay),
                lr=muon.lr,
                weight_decay=muon.weight_decay,
                momentum=muon.momentum,
                nesterov=muon.nesterov,
                ns_steps=muon.ns_steps,
                adjust_lr_fn=muon.adjust_lr,
            )
        )
    else:
        logger.warning(
            "optimizer.name = Muon, but this part of the model has no hidden matrix: AdamW trains all of it.",
            extra={"same_on_all_ranks": True},
        )
    stacks = [p for p in rest if p.parameter.ndim > 2]
    if stacks:
        logger.warning(
            "optimizer.name = Muon: %s parameters in stacks of matrices, such as %s, are trained by AdamW, with optimizer.lr = %g: "
            "Muon knows single matrices.", f"{sum(p.parameter.numel() for p in stacks):,}", stacks[0].name, section.lr,
            extra={"same_on_all_ranks": True},
        )  # fmt: skip
    if rest:
        optimizers.append(_build_adam(torch.optim.AdamW, rest, section))
    return optimizers


# The classifier is a matrix, but its rows are classes rather than features; Muon's author leaves it to AdamW.
_OUTPUT_PATTERNS = ("output.*", "lm_head.*")


def _is_hidden_matrix(item: TrainedParameter, exclude: Sequence[str]) -> bool:
    if item.parameter.ndim != 2 or item.is_embedding:
        return False
    return not any(_matches(item.name, pattern) for pattern in (*_OUTPUT_PATTERNS, *exclude))


def _reads_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    if isinstance(optimizer, LowPrecisionAdam):
        return True
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults["fused"])


def _materialize_state(optimizer: torch.optim.Optimizer) -> bool:
    """Make the state that the first step would make, for each parameter that has none, so that it can be saved or read.

    Returns whether its values are a guess.
    """
    bare = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    if not bare:
        return False
    if isinstance(optimizer, torch.optim.Adam):
        for parameter in bare:
            step_device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    elif isinstance(optimizer, LowPrecisionAdam):
        for parameter in bare:
            optimizer.make_state(parameter)
    elif isinstance(optimizer, torch.optim.Muon):
        for parameter in bare:
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    elif len(bare) == sum(len(group["params"]) for group in optimizer.param_groups):
        _materialize_by_stepping(optimizer)
        return True
    return False


@torch.no_grad()
def _materialize_by_stepping(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer of unknown kind make its state by a step with gradients of zero, then undo what else that did."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values, gradients = [p.detach().clone() for p in parameters], [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
        parameter.copy_(value)
        parameter.grad = gradient
        counter = optimizer.state[parameter].get("step")
        if isinstance(counter, Tensor):
            counter.zero_()
        elif counter is not None:
            optimizer.state[parameter]["step"] = type(counter)(0)


def _log_groups(optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            count = sum(parameter.numel() for parameter in group["params"])
            logger.info(
                "%s: %d tensors, %s parameters, lr %g, weight decay %g",
                type(optimizer).__name__, len(group["params"]), f"{count:,}", group["initial_lr"],
                group.get("weight_decay", 0.0),
            )  # fmt: skip


_BUILDERS: dict[str, OptimizerBuilder] = {
    "AdamW": lambda parameters, section: _build_adam(torch.optim.AdamW, parameters, section),
    "Adam": lambda parameters, section: _build_adam(torch.optim.Adam, parameters, section),
    "Muon": _build_muon,
    "AdamW8bit": partial(_build_low_precision_adam, "AdamW8bit"),
    "AdamWFp8": partial(_build_low_precision_adam, "AdamWFp8"),
    "AdamW4bit": partial(_build_low_precision_adam, "AdamW4bit"),
}
