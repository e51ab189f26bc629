"""How the tensors of a model stand in Hugging Face files, as data, so that each can be read or written by itself or in part.

An adapter of a family lists, for every tensor there, what of which tensors here makes it up. From that list follow whole
state dicts in both directions, one tensor at a time for a conversion that has little memory, and any box of a tensor for a
rank that holds no more than that. Nothing changes a value or a dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

Shape = tuple[int, ...]
ReadBox = Callable[[str, tuple[slice, ...]], torch.Tensor]
"""(name of a Hugging Face tensor, a slice with both ends for each of its dims) -> what stands there."""


class Part(NamedTuple):
    """What of a tensor here makes up a Hugging Face tensor."""

    name: str
    expert: int | None = None
    """Of a tensor of all experts (along dim 0), the one. None: the whole tensor."""
    rotary_heads: int = 0
    """Heads along dim 0 whose rotary pairs are two halves of the head there and neighbours here. 0: no row moves."""


class HFTensor(NamedTuple):
    """A tensor of Hugging Face files."""

    name: str
    parts: tuple[Part, ...]
    """Several are of one shape, and stand one after another along dim 1."""
    keeps_fp32: bool = False
    """Whether it stays float32 in an export of fewer bits."""

    def get_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return its shape, from those of the tensors here."""
        shape = shapes[self.parts[0].name]
        if self.parts[0].expert is not None:
            shape = shape[1:]
        return shape if len(self.parts) == 1 else (shape[0], len(self.parts) * shape[1], *shape[2:])

    def build(self, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make it from the whole tensors here, by name. A view where nothing moves."""
        parts = [_to_theirs(get(part.name), part) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Place(NamedTuple):
    """Where a tensor here, or one of its experts, stands."""

    tensor: HFTensor
    position: int
    """Which of its parts."""


def find_places(tensors: Iterable[HFTensor]) -> dict[str, list[Place]]:
    """Return where each tensor here stands: in one place, or in one for each expert, by their numbers."""
    places: dict[str, list[Place]] = {}
    for tensor in tensors:
        for position, part in enumerate(tensor.parts):
            places.setdefault(part.name, []).append(Place(tensor, position))
    for name, found in places.items():
        experts = [place.tensor.parts[place.position].expert for place in found]
        assert experts in ([None], list(range(len(found)))), f"{name} stands in several places: {experts}"
    return places


def read_box(places: Sequence[Place], shape: Shape, offsets: Shape, sizes: Shape, read: ReadBox) -> torch.Tensor:
    """Return a box of a tensor here, reading no more than rows of the heads and experts that it touches.

    places: of this tensor, from `find_places`; shape: of the whole tensor; offsets, sizes: the box
    """
    if 0 in sizes:
        return torch.empty(sizes)
    first = places[0].tensor.parts[places[0].position]
    if first.expert is None:
        return _read_part(places[0], shape, offsets, sizes, read)
    experts = range(offsets[0], offsets[0] + sizes[0])
    return torch.stack([_read_part(places[e], shape[1:], offsets[1:], sizes[1:], read) for e in experts])


def _read_part(place: Place, shape: Shape, offsets: Shape, sizes: Shape, read: ReadBox) -> torch.Tensor:
    part = place.tensor.parts[place.position]
    begins, ends = list(offsets), [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    if part.rotary_heads:
        rows = shape[0] // part.rotary_heads
        begins[0], ends[0] = begins[0] // rows * rows, -(-ends[0] // rows) * rows
    if place.position:
        start = place.position * shape[1]
        begins[1], ends[1] = begins[1] + start, ends[1] + start
    box = read(place.tensor.name, tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True)))
    if not part.rotary_heads:
        return box
    return _to_neighbours(box, box.shape[0] // rows).narrow(0, offsets[0] - begins[0], sizes[0])


class HuggingFaceAdapter(ABC):
    """Translates between a family's state dicts and its class in transformers. Built from the args of one size."""

    label: ClassVar[str]
    """The family's name, for messages."""
    tied: Mapping[str, str] = {}
    """Here: second name -> first name of a shared tensor."""
    tied_hf: Mapping[str, str] = {}
    """There: the same. Files may have the second name, too."""

    @abstractmethod
    def hf_tensors(self, *, fused_experts: bool = False) -> list[HFTensor]:
        """List the tensors there, in the order of the forward pass, a shared one once.

        fused_experts: those of all experts in one, as transformers 5 holds them in memory, if the family has experts.
        """

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """Return the content of config.json, but for the dtype and the tokenizer's special ids.

        Raises:
            ValueError: transformers has no such model.
        """

    @classmethod
    @abstractmethod
    def args_from_hf(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> Any:
        """Return the args that a config.json describes, and the names of the tensors beside it where they matter.

        Raises:
            ValueError: it describes what this family does not have.
        """

    def list_left_out(self, names: Collection[str]) -> set[str]:
        """Return those of a folder's tensors that this model has no use for, beside second names of shared ones."""
        # Files written before transformers 4.32 hold this buffer, which the config determines.
        return {name for name in names if name.endswith("rotary_emb.inv_freq")}

    def uses_fused_experts(self, names: Collection[str]) -> bool:
        """Return whether a folder has the tensors of all experts in one."""
        return False

    def match(self, names: Collection[str], what: str = "the Hugging Face state dict") -> list[HFTensor]:
        """Return the tensors to read, of a folder that has those of these names.

        Raises:
            ValueError: names that are missing or that their model of this size does not have.
        """
        tensors = self.hf_tensors(fused_experts=self.uses_fused_experts(names))
        left_out = self.list_left_out(names) | self.tied_hf.keys()
        self.check_names(set(names) - left_out, [tensor.name for tensor in tensors], what)
        return tensors

    def check_names(self, found: Iterable[str], expected: Iterable[str], what: str) -> None:
        """Compare names.

        Raises:
            ValueError: some are missing or surplus.
        """
        found, expected = set(found), set(expected)
        problems = [
            f"{label}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for label, names in (("missing", expected - found), ("not of this model", found - expected))
            if names
        ]
        if problems:
            raise ValueError(f"{what} does not fit this {self.label} ({'; '.join(problems)}). Check model.flavor")

    def to_hf(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict there, of whole tensors, as it stands in files. Shared tensors appear once, as on the hub.

        Raises:
            ValueError: names that are missing or that this model does not have, or shared tensors that differ.
        """
        state_dict = _drop_copies(state_dict, self.tied)
        tensors = self.hf_tensors()
        self.check_names(state_dict, find_places(tensors), "the model's state dict")
        return {tensor.name: tensor.build(state_dict.__getitem__) for tensor in tensors}

    def from_hf(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict here, both names of shared tensors included, fit for a strict load.

        Raises:
            ValueError: names that are missing or that their model of this size does not have, or shared tensors that differ.
        """
        tensors = self.match(state_dict.keys())
        state_dict = _drop_copies(state_dict, self.tied_hf)
        ours = {
            name: _join([_take(place, state_dict[place.tensor.name]) for place in places])
            for name, places in find_places(tensors).items()
        }
        return ours | {copy: ours[original] for copy, original in self.tied.items()}


def _join(parts: list[tuple[Part, torch.Tensor]]) -> torch.Tensor:
    return parts[0][1] if parts[0][0].expert is None else torch.stack([x for _, x in parts])


def _take(place: Place, whole: torch.Tensor) -> tuple[Part, torch.Tensor]:
    """Return a part of a whole tensor there, as it is here."""
    part = place.tensor.parts[place.position]
    if len(place.tensor.parts) > 1:
        whole = whole.chunk(len(place.tensor.parts), dim=1)[place.position]
    return part, _to_neighbours(whole, part.rotary_heads) if part.rotary_heads else whole


def _to_theirs(weight: torch.Tensor, part: Part) -> torch.Tensor:
    if part.expert is not None:
        weight = weight[part.expert]
    return _to_halves(weight, part.rotary_heads) if part.rotary_heads else weight


def _drop_copies(state_dict: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> Mapping[str, torch.Tensor]:
    """Return `state_dict` without the second names of shared tensors, having seen that they say the same."""
    for copy, original in tied.items():
        first, second = state_dict.get(original), state_dict.get(copy)
        if first is None or second is None or first is second or first.is_meta:
            continue
        if not torch.equal(first, second):
            raise ValueError(describe_untied(copy, original))
    return {name: x for name, x in state_dict.items() if name not in tied}


def describe_untied(copy: str, original: str) -> str:
    """Return what is wrong where a model shares two tensors that differ."""
    return (
        f"{copy} differs from {original}, but this model ties them (tie_embeddings). "
        "The weights belong to a model with an output matrix of its own: choose another flavor"
    )


def _to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _to_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
