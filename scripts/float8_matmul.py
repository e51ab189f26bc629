"""Measure linear layers in bf16 and in float8 by (M, K, N): the product alone, and forward and backward of a whole layer.

    python scripts/float8_matmul.py --out float8_h200                  # a sweep; CSV, and PNG heat maps with matplotlib
    python scripts/float8_matmul.py --model 8B --tokens 16384 --out llama3_8b
    python scripts/float8_matmul.py --workers 12 --out h200      # trainer/low_precision/speed_tables/h200.csv, for auto_filter_by_speed

M: tokens, K: features in, N: features out. `product` multiplies float8 matrices that are there already, once; `layer` has the three
products of a layer with all casts, compiled as a run does it. A speedup below 1 means: leave such layers in bf16, as
quantize.linear.float8.filter_fqns = ["auto_filter_by_speed"] does by the CSV. Times are medians over `--repeats`, of the GPU's clock.
Compilation takes most of the time: `--workers` processes do it beforehand, into the compiler's cache.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 the root is on the path from here

from models.registry import get_model_spec  # noqa: E402
from scripts.float8_roofline import write_csv  # noqa: E402
from trainer.config.schema_quantize import Float8LinearConfig  # noqa: E402
from trainer.low_precision.float8_linear import Float8Linear, become_float8  # noqa: E402
from trainer.low_precision.matmul import multiply  # noqa: E402
from trainer.low_precision.recipe import E4M3, build_recipe  # noqa: E402
from trainer.low_precision.scaling import quantize  # noqa: E402

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed", "static")
# Tokens, and features: from what loses by float8 to what gains most.
SWEEP_TOKENS, SWEEP = (4096, 16384), (1024, 2048, 4096, 8192, 16384)
# Enough bytes written in between for nothing to be left in the L2 cache of any GPU there is.
_FLUSH_BYTES = 2**28
# For the host to be ahead of the GPU, as it is in a run: launches then do not count. About a millisecond to begin with; one second,
# more than any launches take, to end with.
_SLEEP_CYCLES, _MOST_SLEEP_CYCLES = 2**21, 2**31
Shape = tuple[int, int, int]


def parse_shape(text: str) -> Shape:
    """Return M, K and N of `M,K,N`."""
    m, k, n = (int(size) for size in text.split(","))
    return m, k, n


def list_model_shapes(flavor: str, tokens: int) -> list[Shape]:
    """Return the shapes of a Llama 3 block's linear layers."""
    args = get_model_spec("llama3").get_args(flavor)
    kv = args.n_kv_heads * args.head_dim
    pairs = [(args.dim, args.dim), (args.dim, kv), (args.dim, args.hidden_dim), (args.hidden_dim, args.dim)]
    return [(tokens, k, n) for k, n in dict.fromkeys(pairs)]


def measure_seconds(work: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """Return the median time of `work`, with a cold L2 cache."""
    for _ in range(3):
        work()
    if device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        return statistics.median(list_gpu_seconds(work, flush.zero_, repeats=repeats))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def list_gpu_seconds(work: Callable[[], Any], prepare: Callable[[], Any], *, repeats: int) -> list[float]:
    """Return the times that the GPU takes for `work`, all of it queued before the first kernel starts."""
    times: list[float] = []
    sleep = _SLEEP_CYCLES
    while len(times) < repeats:
        prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(sleep)
        begin.record()
        work()
        end.record()
        is_host_ahead = not begin.query()
        torch.cuda.synchronize()
        if is_host_ahead or sleep >= _MOST_SLEEP_CYCLES:
            times.append(begin.elapsed_time(end) / 1e3)
        else:  # the GPU has waited for launches
            sleep *= 2
    return times


def measure_product(shape: Shape, recipe_name: str | None, device: torch.device, *, repeats: int) -> float:
    """Return the time of one product x w^T, without casts. recipe_name: None for bf16."""
    m, k, n = shape
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    if recipe_name is None:
        return measure_seconds(lambda: x @ w.t(), device, repeats=repeats)
    dim = 1 if recipe_name.startswith("rowwise") else None
    x8, w8 = quantize(x, E4M3, dim=dim), quantize(w, E4M3, dim=dim).t()
    return measure_seconds(lambda: multiply(x8, w8, out_dtype=torch.bfloat16, fast=True), device, repeats=repeats)


def build_layer(
    shape: Shape, recipe_name: str | None, device: torch.device, *, backend: str, fused_cast: str
) -> Callable[[], None]:
    """Return forward and backward of a layer, to be compiled in the first call. recipe_name: None for bf16"""
    m, k, n = shape
    linear = torch.nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    if recipe_name is not None:
        scales = {f"static_scale_{kind}": 1.0 for kind in ("input", "weight", "grad_output")}
        section = Float8LinearConfig(recipe_name=recipe_name, fused_cast=fused_cast, **scales)  # type: ignore[arg-type]
        become_float8(linear, build_recipe(section))
        assert isinstance(linear, Float8Linear)
        linear.make_state((50.0, 50.0, 1e4))
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=False, backend=backend)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(m, n, device=device, dtype=torch.bfloat16)

    def work() -> None:
        x.grad = linear.weight.grad = None
        compiled(x).backward(g)

    return work


