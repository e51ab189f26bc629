"""Reading what torch.distributed.checkpoint (DCP) wrote without running any code that comes with it.

DCP's index, `.metadata`, is a pickle, and DCP reads it and every value that is no tensor with the full unpickler: a
checkpoint from elsewhere could run what it likes. Here the index may name nothing but the classes that an index is made of,
values go through torch's `weights_only`, and files are named inside of the checkpoint's folder.
"""

import enum
import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from trainer.config.errors import UserError

INDEX_NAME = ".metadata"

_DCP = "torch.distributed.checkpoint"
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED: dict[str, set[str]] = {
    f"{_DCP}.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    # Where the checkpoint was written to.
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip
"""What an index is made of, by module."""


def _get_member(owner: Any, name: Any) -> enum.Enum:
    """Return a member of an enumeration. `getattr` would give anything of anything."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it takes {name!r} from {owner!r}, which is no part of an index")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _get_member  # by it Python up to 3.11.3 names the members of an enumeration
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """Read DCP's index of a checkpoint.

    Raises:
        ValueError: it is damaged, is made of anything but an index's classes, or names a file outside of the folder.
        OSError: it cannot be read.
    """
    path = folder / INDEX_NAME
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or malicious pickle makes of itself
        raise UserError(f"{path} cannot be trusted: {type(error).__name__}: {error}") from error
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise UserError(f"{path} is no index of a checkpoint")
    if not isinstance(index.storage_data, dict):
        raise UserError(f"{path} does not say where tensors are stored")
    check_names((getattr(stored, "relative_path", None) for stored in index.storage_data.values()), path)
    return index


def check_names(names: Iterable[Any], where: Path | str) -> None:
    """Check that names are those of files directly in a folder, so that no path leads out of it.

    Raises:
        ValueError: one is not. where: what gave the names, for the message.
    """
    for name in dict.fromkeys(names):
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{where} names the file {name!r}, which is not directly in its folder: it is not read")


class SafeReader(dcp.FileSystemReader):
    """Reads the tensors of a checkpoint, whose index it reads once and as `read_index` does."""

    def __init__(self, folder: Path) -> None:
        """Raises as `read_index` does."""
        super().__init__(folder)
        self.index = read_index(Path(folder))

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index."""
        return self.index


class SafeLoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's plan for reading, with values that are no tensors limited to what `torch.load(weights_only=True)` makes."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into its place."""
        assert self.flatten_state_dict, "values are placed by the path of a flattened name"
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))
