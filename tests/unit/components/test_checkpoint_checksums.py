"""Checksums: the sum itself, and what happens to a checkpoint whose files are not what was written."""

import json
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.components.checkpoint_run import SECTION, Run, assert_equal, weights
from trainer.components import checkpoint_checksums as checksums
from trainer.components import checkpoint_files as files


@pytest.mark.parametrize("cut", [0, 1, 777, 100_000])
def test_sums_of_two_blocks_combine(cut):
    data = os.urandom(100_000)
    both = checksums.combine_crc32(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), len(data) - cut)
    assert both == zlib.crc32(data)


@pytest.mark.parametrize("size", [0, 5, 64, 1000])
def test_file_is_summed_in_blocks_as_zlib_sums_it(tmp_path, monkeypatch, size):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    with checksums.make_pool() as pool:
        assert checksums.sum_file(tmp_path / "file", pool) == checksums.FileSum(size, f"{zlib.crc32(data):08x}")


@pytest.mark.parametrize("block", [64, 2**20])
def test_manifest_lists_every_file_with_its_sum(tmp_path, monkeypatch, block):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", block)
    Run(tmp_path).step(2)
    path = tmp_path / "step-2"
    listed = json.loads((path / files.MANIFEST_NAME).read_text())["files"]
    content = {file.name: file.read_bytes() for file in path.iterdir() if file.name != files.MANIFEST_NAME}
    assert ".metadata" in content
    assert listed == {
        name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"} for name, data in sorted(content.items())
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_file_falls_to_one_rank(world_size):
    names = [".metadata", *(f"__{rank}_{part}.distcp" for rank in range(4) for part in range(2))]
    shares = [checksums.share_files(names, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    if world_size == 8:
        assert shares[3] == ["__3_0.distcp", "__3_1.distcp"], "the rank that reads them"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit in shard": (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp is damaged: CRC-32"),
    "bit in index": (lambda path: flip(path / ".metadata"), ".metadata is damaged: CRC-32"),
    "bit in manifest": (lambda path: flip(path / files.MANIFEST_NAME), "checkpoint.json is damaged"),
    "truncated": (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp has 100 of"),
    "missing": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no manifest": (lambda path: (path / files.MANIFEST_NAME).unlink(), "not a whole checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_an_older_checkpoint_takes_its_place(tmp_path, caplog, kind):
    run = Run(tmp_path)
    run.step(2)
    expected = weights(run)
    run.step(2)
    damage, words = DAMAGE[kind]
    damage(tmp_path / "step-4")
    with pytest.raises(ValueError, match=r"step-4|load_step = 4"):
        Run(tmp_path).manager.load(4)
    assert (tmp_path / "step-4").exists(), "an explicit step leaves it alone"
    resumed = Run(tmp_path, replace(SECTION, interval=1, keep_latest_k=2), seed=5)
    assert resumed.manager.load() == 2
    assert words in caplog.text
    assert_equal(weights(resumed), expected)
    resumed.step(2)  # steps 3 and 4
    resumed.manager.close()
    assert files.list_steps(tmp_path) == [3, 4], "the damaged one does not count"
    assert Run(tmp_path).manager.load() == 4


def test_damaged_checkpoint_is_told_loudly_and_kept_under_another_name(tmp_path, caplog):
    Run(tmp_path).step(4)
    flip(tmp_path / "step-4" / "__0_0.distcp")
    watching = Run(tmp_path, replace(SECTION, load_only=True))
    assert watching.manager.load() == 2
    assert (tmp_path / "step-4").exists(), "who only loads changes nothing"
    assert Run(tmp_path).manager.load() == 2
    (loud,) = [record for record in caplog.records if record.levelno >= logging.ERROR][:1]
    assert "CHECKPOINT DAMAGED" in loud.getMessage()
    assert "step-4" in loud.getMessage()
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["2", "4.damaged"]


def test_folder_in_which_all_are_damaged_is_never_begun_anew(tmp_path):
    Run(tmp_path).step(4)
    for step in (2, 4):
        flip(tmp_path / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* can be resumed from; the newest: .*step-4 is damaged: __0_0"
    ):
        Run(tmp_path).manager.load()
    assert files.list_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("content", [[], ["__0_0.distcp", ".metadata"]])
def test_folder_of_a_step_without_a_manifest_is_never_begun_anew(tmp_path, content):
    (tmp_path / "step-7").mkdir()
    for name in content:
        (tmp_path / "step-7" / name).write_text("?")
    with pytest.raises(ValueError, match="step-7 is not a whole checkpoint of this program"):
        Run(tmp_path).manager.load()


def test_surplus_file_is_named_and_not_read(tmp_path, caplog):
    Run(tmp_path).step(2)
    (tmp_path / "step-2" / "__9_0.distcp").write_text("another run's")
    assert Run(tmp_path).manager.load() == 2
    assert "no part of it, and are not read: __9_0.distcp" in caplog.text


def test_truncated_checkpoint_does_not_push_a_whole_one_out(tmp_path):
    section = replace(SECTION, interval=1, keep_latest_k=2)
    run = Run(tmp_path, section)
    run.step(2)
    os.truncate(tmp_path / "step-2" / "__0_0.distcp", 10)
    run.step(1)
    run.manager.close()
    assert files.list_steps(tmp_path) == [1, 2, 3], "two whole ones, and one that does not count"


def test_checkpoint_of_the_first_format_is_read_with_a_warning(tmp_path, caplog):
    run = Run(tmp_path)
    run.step(2)
    place = tmp_path / "step-2" / files.MANIFEST_NAME
    manifest = json.loads(place.read_text())
    del manifest["files"], manifest["checksum"]
    place.write_text(json.dumps({**manifest, "format": 1}))
    resumed = Run(tmp_path, seed=2)
    assert resumed.manager.load() == 2
    assert "has no checksums" in caplog.text
    assert_equal(weights(resumed), weights(run))


def test_checkpoint_of_a_later_version_is_refused(tmp_path):
    Run(tmp_path).step(2)
    manifest = files.read_manifest(tmp_path / "step-2")
    files.write_manifest(tmp_path / "step-2", {**manifest, "format": 99})
    with pytest.raises(ValueError, match="a later version of this program wrote it"):
        Run(tmp_path).manager.load(2)


def test_initial_path_that_is_damaged_is_refused(tmp_path):
    Run(tmp_path / "a").step(2)
    flip(tmp_path / "a" / "step-2" / "__0_0.distcp")
    section = replace(SECTION, initial_load_path=str(tmp_path / "a" / "step-2"))
    run = Run(tmp_path / "b", section)
    before = weights(run)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        run.manager.load()
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
