"""Estimate when a linear layer is faster in float8, from what a GPU can do, beside measured times.

    python scripts/float8_roofline.py --gpu H200
    python scripts/float8_roofline.py --gpu H200 --measured float8_h200.csv      # from scripts/float8_matmul.py
    python scripts/float8_roofline.py --gpu H200 --measured h200.csv --carry-to H100 --csv h100_80gb_hbm3.csv

The model is that of torchao's float8 README: float8 pays where

    bf16_gemm_time > fp8_gemm_time + overhead

A product of M x K and K x N takes 2 M K N FLOPs at a share of the tensor cores' peak, or its bytes at a share of the memory's peak,
whichever takes longer; a layer has three. The overhead is the bytes that casts read and write. What the model leaves out, launch times
above all, makes small layers look better than they are.

`--carry-to` writes the table that another GPU of the same chip would have measured: each time that was, longer or shorter by as much as the
estimates of both differ. (Between H200 and H100 that is the memory's speed alone.)

K: features in, N: features out, M: tokens.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWEEP = (1024, 2048, 4096, 8192, 16384)

# Of the peaks, as large products and casts reach them; torchao's estimates for H100 (roofline_utils.py), taken for all.
GEMM_SHARE, MEMORY_SHARE = 0.78, 0.92


@dataclass(frozen=True)
class Gpu:
    """Dense peaks from NVIDIA's data sheets, which state tensor-core rates with 2:4 sparsity: halved here."""

    bf16_flops: float
    fp8_flops: float
    memory_bytes: float
    """Bytes/s."""


GPUS = {
    "H100": Gpu(989.4e12, 1978.9e12, 3.35e12),  # SXM
    "H200": Gpu(989.4e12, 1978.9e12, 4.8e12),  # SXM
    "B200": Gpu(2.25e15, 4.5e15, 8.0e12),
}


@dataclass(frozen=True)
class Casts:
    """Bytes that the casts of a recipe move for each element of a matrix. bf16 has 2, float8 has 1."""

    input: float
    weight: float
    grad_output: float


# A tensor is read for its amax (2), read to be cast (2), written (1), and written again, transposed (1 + 1 read), where a product
# wants it by columns. `rowwise` casts each tensor twice, along either dim, with an amax of its own; fused, each cast reads once.
CASTS = {
    "tensorwise": Casts(input=2 + 3 + 2, weight=2 + 3 + 2, grad_output=2 + 3 + 2),
    "rowwise": Casts(input=2 * 3, weight=2 * 3, grad_output=2 * 3),
    "rowwise_with_gw_hp": Casts(input=3, weight=3 + 2 + 3 + 2, grad_output=3),
    "delayed": Casts(input=2 + 1 + 1, weight=2 + 1 + 1, grad_output=2 + 1 + 1),
    "static": Casts(input=2 + 1 + 1, weight=2 + 1 + 1, grad_output=2 + 1 + 1),
}


def get_gemm_seconds(m: int, k: int, n: int, gpu: Gpu, *, in_bytes: int) -> float:
    """Return the time of one product; in_bytes: of an element of its factors, 2 for bf16 and 1 for float8. Results are bf16."""
    flops = gpu.bf16_flops if in_bytes == 2 else gpu.fp8_flops
    compute = 2 * m * k * n / (flops * GEMM_SHARE)
    memory = ((m * k + k * n) * in_bytes + m * n * 2) / (gpu.memory_bytes * MEMORY_SHARE)
    return max(compute, memory)


def get_layer_seconds(m: int, k: int, n: int, gpu: Gpu, recipe: str | None) -> float:
    """Return the time of forward and backward of a layer. recipe: None for bf16"""
    products = ((m, k, n), (m, n, k), (n, m, k))  # x w^T, g w, g^T x
    sizes = [2, 2, 2] if recipe is None else [1, 1, 2 if recipe == "rowwise_with_gw_hp" else 1]
    gemms = sum(get_gemm_seconds(*shape, gpu, in_bytes=size) for shape, size in zip(products, sizes, strict=True))
    if recipe is None:
        return gemms
    casts = CASTS[recipe]
    moved = casts.input * m * k + casts.weight * k * n + casts.grad_output * m * n
    return gemms + moved / (gpu.memory_bytes * MEMORY_SHARE)


