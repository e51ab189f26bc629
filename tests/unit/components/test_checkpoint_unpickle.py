"""A checkpoint from elsewhere runs no code when it is read, and names no file outside of its folder."""

import dataclasses
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from tests.unit.components.checkpoint_run import SECTION, Run, assert_equal, weights
from trainer.components import checkpoint_files as files
from trainer.components.checkpoint_unpickle import SafeLoadPlanner, SafeReader, _IndexUnpickler, read_index


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Another program's checkpoint: weights, a value that is no tensor, and no manifest."""
    torch.manual_seed(5)
    run = Run(tmp_path / "its run")
    state = {**run.model.state_dict(), "notes": {"pair": (1, "two")}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "foreign"))
    return tmp_path / "foreign"


def begin_from(path: Path) -> Run:
    run = Run(path.parent / "mine", replace(SECTION, initial_load_path=str(path)), seed=8)
    assert run.manager.load() == 0
    return run


def test_index_is_read_as_dcp_reads_it(foreign):
    index, plain = read_index(foreign), dcp.FileSystemReader(foreign).read_metadata()
    assert index.state_dict_metadata == plain.state_dict_metadata
    assert index.storage_data == plain.storage_data
    assert begin_from(foreign).counters.values["step"] == 0


@pytest.mark.parametrize("place", ["instead of the index", "within the index"])
def test_index_with_code_in_it_is_refused_and_not_run(foreign, place):
    intruder = Intruder(foreign.parent / "broken in")
    index = dcp.FileSystemReader(foreign).read_metadata()
    content = intruder if place == "instead of the index" else dataclasses.replace(index, planner_data=intruder)
    (foreign / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"cannot be trusted: UnpicklingError: it names (posix|nt)\.mkdir"):
        begin_from(foreign)
    assert not intruder.target.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04]\x94.", b"junk", pickle.dumps({"state_dict_metadata": {}})])
def test_index_that_is_none_is_refused(foreign, content):
    (foreign / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata (cannot be trusted|is no index)"):
        begin_from(foreign)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", 7, "a\\b"])
def test_index_that_names_a_file_elsewhere_is_refused(foreign, name):
    index = dcp.FileSystemReader(foreign).read_metadata()
    for key, stored in index.storage_data.items():
        index.storage_data[key] = dataclasses.replace(stored, relative_path=name)
    (foreign / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="not directly in its folder"):
        begin_from(foreign)


def test_manifest_that_names_a_file_elsewhere_is_refused(tmp_path):
    Run(tmp_path).step(2)
    manifest = files.read_manifest(tmp_path / "step-2")
    manifest["files"]["../step-1/x"] = manifest["files"][".metadata"]
    files.write_manifest(tmp_path / "step-2", manifest)
    with pytest.raises(ValueError, match="not directly in its folder"):
        Run(tmp_path).manager.load()


def test_value_with_code_in_it_is_refused_and_not_run(tmp_path):
    """DCP keeps a value that is no tensor as what `torch.save` makes of it."""
    intruder = Intruder(tmp_path / "broken in")
    dcp.save({"notes": intruder}, storage_writer=dcp.FileSystemWriter(tmp_path / "a"))
    state = {"notes": "harmless"}
    with pytest.raises(BaseException, match=r"Unsupported global|mkdir"):
        dcp.load(state, storage_reader=SafeReader(tmp_path / "a"), planner=SafeLoadPlanner())
    assert not intruder.target.exists()
    assert state == {"notes": "harmless"}


def test_tensor_with_code_in_it_is_refused_and_not_run(foreign):
    intruder = Intruder(foreign.parent / "broken in")
    buffer = io.BytesIO()
    torch.save(intruder, buffer)
    index = dcp.FileSystemReader(foreign).read_metadata()
    for key, stored in index.storage_data.items():
        index.storage_data[key] = dataclasses.replace(stored, offset=0, length=len(buffer.getvalue()))
    (foreign / ".metadata").write_bytes(pickle.dumps(index))
    (foreign / "__0_0.distcp").write_bytes(buffer.getvalue())
    with pytest.raises(RuntimeError, match="could not read"):
        begin_from(foreign)
    assert not intruder.target.exists()


def test_values_that_are_no_tensors_are_read(foreign):
    state = {"notes": {"pair": (0, "")}}
    dcp.load(state, storage_reader=SafeReader(foreign), planner=SafeLoadPlanner())
    assert state == {"notes": {"pair": (1, "two")}}


def test_weights_are_read_as_saved(foreign):
    torch.manual_seed(5)
    assert_equal(weights(begin_from(foreign)), weights(Run(foreign.parent / "again")))


class _Attribute:
    """Pickled as Python up to 3.11.3 pickles the member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_member_of_an_enumeration_is_read_as_older_pythons_write_it():
    written = pickle.dumps(_Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))
    assert _IndexUnpickler(io.BytesIO(written)).load() is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT


@pytest.mark.parametrize(("owner", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")])
def test_attribute_of_anything_else_is_refused(owner, name):
    written = pickle.dumps(_Attribute(owner, name))
    with pytest.raises(pickle.UnpicklingError, match="no part of an index"):
        _IndexUnpickler(io.BytesIO(written)).load()
