"""Names of parameters as the model's author wrote them, whatever has since been wrapped around its modules."""

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Attributes under which torch.compile, activation checkpointing and FSDP1 keep the module that they wrap.
_WRAPPER_ATTRIBUTES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def clean_fqn(name: str) -> str:
    """Return the fully qualified name without the parts that wrappers add: `layers.0._orig_mod.w` is `layers.0.w`."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel wrapper, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def as_model_parts(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """Return the parts of a model (pipeline stages) as a list, without DistributedDataParallel around them."""
    return [unwrap(part) for part in ([model] if isinstance(model, nn.Module) else model)]


def named_parameters(model: nn.Module | Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield clean name and parameter of one model or of its parts. A shared (tied) parameter comes once.

    Raises:
        ValueError: two parameters of different parts have one name.
    """
    seen: set[str] = set()
    for part in as_model_parts(model):
        for raw_name, parameter in part.named_parameters():
            name = clean_fqn(raw_name)
            if name in seen:
                raise ValueError(f"two parts of the model have a parameter named {name!r}; names must be unique")
            seen.add(name)
            yield name, parameter
