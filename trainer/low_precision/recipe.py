"""What is done in float8 in a linear layer, and how its tensors are scaled, as plain values that a compiled graph can hold."""

from typing import Literal, NamedTuple

import torch

from trainer.config.schema_quantize import Float8LinearConfig

Kind = Literal["input", "weight", "grad_output"]
KINDS: tuple[Kind, ...] = ("input", "weight", "grad_output")

Scaling = Literal["dynamic", "delayed", "static"]
"""By what a tensor holds now, by what it held in past steps, or as said beforehand."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Recipe(NamedTuple):
    """How linear layers compute."""

    is_rowwise: bool = False
    """A scale for each row, or column, of a factor; else one for each tensor."""
    keeps_weight_gradient: bool = False
    """Compute gradients of weights in high precision."""
    power_of_2: bool = False
    """Round scales down to powers of two, which divide without rounding."""
    emulate: bool = False
    """Multiply in float32 what was rounded to float8."""
    pads: bool = False
    """Pad the dim that a product sums over to a multiple of 16."""
    recomputes_weight: bool = False
    """Cast weights again in backward, rather than keep the cast ones."""
    scalings: tuple[Scaling, Scaling, Scaling] = ("dynamic", "dynamic", "dynamic")
    """Of each of `KINDS`."""
    records: tuple[bool, bool, bool] = (False, False, False)
    """Whether the largest magnitudes of each of `KINDS` are remembered."""
    keeps_counts: bool = False
    """Whether layers have a state to measure with, in some steps."""
    measures: bool = False
    """Whether this is such a step: count what was too large or too small for its scale, and remember largest magnitudes."""
    fused_cast: Literal["never", "gradients", "all"] = "gradients"
    """See `Float8LinearConfig.fused_cast`."""

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of gradients of outputs, whose range is wide: a scale for each row makes up for that."""
        return E4M3 if self.is_rowwise else E5M2

    def dtype_of(self, kind: Kind) -> torch.dtype:
        """The float8 dtype of a tensor."""
        return self.grad_dtype if kind == "grad_output" else E4M3

    def scaling_of(self, kind: Kind) -> Scaling:
        """How the scale of a tensor is found."""
        return self.scalings[KINDS.index(kind)]

    def records_of(self, kind: Kind) -> bool:
        """Whether the largest magnitude of a tensor is remembered."""
        return self.measures or self.records[KINDS.index(kind)]

    def fuses_cast_of(self, kind: Kind) -> bool:
        """Whether a tensor is cast by `fused_cast`. Weights are not: forward needs them one way and backward the other, and what is
        cast both ways would be kept in between, where FSDP frees them."""
        return (kind == "grad_output" and self.fused_cast != "never") or (kind == "input" and self.fused_cast == "all")

    @property
    def fuses_feed_forward(self) -> bool:
        """Whether the layers of a feed-forward part are one function (`float8_feed_forward`). What is measured, each does alone."""
        return self.fused_cast != "never" and not self.is_rowwise and not self.measures

    def is_stateless(self, kind: Kind) -> bool:
        """Whether a tensor is cast by what it holds, and nothing is remembered."""
        return self.scaling_of(kind) == "dynamic" and not self.records_of(kind)

    @property
    def has_state(self) -> bool:
        """Whether layers need a state (`Float8Layer.make_state`)."""
        return self.keeps_counts or not all(self.is_stateless(kind) for kind in KINDS)

    def as_dynamic(self) -> "Recipe":
        """The same, for steps before there is a past."""
        first: list[Scaling] = ["dynamic" if scaling == "delayed" else scaling for scaling in self.scalings]
        return self._replace(scalings=(first[0], first[1], first[2]))


def build_recipe(section: Float8LinearConfig) -> Recipe:
    """Return what the settings ask for."""
    name = section.recipe_name or "tensorwise"
    is_rowwise = name.startswith("rowwise")
    default: Scaling = "delayed" if name == "delayed" else "static" if name == "static" else "dynamic"
    scalings: tuple[Scaling, Scaling, Scaling] = (
        section.scaling_type_input or default,
        section.scaling_type_weight or default,
        section.scaling_type_grad_output or default,
    )
    writes = section.write_scales_file is not None
    return Recipe(
        is_rowwise=is_rowwise,
        keeps_weight_gradient=name == "rowwise_with_gw_hp",
        # As torchao's recipes by rows: what is cast twice, by rows and by columns, is then rounded alike more often.
        power_of_2=section.round_scales_to_power_of_2 or is_rowwise,
        emulate=section.emulate,
        pads=section.pad_inner_dim,
        recomputes_weight=section.force_recompute_fp8_weight_in_bwd,
        scalings=scalings,
        records=(
            writes or scalings[0] == "delayed",
            writes or scalings[1] == "delayed",
            writes or scalings[2] == "delayed",
        ),
        keeps_counts=section.measure_freq > 0,
        fused_cast=section.fused_cast,
    )
