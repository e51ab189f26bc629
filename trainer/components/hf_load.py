"""Weights of a Hugging Face folder into a model, whatever part of it this rank has: no rank reads more than it needs."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.hf_layout import HuggingFaceAdapter, Place, Shape, describe_untied, find_places, read_box
from trainer.components.hf_files import DTYPES, HFFolder
from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

# Of args: what no file of weights decides, and what a run may well change.
_OF_TRAINING = (
    "max_seq_len",
    "attn_mask_type",
    "mtp_depth",
    "mtp_weight",
    "bias_update",
    "bias_update_speed",
    "balance_loss_alpha",
)
_CHANGEABLE = ("rope_theta", "rope_scaling", "norm_eps")
_ROWS_AT_A_TIME = 4096


def find_stored(folder: HFFolder, adapter: HuggingFaceAdapter) -> dict[str, list[Place]]:
    """Return where each tensor of the model stands in the folder, and say what of the folder is left out.

    Raises:
        ValueError: a tensor is missing or surplus, or shared tensors differ.
    """
    try:
        tensors = adapter.match(folder.tensors.keys(), str(folder.path))
    except ValueError as error:  # of models, which know nothing of runs
        raise UserError(str(error)) from error
    left_out = sorted(adapter.list_left_out(folder.tensors.keys()))
    if left_out:
        logger.info("Not read of %s, since this model has no use for it: %s", folder.path, _count(left_out))
    for copy, original in adapter.tied_hf.items():
        if copy in folder.tensors and not _is_same(folder, copy, original):
            raise UserError(f"{folder.path}: {describe_untied(copy, original)}")
    return find_places(tensors)


def check_shapes(folder: HFFolder, places: Mapping[str, Sequence[Place]], shapes: Mapping[str, Shape]) -> None:
    """Compare the shapes in the files with those of the model's tensors that are in `shapes`.

    Raises:
        ValueError: some differ.
    """
    wrong = []
    for tensor in dict.fromkeys(place.tensor for name in shapes for place in places.get(name, ())):
        if all(part.name in shapes for part in tensor.parts):
            found, expected = folder.tensors[tensor.name].shape, tensor.get_shape(shapes)
            if found != expected:
                wrong.append(f"{tensor.name} ({found} there, {expected} here)")
    if wrong:
        raise UserError(f"{folder.path} does not fit this model: shapes differ: {_count(wrong)}. Check model.flavor")


def check_args(folder: HFFolder, adapter: HuggingFaceAdapter, args: Any) -> None:
    """Compare the network that config.json describes with the one at hand, in what no shape tells: heads, routing, rotation.

    What a run may change on purpose, the rotary wavelengths and the epsilon of norms, is warned about.

    Raises:
        ValueError: they differ otherwise.
    """
    if not folder.config:
        logger.warning("%s has no config.json: only names and shapes tell that the weights fit.", folder.path)
        return
    theirs = adapter.args_from_hf(folder.config)
    names = [field.name for field in dataclasses.fields(theirs) if field.name not in _OF_TRAINING]
    if type(theirs) is not type(args):
        raise UserError(f"{folder.path} holds another family: {type(theirs).__name__}, not {type(args).__name__}")
    both = {name: (_describe(theirs, name), _describe(args, name)) for name in names}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    wrong = {name: values for name, values in differing.items() if name not in _CHANGEABLE}
    if wrong:
        text = ", ".join(f"{name} ({there} there, {here} here)" for name, (there, here) in wrong.items())
        raise UserError(f"{folder.path} holds another network: {text}. Choose the model.flavor that it has")
    for name, (there, here) in differing.items():
        logger.warning("%s was trained with %s = %s; this run has %s.", folder.path, name, there, here)


def _describe(args: Any, name: str) -> Any:
    """Return a value of args, as it works out."""
    if name in ("ffn_hidden_dim", "multiple_of", "ffn_dim_multiplier"):
        return args.hidden_dim  # several ways to say one width
    if name == "rope_scaling" and hasattr(args, "yarn"):
        return args.yarn and dataclasses.replace(args.yarn, always=True)  # that it applies is what counts
    return getattr(args, name)


def load_hf_weights(folder: HFFolder, state: Mapping[str, Any], *, adapter: HuggingFaceAdapter, args: Any) -> None:
    """Fill the tensors of `state`, the live ones of this rank by clean name: DTensors, or whole. No collective.

    Raises:
        ValueError: the folder does not fit the model.
    """
    check_args(folder, adapter, args)
    places = find_stored(folder, adapter)
    unknown = sorted(set(state) - places.keys())
    if unknown:
        raise ValueError(f"the model has {_count(unknown)}, which its adapter to Hugging Face does not know")
    check_shapes(folder, places, {name: tuple(x.shape) for name, x in state.items()})
    _warn_of_rounding(folder, {name: state[name].dtype for name in state}, places)
    # File by file, so that each is opened once.
    for name in sorted(state, key=lambda name: folder.tensors[places[name][0].tensor.name].file):
        offsets, sizes, local = _get_local(state[name])
        with torch.no_grad():
            local.copy_(read_box(places[name], tuple(state[name].shape), offsets, sizes, folder.read))
    folder.close()


def _get_local(x: Tensor) -> tuple[Shape, Shape, Tensor]:
    """Return where this rank's part of a tensor begins, its sizes, and the part itself."""
    if not isinstance(x, DTensor):
        return (0,) * x.ndim, tuple(x.shape), x
    (chunk,) = x.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes), x.to_local()


def _warn_of_rounding(
    folder: HFFolder, dtypes: Mapping[str, torch.dtype], places: Mapping[str, Sequence[Place]]
) -> None:
    exact = {("BF16", torch.float32), ("F16", torch.float32)}
    exact |= {(stored, getattr(torch, name)) for name, stored in DTYPES.items()}
    pairs = {(folder.tensors[places[name][0].tensor.name].dtype, dtype): name for name, dtype in dtypes.items()}
    for (stored, dtype), name in pairs.items():
        if (stored, dtype) not in exact:
            logger.warning("%s: weights are rounded from %s to %s (such as %s)", folder.path, stored, dtype, name)


def _is_same(folder: HFFolder, copy: str, original: str) -> bool:
    first, second = folder.tensors[copy], folder.tensors[original]
    if first.shape != second.shape:
        return False
    for begin in range(0, first.shape[0], _ROWS_AT_A_TIME):
        box = (slice(begin, min(begin + _ROWS_AT_A_TIME, first.shape[0])), slice(0, first.shape[1]))
        if not torch.equal(folder.read(copy, box), folder.read(original, box)):
            return False
    return True


def _count(items: Sequence[str], shown: int = 4) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
