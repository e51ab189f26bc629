"""NVIDIA's TransformerEngine as another back end: its linear layers in place of ours, and its recipe around the forward pass.

No more than that: it does not compile, recompute or cut over ranks here, and its past amaxes are in no checkpoint. The package is
optional, and imported where it is asked for.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
import torch.nn as nn

from trainer.config.schema_quantize import Float8LinearConfig


def apply_transformer_engine(
    model: nn.Module, names: Iterable[str], *, section: Float8LinearConfig, group: dist.ProcessGroup | None
) -> None:
    """Replace linear layers of `model`, on the meta device, by TransformerEngine's, in place, and have its forward pass use float8.

    Parameters stay the same objects. group: the ranks whose largest magnitudes are brought together, under delayed scaling.

    Raises:
        ValueError: the package cannot be imported.
    """
    te, recipes = import_transformer_engine()
    linear_class = _build_linear_class(te.Linear)
    for name in names:
        theirs = model.get_submodule(name)
        assert isinstance(theirs, nn.Linear)
        linear = linear_class(
            theirs.in_features,
            theirs.out_features,
            bias=theirs.bias is not None,
            params_dtype=theirs.weight.dtype,
            device="meta",
        )
        for parameter_name, parameter in theirs.named_parameters():
            setattr(linear, parameter_name, parameter)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    options = _name_options(te, _build_recipe(recipes, section), group)
    autocast = getattr(te, "autocast", None) or te.fp8_autocast
    model.forward = _in_float8(model.forward, functools.partial(autocast, enabled=True, **options))


def import_transformer_engine() -> tuple[Any, Any]:
    """Return the package's modules of layers and of recipes.

    Raises:
        ValueError: they cannot be imported.
    """
    try:
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te
    except (ImportError, OSError) as error:
        raise ValueError(
            f"quantize.linear.float8.backend = 'te' needs the package transformer_engine, which cannot be imported ({error}). Install it "
            "(pip install --no-build-isolation 'transformer_engine[pytorch]'), or use 'native', whose delayed scaling is the same method"
        ) from error
    return te, recipes


def _build_linear_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return their linear layer without a state of its own, so that checkpoints fit with and without."""
    stateless = {name: getattr(nn.Module, name) for name in ("get_extra_state", "set_extra_state")}
    return type("Linear", (base,), stateless)


def _build_recipe(recipes: Any, section: Float8LinearConfig) -> Any:
    """Both have e4m3, and e5m2 for gradients, as here."""
    if section.recipe_name != "delayed":
        return recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID)
    return recipes.DelayedScaling(
        fp8_format=recipes.Format.HYBRID,
        margin=section.margin,
        amax_history_len=section.amax_history_len,
        amax_compute_algo=section.amax_compute_algo,
    )


def _name_options(te: Any, recipe: Any, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Their names, which changed with `autocast` (2.8)."""
    if hasattr(te, "autocast"):
        return {"recipe": recipe, "amax_reduction_group": group}
    return {"fp8_recipe": recipe, "fp8_group": group}


def _in_float8(forward: Callable[..., Any], autocast: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_in_float8(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return forward(*args, **kwargs)

    return forward_in_float8
