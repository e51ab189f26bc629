"""Measure ways to cast a matrix to float8 by rows and by columns, as gradients of outputs are needed: one kernel against the compiler.

    python scripts/float8_casts.py --out casts.csv                     # sizes of Llama 3.1 8B at 16,384 tokens
    python scripts/float8_casts.py --sizes 16384,14336 8192,4096 --out casts.csv

`fused` is the kernel of `trainer.low_precision.fused_cast`, for scales that are known beforehand, and finds the amax on the way;
`compiled` does the same by torch's operations, compiled; `torchao` is torchao's dynamic cast, compiled, which must find the amax first, with
the transposed copy that the GPU's products need. GB/s count what each must at least read and write, once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 the root is on the path from here
from torch import Tensor  # noqa: E402

from scripts.float8_matmul import measure_seconds  # noqa: E402
from scripts.float8_roofline import write_csv  # noqa: E402
from trainer.low_precision.fused_cast import cast_both_ways, cast_both_ways_plainly  # noqa: E402
from trainer.low_precision.recipe import E5M2  # noqa: E402
from trainer.low_precision.scaling import get_amax, get_scale  # noqa: E402

SIZES = ("16384,1024", "16384,4096", "16384,14336")


def cast_by_torchao(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return torchao's cast, its transpose, and its scale."""
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    cast = hp_tensor_to_float8_dynamic(x, E5M2, LinearMMConfig())
    return cast._data, cast._data.t().contiguous(), cast._scale


def measure(m: int, k: int, device: torch.device, *, repeats: int, backend: str) -> list[dict[str, Any]]:
    """Return a row for each way: seconds and GB/s."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16) * 1e-5
    scale = get_scale(get_amax(x), E5M2)
    torch._dynamo.reset()
    plain = torch.compile(cast_both_ways_plainly, fullgraph=True, dynamic=False, backend=backend)
    torchao = torch.compile(cast_by_torchao, dynamic=False, backend=backend)
    ways: dict[str, Callable[[], Any]] = {
        "fused": lambda: cast_both_ways(x, scale, E5M2),
        "compiled": lambda: plain(x, scale, E5M2),
        "torchao": lambda: torchao(x),
    }
    rows = []
    with torch.no_grad():
        for name, work in ways.items():
            seconds = measure_seconds(work, device, repeats=repeats)
            moved = x.numel() * (x.element_size() + 1 + 1)
            rows.append({"M": m, "K": k, "way": name, "seconds": seconds, "gb_per_second": moved / seconds / 1e9})
            print(f"{m:6} {k:6}  {name:9} {1e6 * seconds:9.1f} us {rows[-1]['gb_per_second']:7.0f} GB/s", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="M,K each")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--backend", default="inductor", help="compiler backend")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for text in args.sizes:
        m, k = (int(size) for size in text.split(","))
        rows += measure(m, k, device, repeats=args.repeats, backend=args.backend)
    write_csv(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
