"""Measured speeds: what lies between them, beyond them, and which layers they leave in high precision."""

import itertools
from pathlib import Path

import pytest

from tests.unit.low_precision.test_convert import NO_PLAN, build
from trainer.config.schema_quantize import SPEED_FILTER, Float8LinearConfig
from trainer.low_precision import speed_table
from trainer.low_precision.layer_choice import plan_float8
from trainer.low_precision.speed_table import SpeedTable, find_speed_table, read_speed_table

GRID = {
    (m, k, n): 0.1 * i + 0.3 * j + 0.5 * h
    for (i, m), (j, k), (h, n) in itertools.product(list(enumerate((1024, 4096, 16384))), repeat=3)
}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4096, 16384, 1024), 0.7),
        ((2048, 4096, 4096), 0.85),  # half way, by factors
        ((2048, 8192, 8192), 0.05 + 0.45 + 0.75),
        ((1, 4096, 10**6), 0.3 + 1.0),
    ],
)
def test_speed_between_measured_sizes_is_interpolated_and_beyond_them_the_nearest(
    sizes: tuple[int, int, int], expected: float
) -> None:
    assert SpeedTable(GRID).look_up(*sizes) == pytest.approx(expected)


def test_nearest_counts_where_sizes_around_were_not_measured() -> None:
    table = SpeedTable({(8192, 4096, 14336): 1.4, (8192, 14336, 4096): 1.3, (8192, 4096, 1024): 0.9})
    assert table.look_up(8192, 4096, 14336) == 1.4
    assert table.look_up(8192, 4096, 2000) == 0.9
    assert table.look_up(8192, 12000, 5000) == 1.3


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["M,K,N,recipe,layer_speedup", *rows]) + "\n")
    return path


def test_table_that_does_not_serve_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "h200.csv", "1024,1024,1024,tensorwise,0.7")
    assert read_speed_table(path, "tensorwise").look_up(1, 1, 1) == 0.7
    with pytest.raises(ValueError, match="has the recipes tensorwise, and not delayed: measure it by"):
        read_speed_table(path, "delayed")
    for text in ("M,K\n1,2\n", "M,K,N,recipe,layer_speedup\n1,x,1,static,1.0\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            read_speed_table(path, "tensorwise")
    with pytest.raises(ValueError, match="cannot be read"):
        read_speed_table(tmp_path / "missing.csv", "tensorwise")


def test_table_is_found_by_the_name_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_table, "FOLDER", tmp_path)
    plain, nvl = write(tmp_path / "h200.csv"), write(tmp_path / "h200_nvl.csv")
    assert find_speed_table(None, "NVIDIA H200") == plain
    assert find_speed_table(None, "NVIDIA H200 NVL") == nvl
    assert find_speed_table("mine.csv", None) == Path("mine.csv")
    for name in ("NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3", None):
        with pytest.raises(ValueError, match=r"no table of measured speeds for .* auto_filter_small_kn"):
            find_speed_table(None, name)


def test_tables_of_h200_and_h100_serve_each_recipe_that_was_measured() -> None:
    speedups = {}
    for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        for recipe in ("tensorwise", "rowwise", "delayed"):
            table = read_speed_table(find_speed_table(None, gpu), recipe)
            assert ("estimated from NVIDIA H200" in table.device) == ("H100" in gpu)
            speedups[gpu[7:11], recipe] = table.look_up(4096, 8192, 16384)
            assert table.look_up(4096, 1024, 1024) < 1 < speedups[gpu[7:11], recipe]
    assert all(speedups["H100", recipe] < speedups["H200", recipe] for recipe in ("tensorwise", "rowwise", "delayed"))
    assert speedups["H100", "tensorwise"] == pytest.approx(1.39, abs=0.03), "torchao's README, measured on H100"


def test_layers_that_gain_nothing_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", *(f"{m},64,{n},tensorwise,{m * n / 96e3}" for m in (1000, 2000) for n in (64, 96)))
    section = Float8LinearConfig(filter_fqns=[SPEED_FILTER], speed_table=str(path))
    conversion = plan_float8(build(), section=section, plan=NO_PLAN, tokens=2000)
    assert len(conversion.converted) == 14
    conversion = plan_float8(build(), section=section, plan=NO_PLAN, tokens=1250)
    assert conversion.kept["layers.0.attention.wq"].endswith("of bf16's speed with 1250 tokens")
    assert "layers.0.feed_forward.w1" in conversion.converted
    with pytest.raises(ValueError, match=r"feed_forward.w1 .* stays in high precision: x 1\.00 of bf16's speed"):
        plan_float8(build(), section=section, plan=NO_PLAN, tokens=1000)
