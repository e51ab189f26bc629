"""The speed tools of float8: their arithmetic, and a small run on the CPU."""

import csv

import pytest
import torch

from scripts import float8_casts, float8_matmul, float8_roofline
from trainer.low_precision.speed_table import FOLDER, read_speed_table


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_roofline_speeds_up_large_layers_only():
    gpu = float8_roofline.GPUS["H100"]

    def speedup(m, k, n, recipe="tensorwise"):
        bf16, fp8 = (float8_roofline.get_layer_seconds(m, k, n, gpu, name) for name in (None, recipe))
        return bf16 / fp8

    large, small = speedup(16384, 16384, 16384), speedup(1024, 1024, 1024)
    assert 1.5 < large < 2
    assert small < 1 < large
    for shape in ((8192, 4096, 14336), (16384, 4096, 4096)):
        assert speedup(*shape) < speedup(*shape, "delayed") < 2, "it reads tensors once"
        assert speedup(*shape, "rowwise_with_gw_hp") < speedup(*shape, "rowwise")


def test_roofline_counts_bytes_where_there_is_little_to_compute():
    gpu = float8_roofline.GPUS["H200"]
    seconds = float8_roofline.get_gemm_seconds(16, 4096, 4096, gpu, in_bytes=2)
    moved = (16 * 4096 + 4096 * 4096 + 16 * 4096) * 2
    assert seconds == pytest.approx(moved / (4.8e12 * float8_roofline.MEMORY_SHARE))


def test_shapes_of_a_model():
    shapes = float8_matmul.list_model_shapes("8B", 8192)
    assert shapes == [(8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096)]


def test_measured_speeds_stand_beside_estimates(tmp_path, capsys):
    out = tmp_path / "speeds"
    recipes = ["tensorwise", "delayed"]
    argv = ["--shapes", "32,64,48", "16,32,32", "--recipes", *recipes, "--repeats", "2", "--backend", "eager"]
    assert float8_matmul.main([*argv, "--out", str(out)]) == 0
    rows = read(out.with_suffix(".csv"))
    assert [(row["M"], row["recipe"]) for row in rows] == [(m, name) for m in ("32", "16") for name in recipes]
    assert all(float(row["layer_seconds"]) > 0 for row in rows)
    assert read_speed_table(out.with_suffix(".csv"), "delayed").look_up(32, 64, 48) == float(rows[1]["layer_speedup"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    table = tmp_path / "table.csv"
    argv = ["--gpu", "B200", "--measured", f"{out}.csv", "--csv", str(table), "--recipes", "tensorwise"]
    assert float8_roofline.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "B200: speedup of a layer over bf16, estimated / measured"
    assert [line.split()[:3] for line in lines[2:]] == [["16", "32", "32"], ["32", "64", "48"]]
    assert {row["measured_speedup"] for row in read(table)} == {
        row["layer_speedup"] for row in rows if row["recipe"] == "tensorwise"
    }


def test_table_of_h100_is_that_of_h200_carried_over(tmp_path):
    """If this fails: scripts/float8_roofline.py --gpu H200 --measured h200.csv --carry-to H100 --csv h100_80gb_hbm3.csv"""
    argv = ["--gpu", "H200", "--measured", str(FOLDER / "h200.csv"), "--carry-to", "H100"]
    assert float8_roofline.main([*argv, "--csv", str(tmp_path / "carried.csv")]) == 0
    shipped, carried, source = map(read, (FOLDER / "h100_80gb_hbm3.csv", tmp_path / "carried.csv", FOLDER / "h200.csv"))
    assert len(shipped) == len(source)
    for mine, other, of_h200 in zip(shipped, carried, source, strict=True):
        assert [mine[key] for key in ("M", "K", "N", "recipe")] == [of_h200[key] for key in ("M", "K", "N", "recipe")]
        assert float(mine["layer_speedup"]) == pytest.approx(float(other["layer_speedup"]))
        assert float(mine["layer_seconds"]) > float(of_h200["layer_seconds"]), "casts move bytes"


class _Event:
    """Of a GPU that finishes a sleep of fewer than 5 million cycles before the host has queued what comes after it."""

    cycles = 0

    def __init__(self, **_):
        self.is_late = False

    def record(self):
        self.is_late = _Event.cycles < 5_000_000

    def query(self):
        return self.is_late

    def elapsed_time(self, _):
        return 9.0 if self.is_late else 2.0


@pytest.mark.parametrize(("most", "expected"), [(2**31, 0.002), (2**22, 0.009)], ids=["ahead", "never"])
def test_time_counts_where_the_host_was_ahead(monkeypatch, most, expected):
    """Else small layers look as slow as their launches; but what waits for the GPU comes to an end."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(_Event, "cycles", cycles))
    monkeypatch.setattr(float8_matmul, "_MOST_SLEEP_CYCLES", most)
    prepared = []
    times = float8_matmul.list_gpu_seconds(lambda: None, lambda: prepared.append(1), repeats=3)
    assert times == [expected] * 3
    assert len(prepared) > 3


def test_other_processes_compile_all_shapes_beforehand(tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command):
            commands.append(command[1:])

        def wait(self):
            return 0

    monkeypatch.setattr(float8_matmul.subprocess, "Popen", Process)
    argv = ["--shapes", "16,16,16", "16,16,32", "16,32,16", "--recipes", "static", "--backend", "eager"]
    argv += ["--repeats", "1", "--out", str(tmp_path / "speeds")]
    assert float8_matmul.main([*argv, "--workers", "2"]) == 0
    shapes = [command[command.index("--compile-only") + 2 :] for command in commands]
    assert shapes == [["16,16,16", "16,32,16"], ["16,16,32"]]
    (tmp_path / "speeds.csv").unlink()
    assert float8_matmul.main(commands[0][1:]) == 0
    assert not (tmp_path / "speeds.csv").exists()


def test_ways_to_cast_give_the_same_and_are_measured(tmp_path):
    x = torch.randn(32, 48).bfloat16()
    data, transposed, scale = float8_casts.cast_by_torchao(x)
    rows, columns, _ = float8_casts.cast_both_ways(x, scale.squeeze(), torch.float8_e5m2)
    assert torch.equal(rows.float(), data.float())
    assert torch.equal(columns.float(), transposed.float())
    out = tmp_path / "casts.csv"
    argv = ["--sizes", "32,48", "16,16", "--repeats", "1", "--backend", "eager", "--out", str(out)]
    assert float8_casts.main(argv) == 0
    assert [(row["M"], row["way"]) for row in read(out)] == [
        (m, way) for m in ("32", "16") for way in ("fused", "compiled", "torchao")
    ]
