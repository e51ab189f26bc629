"""Which linear layers gain by float8 on a GPU, from measured times by tokens (M), features in (K) and features out (N).

A table is a CSV of `scripts/float8_matmul.py`. Of a layer between sizes that were measured, the speedup is interpolated, linearly in the
logarithms of the three; beyond them, the nearest counts.
"""

import bisect
import csv
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.config.schema_quantize import SPEED_FILTER

Shape = tuple[int, int, int]
"""M, K, N."""

FOLDER = Path(__file__).parent / "speed_tables"
"""Tables by GPU, by a part of its marketing name, with `_` for a space: `h200.csv` for "NVIDIA H200"."""


class SpeedTable:
    """Speedups over bf16 of forward and backward of whole layers, by one recipe."""

    def __init__(self, speedups: Mapping[Shape, float], *, device: str = "") -> None:
        self._speedups = dict(speedups)
        self.device = device
        """Where they are from: a GPU, or one "estimated from" another."""
        self._axes = [sorted({shape[axis] for shape in speedups}) for axis in range(3)]

    def look_up(self, m: int, k: int, n: int) -> float:
        """Return the speedup of a layer. Where not all sizes around it were measured, that of the nearest that was."""
        sides = [_find_sides(axis, size) for axis, size in zip(self._axes, (m, k, n), strict=True)]
        total = 0.0
        for (a, of_a), (b, of_b), (c, of_c) in itertools.product(*sides):
            if (a, b, c) not in self._speedups:
                nearest = min(self._speedups, key=lambda shape: _get_distance(shape, (m, k, n)))
                return self._speedups[nearest]
            total += of_a * of_b * of_c * self._speedups[a, b, c]
        return total


def _find_sides(axis: Sequence[int], size: int) -> list[tuple[int, float]]:
    """Return the measured sizes next to one, and their shares in what lies there."""
    place = bisect.bisect_left(axis, size)
    if place == len(axis):
        return [(axis[-1], 1.0)]
    if place == 0 or axis[place] == size:
        return [(axis[place], 1.0)]
    low, high = axis[place - 1], axis[place]
    share = math.log(size / low) / math.log(high / low)
    return [(low, 1.0 - share), (high, share)]


def _get_distance(a: Shape, b: Shape) -> float:
    return math.hypot(*(math.log(x / y) for x, y in zip(a, b, strict=True)))


def read_speed_table(path: Path, recipe_name: str) -> SpeedTable:
    """Return the speeds of a recipe.

    Raises:
        ValueError: the file is not there, is no such table, or has nothing of this recipe.
    """
    where = f"the table of speeds {path} (quantize.linear.float8.filter_fqns has {SPEED_FILTER!r})"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        measured = {
            (row["recipe"], int(row["M"]), int(row["K"]), int(row["N"])): float(row["layer_speedup"]) for row in rows
        }
        device = rows[0].get("device") or "" if rows else ""
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be read ({error!r}): scripts/float8_matmul.py --out makes one") from error
    speedups = {key[1:]: speedup for key, speedup in measured.items() if key[0] == recipe_name}
    if not speedups:
        known = ", ".join(sorted({key[0] for key in measured})) or "none"
        raise ValueError(
            f"{where} has the recipes {known}, and not {recipe_name}: measure it by scripts/float8_matmul.py --recipes {recipe_name}"
        )
    return SpeedTable(speedups, device=device)


def find_speed_table(given: str | None, gpu_name: str | None) -> Path:
    """Return the file that is given, else that for a GPU, by its marketing name; None: there is no GPU.

    Raises:
        ValueError: there is none.
    """
    if given is not None:
        return Path(given)
    for path in sorted(FOLDER.glob("*.csv"), key=lambda path: -len(path.stem)):
        name = re.escape(path.stem.replace("_", " "))
        if gpu_name is not None and re.search(rf"\b{name}\b", gpu_name, re.IGNORECASE):
            return path
    raise ValueError(
        f"quantize.linear.float8.filter_fqns has {SPEED_FILTER!r}, but there is no table of measured speeds for {gpu_name or 'the CPU'}. "
        "Make one by scripts/float8_matmul.py --out NAME, and set quantize.linear.float8.speed_table = NAME.csv; or use "
        "auto_filter_small_kn, which goes by sizes alone"
    )
