"""Folders of Hugging Face files: what is refused, and what is written."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf_models import write_hf_folder
from trainer.components.hf_export import Export, write_weights
from trainer.components.hf_files import DTYPES, Entry, HFFolder, SafetensorsWriter, plan_shards
from trainer.components.native_weights import NativeWeights, _StreamingPlanner, write_native
from trainer.components.network import Network


def test_writer_writes_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "none": torch.ones(0, 4),
        "c": torch.randn(2, 6).t().half(),
        "scalar": torch.tensor(2.5),
    }
    codes = {getattr(torch, name): code for name, code in DTYPES.items()}
    entries = [Entry(name, tuple(x.shape), codes[x.dtype]) for name, x in tensors.items()]
    with SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in tensors.items())


def test_shards_keep_order_and_size():
    entries = [Entry(str(i), (size,), "F32") for i, size in enumerate((10, 20, 300, 5, 5))]
    shards = plan_shards(entries, 120)
    assert [[entry.name for entry in shard] for shard in shards.values()] == [["0", "1"], ["2"], ["3", "4"]]
    assert list(shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(plan_shards(entries, 10**6)) == ["model.safetensors"]


@pytest.mark.parametrize("file", ["../outside.safetensors", "/outside.safetensors", "sub/inside.safetensors", "..", ""])
def test_index_cannot_leave_the_folder(tmp_path, file):
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ValueError, match="files must be in the folder itself"):
        HFFolder(folder)


def test_pickles_are_refused_with_the_reason(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, which are pickles: loading them can run any code"):
        HFFolder(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    write_hf_folder("llama", tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{files[1].name} is no whole safetensors file"):
        HFFolder(tmp_path)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} is missing: the folder is incomplete"):
        HFFolder(tmp_path)
    save_file({"other": torch.ones(1)}, files[1])
    with pytest.raises(ValueError, match=r"promises model.* but the files do not have them"):
        HFFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        HFFolder(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        HFFolder(tmp_path / "nowhere")


@pytest.fixture
def quick_garbage_collection():
    """Leave out what is there already: all modules that any test imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_garbage_collection")
def test_conversion_holds_a_tensor_at_a_time(tmp_path, monkeypatch):
    write_hf_folder("deepseek_v3", tmp_path)
    folder = HFFolder(tmp_path)
    network = Network.from_hf(folder)
    (tmp_path / "native").mkdir()
    state = network.adapter.from_hf({name: folder.read(name) for name in folder.tensors})
    live: weakref.WeakSet = weakref.WeakSet()
    most = 0

    gc.freeze()  # or each collection goes through all that the tests have imported

    def track(x: torch.Tensor) -> torch.Tensor:
        nonlocal most
        gc.collect()
        live.add(x)
        most = max(most, len(live))
        return x

    pieces: list[torch.Tensor] = []  # kept, as DCP keeps them
    resolve = _StreamingPlanner.resolve_data

    def keep(planner: _StreamingPlanner, item) -> torch.Tensor:
        pieces.append(resolve(planner, item))
        assert [piece for piece in pieces if piece.untyped_storage().nbytes()] == pieces[-1:]
        return pieces[-1]

    monkeypatch.setattr(_StreamingPlanner, "resolve_data", keep)
    write_native(
        tmp_path / "native",
        shapes=network.shapes,
        dtypes=dict.fromkeys(network.shapes, torch.float32),
        read_rows=lambda name, begin, count: state[name][begin : begin + count],
        on_written=lambda size: None,
    )
    assert len(pieces) == len(network.shapes)
    source = NativeWeights(tmp_path / "native")
    assert all(torch.equal(source.read(name), state[name]) for name in network.shapes)
    read, most = source.read, 0
    monkeypatch.setattr(source, "read", lambda name: track(read(name)))
    for fused, limit in ((False, 2), (True, 3)):  # the one before is let go when the next is there
        write_weights(Export(network, shard_size=50_000, fused_experts=fused), source, tmp_path / "native")
        assert 0 < most <= limit
    gc.unfreeze()
