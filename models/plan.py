"""A model's plan: what generic code must know of it to spread it over devices, as data. Imports no torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelPlan:
    """How one model is cut up.

    A glob names modules by their dotted path; `*` stands for exactly one component. Every glob must match.
    """

    fsdp_units: tuple[tuple[str, ...], ...]
    """Parameter groups of FSDP, in the order of the forward pass. A group of one glob makes one unit of each module that
    it matches; a group of several globs is one unit of all of them. Parameters in no group belong to the root unit."""
    blocks: str
    """Glob of the repeated blocks: the unit of activation checkpointing, compilation and pipeline stages."""


def match_modules(glob: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that `glob` matches, in their order.

    `*` matches exactly one dotted component, or a part of one (`w*`).

    Raises:
        ValueError: the glob matches nothing. A plan that is silently not applied trains a wrong or slow model.
    """
    names = list(names)
    pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
    matched = [name for name in names if pattern.fullmatch(name)]
    if not matched:
        known = ", ".join(sorted({name.split(".")[0] for name in names if name})) or "none"
        raise ValueError(
            f"the module glob {glob!r} matches no module. `*` stands for one dotted component; "
            f"the top-level modules are: {known}"
        )
    return matched