def compile_ahead(shapes: Sequence[Shape], argv: Sequence[str], workers: int) -> None:
    """Have other processes compile all layers, so that this one finds them in the compiler's cache."""
    processes = []
    for first in range(min(workers, len(shapes))):
        part = [",".join(map(str, shape)) for shape in shapes[first::workers]]
        command = [sys.executable, __file__, *argv, "--compile-only", "--shapes", *part]
        processes.append(subprocess.Popen(command))
    exit_codes = [process.wait() for process in processes]
    if any(exit_codes):
        raise SystemExit("a process that compiles ahead has failed")


def measure(
    shapes: Sequence[Shape], recipes: Sequence[str], device: torch.device, *, repeats: int, **options: Any
) -> list[dict[str, Any]]:
    """Return a row for each shape and recipe: seconds, and speedups over bf16. options: of `build_layer`"""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def measure_both(shape: Shape, recipe: str | None) -> dict[str, float]:
        layer = build_layer(shape, recipe, device, **options)
        return {
            "product": measure_product(shape, recipe, device, repeats=repeats),
            "layer": measure_seconds(layer, device, repeats=repeats),
        }

    rows = []
    for shape in shapes:
        base = measure_both(shape, None)
        for name in recipes:
            seconds = measure_both(shape, name)
            row: dict[str, Any] = dict(zip("MKN", shape, strict=True)) | {"recipe": name}
            for kind in ("product", "layer"):
                row |= {f"bf16_{kind}_seconds": base[kind], f"{kind}_seconds": seconds[kind]}
                row[f"{kind}_speedup"] = base[kind] / seconds[kind]
            row |= {"device": device_name, "torch": torch.__version__}
            rows.append(row)
            print(format_row(row), flush=True)
    return rows


def format_row(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    times = "  ".join(
        f"{kind} {1e3 * row[f'bf16_{kind}_seconds']:9.3f} -> {1e3 * row[f'{kind}_seconds']:9.3f} ms, x {row[f'{kind}_speedup']:.2f}"
        for kind in ("product", "layer")
    )
    return f"{row['M']:6} {row['K']:6} {row['N']:6}  {row['recipe']:18}  {times}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a heat map of the layers' speedups for each recipe: shapes (K, N) against M."""
    from matplotlib.figure import Figure

    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    tokens = sorted({row["M"] for row in rows})
    weights = sorted({(row["K"], row["N"]) for row in rows})
    speedups = {(row["recipe"], row["M"], row["K"], row["N"]): row["layer_speedup"] for row in rows}
    figure = Figure(figsize=(3 + 2.2 * len(recipes), 2 + 0.3 * len(weights)), layout="constrained")
    all_axes = figure.subplots(1, len(recipes), squeeze=False)[0]
    for axis, recipe in zip(all_axes, recipes, strict=True):
        grid = [[speedups.get((recipe, m, *weight), float("nan")) for m in tokens] for weight in weights]
        image = axis.imshow(grid, cmap="RdYlGn", vmin=0.4, vmax=1.6, aspect="auto")
        axis.set_title(recipe, fontsize=9)
        axis.set_xticks(range(len(tokens)), [str(m) for m in tokens], fontsize=7, rotation=45)
        axis.set_yticks(range(len(weights)), [f"{k} -> {n}" for k, n in weights], fontsize=7)
        axis.set_xlabel("tokens")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6)
    figure.colorbar(image, ax=list(all_axes), label="speedup of a layer over bf16")
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="M,K,N each; default: a sweep of 50")
    parser.add_argument("--model", help="take the shapes of a Llama 3 flavor")
    parser.add_argument("--tokens", type=int, default=16384, help="M for --model")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="name of the files, without their endings")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0, help="processes that compile beforehand")
    parser.add_argument("--compile-only", action="store_true", help="measure and write nothing")
    parser.add_argument("--backend", default="inductor", help="compiler backend")
    parser.add_argument("--fused-cast", choices=("never", "gradients", "all"), default="gradients")
    args = parser.parse_args(argv)
    if args.shapes:
        shapes = [parse_shape(text) for text in args.shapes]
    elif args.model:
        shapes = list_model_shapes(args.model, args.tokens)
    else:
        shapes = list(itertools.product(SWEEP_TOKENS, SWEEP, SWEEP))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"backend": args.backend, "fused_cast": args.fused_cast}
    if args.compile_only:
        for shape, recipe in itertools.product(shapes, (None, *args.recipes)):
            build_layer(shape, recipe, device, **options)()
        return 0
    if args.workers > 0:
        compile_ahead(shapes, sys.argv[1:] if argv is None else argv, args.workers)
    rows = measure(shapes, args.recipes, device, repeats=args.repeats, **options)
    write_csv(args.out.with_suffix(".csv"), rows)
    try:
        plot(rows, args.out.with_suffix(".png"))
    except ImportError:
        print("no PNG: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
