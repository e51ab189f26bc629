"""A model's plan: what generic code must know of it to spread it over devices, as data. Imports no torch."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class ParallelPlan:
    """How one model is cut up.

    A glob names modules by their dotted path; `*` stands for exactly one component. Every glob must match.
    """

    fsdp_units: tuple[tuple[str, ...], ...]
    """Parameter groups of FSDP, in the order of the forward pass. A group of one glob makes one unit of each module that
    it matches; a group of several globs is one unit of all of them. Parameters in no group belong to the root unit."""
    blocks: str
    """Glob of the repeated blocks: the unit of activation checkpointing and compilation."""
    tp: Mapping[str, str] = field(default_factory=dict)
    """Tensor parallelism: the style of each module, by glob. `trainer.distributed.tensor_parallel` has the table of styles."""
    attention: str = ""
    """Glob of the modules that attend from q to k and v, nothing else: what context parallelism replaces."""
    experts: str = ""
    """Glob of the mixtures of experts (`models.common.moe.MoE`). Empty: there are none."""
    pieces: tuple[str, ...] = ()
    """Methods that do the computing of a block with experts, by their path from the block. Where its experts are on several ranks,
    these are compiled, and recomputed by operation, one by one: what goes on between them, communication, can be in no graph. One
    that ends in `.multiply` gets its weights from the `forward` beside it."""
    stages: tuple[tuple[str, float], ...] = ()
    """What pipeline parallelism may cut between: globs in the order of the forward pass, each with the cost of one of its
    modules, in any unit."""
    last_stage: tuple[str, ...] = ()
    """Modules, in the order of `stages`, that must be together in the last stage."""
    last_stage_copies: tuple[str, ...] = ()
    """Modules of the first stage, without children, that the last one uses as well: it gets copies, which are kept equal."""

    def globs(self) -> Iterator[str]:
        """Yield every glob of the plan."""
        yield from (glob for unit in self.fsdp_units for glob in unit)
        yield self.blocks
        yield from self.tp
        yield from filter(None, [self.attention, self.experts])
        yield from (glob for glob, _ in self.stages)
        yield from (*self.last_stage, *self.last_stage_copies)

    def check(self, names: Collection[str]) -> None:
        """Check the plan against the names of the whole model's modules.

        Raises:
            ValueError: a glob matches nothing.
        """
        for glob in self.globs():
            match_modules(glob, names)

    def restrict_to(self, names: Collection[str]) -> "ParallelPlan":
        """Return the plan of a part of the model, a pipeline stage say: without the globs that match none of its modules.

        Check the plan against the whole model first.
        """

        def is_here(glob: str) -> bool:
            return any(_matches(glob, name) for name in names)

        units = (tuple(filter(is_here, unit)) for unit in self.fsdp_units)
        return replace(
            self,
            fsdp_units=tuple(unit for unit in units if unit),
            tp={glob: style for glob, style in self.tp.items() if is_here(glob)},
            experts=self.experts if is_here(self.experts) else "",
            stages=tuple((glob, cost) for glob, cost in self.stages if is_here(glob)),
        )

    def with_weights_in_pieces(self) -> "ParallelPlan":
        """Return the plan for experts that gather their weights themselves: that is part of the piece that multiplies by them."""
        pieces = (
            piece.removesuffix(".multiply") + ".forward" if piece.endswith(".multiply") else piece
            for piece in self.pieces
        )
        return replace(self, pieces=tuple(pieces))

    def list_pieces(self, names: Collection[str], *, spreads_experts: bool) -> dict[str, tuple[str, ...]]:
        """Return the methods that are compiled, and recomputed by operation, by block and with their path from there.

        names: of the model's modules. spreads_experts: whether experts are on several ranks.
        """
        mixtures = match_modules(self.experts, names) if self.experts and spreads_experts else []
        return {
            block: self.pieces if any(mixture.startswith(f"{block}.") for mixture in mixtures) else ("forward",)
            for block in match_modules(self.blocks, names)
        }


def match_modules(glob: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that `glob` matches, in their order.

    `*` matches exactly one dotted component, or a part of one (`w*`).

    Raises:
        ValueError: the glob matches nothing. A plan that is silently not applied trains a wrong or slow model.
    """
    names = list(names)
    matched = [name for name in names if _matches(glob, name)]
    if not matched:
        known = ", ".join(sorted({name.split(".")[0] for name in names if name})) or "none"
        raise ValueError(
            f"the module glob {glob!r} matches no module. `*` stands for one dotted component; "
            f"the top-level modules are: {known}"
        )
    return matched


def _matches(glob: str, name: str) -> bool:
    return re.fullmatch(re.escape(glob).replace(r"\*", r"[^.]+"), name) is not None
