"""The weights of a checkpoint of this program, tensor by tensor, without a model to hold them: reading and writing.

Neither takes more memory than a few tensors, whatever the size of the model. The format is that of
torch.distributed.checkpoint (DCP), with the manifest of `checkpoint_files`.
"""

import datetime
import platform
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_checksums import ChecksumWriter, find_damage, make_pool, sum_file
from trainer.components.checkpoint_state import MODEL, RNG
from trainer.components.checkpoint_unpickle import SafeReader

_CHUNK_BYTES = 2**30
_OTHER_STATES = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.", f"{RNG}.")

ReadRows = Callable[[str, int, int], Tensor]
"""(name, first row, rows) -> these rows of a tensor, on the CPU."""


class NativeWeights:
    """The model's tensors in a checkpoint's folder.

    shapes, dtypes: of each tensor, by its name in the model.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError if there is no checkpoint, or none with weights."""
        self.path = Path(path)
        if not (self.path / files.TENSOR_INDEX_NAME).is_file():
            steps = files.list_steps(self.path)
            inside = f"; it holds the checkpoints {', '.join(f'step-{s}' for s in steps)}: name one" if steps else ""
            raise ValueError(f"{self.path}: there is no checkpoint here (no {files.TENSOR_INDEX_NAME}){inside}")
        self._reader = SafeReader(self.path)
        self._metadata = self._reader.index
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        stored = self._metadata.state_dict_metadata
        # torchtitan's checkpoints hold the weights without a prefix.
        prefix = f"{MODEL}."
        self._prefix = prefix if any(key.startswith(prefix) for key in stored) else ""
        entries = {
            key.removeprefix(self._prefix): entry
            for key, entry in stored.items()
            if key.startswith(self._prefix)
            and not key.startswith(_OTHER_STATES)
            and isinstance(entry, TensorStorageMetadata)
        }
        if not entries:
            raise ValueError(f"{self.path} holds no weights")
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}

    def verify(self) -> None:
        """Compare the files with their checksums. One that another program wrote has none.

        Raises:
            ValueError: some are not what was written.
        """
        damage = find_damage(self.path, files.get_file_sums(files.read_manifest(self.path), self.path))
        if damage:
            raise ValueError(f"{self.path} is damaged: {files.describe_damage(damage)}")

    def read(self, name: str) -> Tensor:
        """Return a tensor, whole, on the CPU, in the dtype that it has there."""
        key = self._prefix + name
        target = {key: torch.empty(self.shapes[name], dtype=self.dtypes[name])}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(target, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return target[key]


def write_native(
    folder: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    read_rows: ReadRows,
    on_written: Callable[[int], object],
) -> None:
    """Write a checkpoint of the weights alone, as of step 0, that a run can begin from. Other files in the folder belong to it.

    Tensors are read as they are written, about a GiB of rows at a time. on_written: is told of the bytes of each piece.
    """
    planner = _StreamingPlanner(shapes, dtypes, read_rows, on_written)
    # Empty tensors without memory stand for the content: the planner has what is written.
    names = {f"{MODEL}.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    others = [path.name for path in folder.iterdir()]
    writer = ChecksumWriter(folder, reads_ahead=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(names, storage_writer=writer, planner=planner, no_dist=True)
    with make_pool() as pool:
        sums = writer.file_sums | {name: sum_file(folder / name, pool) for name in others}
    manifest: dict[str, Any] = {
        "format": files.FORMAT_VERSION,
        "step": 0,
        "world_size": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tensors": [MODEL],
        "plain": {},
        "files": {name: sums[name].to_json() for name in sorted(sums)},
    }
    files.write_manifest(folder, manifest)


class _StreamingPlanner(DefaultSavePlanner):
    """Cuts tensors into pieces of rows, fetches each when it is written, and lets go of it when the next one is.

    DCP keeps every tensor until its file is complete (seen in 2.11 and 2.13): the memory is taken away from under it. So it must not
    ask for a piece before the one before is written.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        read_rows: ReadRows,
        on_written: Callable[[int], object],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._shapes, self._dtypes = shapes, dtypes
        self._read_rows, self._on_written = read_rows, on_written
        self._pieces: dict[MetadataIndex, tuple[str, int, int]] = {}
        self._written: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        items = [item for name in self._shapes for item in self._cut(name)]
        self.plan = SavePlan(items)
        return self.plan

    def _cut(self, name: str) -> list[WriteItem]:
        shape, dtype = self._shapes[name], self._dtypes[name]
        row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        rows = max(1, _CHUNK_BYTES // max(row_bytes, 1))
        items = []
        for begin in range(0, shape[0], rows):
            count = min(rows, shape[0] - begin)
            offsets = torch.Size((begin, *(0 for _ in shape[1:])))
            chunk = ChunkStorageMetadata(offsets, torch.Size((count, *shape[1:])))
            data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape))
            index = MetadataIndex(f"{MODEL}.{name}", offsets)
            self._pieces[index] = name, begin, count
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        name, begin, count = self._pieces[write_item.index]
        # A copy: what is read may be a view of the file, and keep the whole of it mapped.
        self._written = piece = self._read_rows(name, begin, count).to(self._dtypes[name], copy=True)
        self._on_written(piece.nbytes)
        return piece
