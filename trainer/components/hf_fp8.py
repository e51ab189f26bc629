"""Weights in fp8 with a scale for each block, as DeepSeek-V3 is published, back to bfloat16.

Beside `<name>`, of e4m3, stands `<name>_scale_inv`: a scale for each block of `weight_block_size` rows and columns (128 x 128), those
at the edges cut off. A weight is value times scale, in float32, rounded to bfloat16, as in DeepSeek's own conversion
(`fp8_cast_bf16.py` of its repository).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]
"""Rows and columns that share a scale."""

QUANTIZED = "F8_E4M3"
"""Their dtype in safetensors, and that of what becomes of them."""
DEQUANTIZED = "BF16"
# In bytes they would be exponents.
_SCALES = ("F32", "BF16")


def get_scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def find_quantized(
    dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], block: Block | None, where: str
) -> set[str]:
    """Return the tensors that are stored in fp8.

    dtypes, shapes: of all tensors of a folder, as they are stored. block: None if the folder is said to have none in fp8

    Raises:
        ValueError: one has no scales, or not one for each block, or is of another kind of fp8.
    """
    found = {name for name, dtype in dtypes.items() if dtype.startswith("F8_E") and not name.endswith("_scale_inv")}
    for name in sorted(found):
        scale = get_scale_name(name)
        if block is None or dtypes[name] != QUANTIZED or dtypes.get(scale) not in _SCALES:
            raise ValueError(
                f"{where}: {name} is {dtypes[name]}. Such weights are read as {QUANTIZED} with a scale for each block: {scale} beside "
                "it, and weight_block_size in quantization_config of config.json. Convert others to bfloat16 first"
            )
        expected = tuple(-(-length // size) for length, size in zip(shapes[name], block, strict=False))
        if len(shapes[name]) != len(block) or shapes[scale] != expected:
            raise ValueError(
                f"{where}: {scale} has the shape {shapes[scale]}, but {name}, {shapes[name]} in blocks of {block}, needs {expected}"
            )
    return found


def get_blocks(box: Sequence[slice], block: Block) -> tuple[slice, ...]:
    """Return which blocks a box touches."""
    return tuple(slice(part.start // size, -(-part.stop // size)) for part, size in zip(box, block, strict=True))


def dequantize(weight: "torch.Tensor", scales: "torch.Tensor", box: Sequence[slice], block: Block) -> "torch.Tensor":
    """Return a box of a weight, (rows, columns) bfloat16.

    weight: the box as it is stored. scales: of the blocks that it touches. box: where it stands in the whole
    """
    import torch

    rows, columns = (
        torch.arange(part.start, part.stop) // size - part.start // size for part, size in zip(box, block, strict=True)
    )
    return weight.to(torch.float32).mul_(scales.to(torch.float32)[rows][:, columns]).to(torch.bfloat16)
