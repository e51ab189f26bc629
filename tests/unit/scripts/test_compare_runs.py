import json
import math
import random

import pytest

from scripts import compare_runs


def write_run(folder, losses, *, speed=1000.0, memory=10.0):
    folder.mkdir()
    records = [
        {"step": step, "loss": loss, "tokens_per_second": speed, "memory_gib": memory}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def runs(tmp_path):
    generator = random.Random(0)
    batches = [3.0 + generator.gauss(0, 0.2) for _ in range(200)]
    first = write_run(tmp_path / "bf16", batches)
    worse = write_run(
        tmp_path / "float8", [b + 0.01 + generator.gauss(0, 0.002) for b in batches], speed=1400.0, memory=9
    )
    return first, worse


def test_difference_is_found_below_the_noise_of_batches(runs):
    first, other = (compare_runs.load_run(path) for path in runs)
    difference = compare_runs.compare(first, other, warmup=5)
    assert difference.steps == 195
    assert abs(difference.loss - 0.01) < 3 * difference.loss_noise < 0.002
    assert difference.speed == pytest.approx(1.4)
    assert difference.memory_gib == -1
    assert difference.tail_loss_percent == pytest.approx(0.33, abs=0.1)


def test_noise_of_correlated_steps_is_larger():
    generator = random.Random(0)
    independent = [generator.gauss(0, 1) for _ in range(1000)]
    walk = [0.0]
    for value in independent:
        walk.append(0.95 * walk[-1] + value)
    _, noise = compare_runs.get_mean_and_noise(independent)
    _, noise_of_walk = compare_runs.get_mean_and_noise(walk)
    assert noise == pytest.approx(1000**-0.5, rel=0.5)
    assert noise_of_walk > 5 * noise
    assert math.isnan(compare_runs.get_mean_and_noise([1.0])[1])


def test_table_json_and_png_are_written(runs, tmp_path, capsys):
    out, figures = tmp_path / "c.png", tmp_path / "c.json"
    argv = [*map(str, runs), "--names", "a", "b", "--out", str(out), "--json", str(figures)]
    assert compare_runs.main(argv) == 0
    assert "| b | 195 | +0.0" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert json.loads(figures.read_text())[0]["name"] == "b"


def test_what_cannot_be_compared_is_told(tmp_path, capsys):
    first, other = write_run(tmp_path / "a", [1.0] * 9), write_run(tmp_path / "b", [1.0] * 3)
    assert compare_runs.main([str(first), str(other)]) == 2
    assert "no step in common after step 5" in capsys.readouterr().err
    assert compare_runs.main([str(first), str(tmp_path / "c")]) == 2
    assert compare_runs.main([str(first)]) == 2