def read_measured(path: Path) -> dict[tuple[str, int, int, int], float]:
    """Return measured speedups of layers by recipe, M, K and N."""
    with open(path, newline="", encoding="utf-8") as file:
        return {
            (row["recipe"], int(row["M"]), int(row["K"]), int(row["N"])): float(row["layer_speedup"])
            for row in csv.DictReader(file)
        }


def carry(rows: Sequence[Mapping[str, Any]], source: str, target: str) -> list[dict[str, Any]]:
    """Return rows of scripts/float8_matmul.py for the GPU `target`, from those that `source` measured."""
    gpus = GPUS[source], GPUS[target]
    carried = []
    for row in rows:
        m, k, n = (int(row[size]) for size in "MKN")
        new: dict[str, Any] = {**row, "device": f"{target}, estimated from {row['device']}"}
        for recipe, prefix, in_bytes in ((None, "bf16_", 2), (row["recipe"], "", 1)):
            layers = [get_layer_seconds(m, k, n, gpu, recipe) for gpu in gpus]
            products = [get_gemm_seconds(m, k, n, gpu, in_bytes=in_bytes) for gpu in gpus]
            for kind, (before, after) in (("layer", layers), ("product", products)):
                new[f"{prefix}{kind}_seconds"] = float(row[f"{prefix}{kind}_seconds"]) + after - before
        for kind in ("layer", "product"):
            new[f"{kind}_speedup"] = new[f"bf16_{kind}_seconds"] / new[f"{kind}_seconds"]
        carried.append(new)
    return carried


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns, with a line of their names first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--recipes", nargs="+", choices=CASTS, default=list(CASTS))
    parser.add_argument("--shapes", nargs="+", help="M,K,N each; default: those measured, or a sweep")
    parser.add_argument("--measured", type=Path, help="CSV of scripts/float8_matmul.py")
    parser.add_argument(
        "--carry-to", choices=("H100", "H200"), help="write the --measured times of --gpu as this one's to --csv"
    )
    parser.add_argument("--csv", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    if args.carry_to:
        if not args.measured or not args.csv or args.gpu not in ("H100", "H200"):
            parser.error("--carry-to needs --measured and --csv, and --gpu H100 or H200")
        with open(args.measured, newline="", encoding="utf-8") as file:
            write_csv(args.csv, carry(list(csv.DictReader(file)), args.gpu, args.carry_to))
        return 0
    measured = read_measured(args.measured) if args.measured else {}
    if args.shapes:
        shapes = [tuple(int(size) for size in text.split(",")) for text in args.shapes]
    else:
        shapes = sorted({key[1:] for key in measured}) or list(itertools.product(SWEEP, repeat=3))
    gpu, rows = GPUS[args.gpu], []
    print(f"{args.gpu}: speedup of a layer over bf16, estimated{' / measured' if measured else ''}")
    print("     M      K      N  " + "  ".join(f"{name:>18}" for name in args.recipes))
    for m, k, n in shapes:
        cells = []
        for recipe in args.recipes:
            bf16, fp8 = (get_layer_seconds(m, k, n, gpu, name) for name in (None, recipe))
            found = measured.get((recipe, m, k, n))
            cells.append(f"{bf16 / fp8:.2f}" + ("" if found is None else f" / {found:.2f}"))
            rows.append({"M": m, "K": k, "N": n, "recipe": recipe, "bf16_seconds": bf16, "seconds": fp8})
            rows[-1] |= {"estimated_speedup": bf16 / fp8, "measured_speedup": found}
        print(f"{m:6} {k:6} {n:6}  " + "  ".join(f"{cell:>18}" for cell in cells))
    if args.csv:
        write_csv(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
