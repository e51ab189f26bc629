"""The model families by name. Imports no torch: a configuration is checked before torch is loaded."""

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from models.plan import ParallelPlan

FlopsConvention = Literal["causal", "full"]


class ModelArgs(Protocol):
    """What every family's args offer to the trainer: a frozen dataclass, adapted to a run by `dataclasses.replace`."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Tokens in the longest sequence."""
        ...

    @property
    def attn_mask_type(self) -> Literal["causal", "block_causal"]:
        """Whether attention stays inside each document."""
        ...

    def n_params(self) -> int:
        """Parameters, a shared one counted once."""
        ...

    def flops_per_token(self, seq_len: int, convention: FlopsConvention = "causal") -> float:
        """FLOPs of forward and backward for one token of a sequence of `seq_len`."""
        ...


@dataclass(frozen=True)
class ModelSpec:
    """One model family: its sizes, its plan, and where its network and its state-dict adapter are found."""

    name: str
    flavors: Mapping[str, Any]
    """Args (see `ModelArgs`) of each size."""
    build_plan: Callable[[Any], ParallelPlan]
    model_class: str
    """`module:Class` of the network, which is built from args alone."""
    adapter_class: str
    """`module:Class` of the adapter between this program's and Hugging Face's state dicts."""

    def get_args(self, flavor: str) -> Any:
        """Return the args of one size.

        Raises:
            ValueError: no such flavor.
        """
        if flavor not in self.flavors:
            raise ValueError(_unknown(f"model.flavor of {self.name!r}", flavor, self.flavors))
        return self.flavors[flavor]

    def load_model_class(self) -> Any:
        """Import and return the network's class. Imports torch."""
        return _load_object(self.model_class)

    def load_adapter_class(self) -> Any:
        """Import and return the adapter's class. Imports torch."""
        return _load_object(self.adapter_class)


# Family name -> the package that holds its SPEC. A new family is one line here.
_BUILTIN = {
    "deepseek_v3": "models.deepseek_v3",
    "llama3": "models.llama3",
}
_registered: dict[str, ModelSpec] = {}


def register_model(spec: ModelSpec) -> None:
    """Make a family known by `spec.name`, for a user's own module.

    Raises:
        ValueError: another family has the name.
    """
    if spec.name in _BUILTIN or _registered.get(spec.name, spec) != spec:
        raise ValueError(f"a model named {spec.name!r} is registered already; choose another name")
    _registered[spec.name] = spec


def list_models() -> list[str]:
    """Return the names of all families, sorted."""
    return sorted({*_BUILTIN, *_registered})


def get_model_spec(name: str) -> ModelSpec:
    """Return the spec of a family.

    Raises:
        ValueError: no such family.
    """
    if name in _registered:
        return _registered[name]
    if name not in _BUILTIN:
        raise ValueError(
            _unknown("model.name", name, list_models())
            + ". A model of your own is registered by the module that experimental.custom_import names"
        )
    return importlib.import_module(_BUILTIN[name]).SPEC


def _unknown(what: str, value: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {what}: {value!r}{hint} Known: {', '.join(known)}"


def _load_object(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
