"""What goes into a checkpoint: the model's tensors under clean names, the random number generators, and plain values."""

import json
import logging
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.components.fqn import as_model_parts, clean_fqn
from trainer.config.errors import UserError

logger = logging.getLogger(__name__)

MODEL = "model"
"""Name of the state with the weights."""
RNG = "rng"
"""Name of the state with the random number generators."""


class ModelState:
    """The parameters and persistent buffers of a model, or of the parts of it that this rank holds, as one state.

    Names are clean of wrappers, so a checkpoint fits the model compiled or not, and with any activation checkpointing.
    A tied parameter is stored once, under its first name.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._parts = as_model_parts(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the live tensors, detached, by clean name."""
        state: dict[str, Any] = {}
        for part in self._parts:
            for raw_name, value in _without_ties(part).items():
                name = clean_fqn(raw_name)
                assert name not in state, f"two parts of the model hold {name}"
                state[name] = value.detach() if isinstance(value, Tensor) else value
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy tensors into the model. Those that already are the model's own (read in place) cost one copy.

        Raises:
            ValueError: a name is missing or surplus.
        """
        expected = self.state_dict().keys()
        missing, surplus = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
        if missing or surplus:
            raise ValueError(f"the weights do not fit: missing {missing[:5]}, not in this model {surplus[:5]}")
        for part in self._parts:
            part.load_state_dict({raw: state_dict[clean_fqn(raw)] for raw in _without_ties(part)}, strict=False)

    def buffer_names(self) -> set[str]:
        """Return the clean names of buffers: a forward pass may change them, unlike parameters."""
        return {clean_fqn(name) for part in self._parts for name, _ in part.named_buffers()}


def _without_ties(part: nn.Module) -> dict[str, Any]:
    first_by_tensor: set[int] = set()
    kept = {}
    for name, value in part.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            if id(value) in first_by_tensor:
                continue
            first_by_tensor.add(id(value))
        kept[name] = value
    return kept


class RngState:
    """The random number generators of one process: Python's, numpy's, torch's on the CPU and on its CUDA device.

    All are stored as tensors, under the rank: `<rank>.torch` and so on. Every rank has numbers of its own.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the generators' states."""
        version, words, python_gauss = random.getstate()
        assert version == 3, "the layout of random.getstate() is known for version 3"
        _, keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
        state = {
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
            "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
            "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return {f"{self._rank}.{name}": value for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the generators. One that has no entry keeps its state."""
        state = {name.removeprefix(f"{self._rank}."): value for name, value in state_dict.items()}
        gauss = state["python_gauss"].tolist()
        random.setstate((3, tuple(state["python"].tolist()), gauss[1] if gauss[0] else None))
        *keys, position, has_gauss = state["numpy"].tolist()
        numpy_gauss = state["numpy_gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, numpy_gauss))
        torch.set_rng_state(state["torch"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


def is_plain(value: Any) -> bool:
    """Return whether JSON gives the value back as it was: numbers, strings, lists and string-keyed dicts of these."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def merge_plain(by_rank: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bring the plain states of all ranks together: name -> {"shared": value}, or {"by_rank": [...]} where they differ."""
    merged = {}
    for name in by_rank[0]:
        values = [state[name] for state in by_rank]
        merged[name] = {"by_rank": values} if any(value != values[0] for value in values) else {"shared": values[0]}
    return merged


def select_plain(entry: dict[str, Any], name: str, rank: int, world_size: int) -> Any:
    """Return this rank's value from what `merge_plain` made.

    Raises:
        ValueError: each rank had a value of its own, and there were another number of ranks.
    """
    if "shared" in entry:
        return entry["shared"]
    values = entry["by_rank"]
    if len(values) != world_size:
        raise UserError(
            f"{name} was saved by {len(values)} processes, each with a state of its own, and cannot be divided among "
            f"{world_size}. Resume with {len(values)} processes, or start this part afresh with "
            f'checkpoint.exclude_from_loading = ["{name}"]'
        )
    return values[rank]
