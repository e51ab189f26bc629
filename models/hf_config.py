"""Reading a config.json of Hugging Face: what it asks for must be what a family here has. Imports no torch."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from models.registry import ModelSpec, get_model_spec, list_models

_FAMILIES = {"llama": "llama3", "deepseek_v2": "deepseek_v3", "deepseek_v3": "deepseek_v3"}
"""`model_type` -> family here."""


def find_family(config: Mapping[str, Any]) -> ModelSpec:
    """Return the family of a config.json.

    Raises:
        ValueError: no family here has this `model_type`.
    """
    model_type = str(config.get("model_type"))
    if model_type in _FAMILIES:
        return get_model_spec(_FAMILIES[model_type])
    if model_type in list_models():  # a user's own may go by its name
        return get_model_spec(model_type)
    close = difflib.get_close_matches(model_type, _FAMILIES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"config.json: model_type = {model_type!r} is no family of this program.{hint} Known: {', '.join(_FAMILIES)}"
    )


def check_values(config: Mapping[str, Any], **expected: Any) -> None:
    """Check keys that have one possible value here. A key that is missing or null stands for it.

    Raises:
        ValueError: one has another value, which would change the result.
    """
    for key, value in expected.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ValueError(f"config.json: {key} = {found!r}, but this program's networks have {value!r}")
    get_block_size(config)


def get_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns of the blocks of weights that are stored in fp8 with a scale for each, None if weights are not quantized.

    Raises:
        ValueError: they are quantized otherwise.
    """
    section = config.get("quantization_config")
    if not section:
        return None
    method, block = section.get("quant_method", "unknown"), section.get("weight_block_size")
    if method == "fp8" and section.get("fmt", "e4m3") == "e4m3" and isinstance(block, list) and len(block) == 2:
        rows, columns = map(int, block)
        return rows, columns
    raise ValueError(
        f"config.json: the weights are quantized (quant_method = {method!r}, fmt = {section.get('fmt')!r}, weight_block_size = {block}), "
        "which is not supported. Of quantized weights, those in fp8 (e4m3) with a scale for each block are read, as DeepSeek-V3 has "
        "them. Convert others to bfloat16 first"
    )


def get_rope_parameters(config: Mapping[str, Any], *, known: Iterable[str]) -> dict[str, Any]:
    """Return what is said of rotary embeddings, with `rope_theta` and `rope_type`: `rope_parameters` in transformers 5,
    `rope_theta` and `rope_scaling` before.

    known: values of `rope_type` that the family has.

    Raises:
        ValueError: another `rope_type`.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in tuple(known):
        raise ValueError(
            f"config.json: rope_type = {rope['rope_type']!r} of rope_scaling is not supported. This family has {', '.join(known)}"
        )
    return rope
