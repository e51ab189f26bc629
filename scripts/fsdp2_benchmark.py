"""Show what an optimizer that was built before FSDP2 costs, and that mending it costs nothing: memory over time, and losses.

    python scripts/fsdp2_benchmark.py run --nproc 8 --output_dir outputs/fsdp2
    python scripts/fsdp2_benchmark.py visualize --dir outputs/fsdp2

Five ways to the same training, each in fresh processes, with the same network, first weights, data and AdamW:

    torch_optimizer_after_fsdp              the optimizer gets the sharded parameters, as it should
    torch_optimizer_before_fsdp_not_fixed   it keeps the whole ones, which nothing trains and nobody frees
    torch_optimizer_before_fsdp_fixed       trainer.components.follow_parameters mends that
    trainer                                 this program: sharded before there is any weight
    accelerate                              Accelerator.prepare, where accelerate is installed and there are GPUs

`run` asserts what is to be seen (exit code 1 where something is not so), and writes a JSON file of each variant. `visualize` draws
allocated, reserved and host memory over time, and the losses. Without GPUs it is a smoke test of a small network on CPUs. Nothing is
downloaded: weights are random, and the text is Python's standard library. The more ranks, the larger the difference.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.fsdp2.claims import VARIANTS, check, draw, format_table  # noqa: E402 the root is on the path from here

SNAPSHOT = "memory_snapshot_{}.pickle"


def run(args: argparse.Namespace) -> int:
    """Measure all variants, print what was seen, and return the exit code."""
    from scripts.fsdp2.variants import get_obstacle

    settings = _get_settings(args)
    with tempfile.TemporaryDirectory(prefix="fsdp2_") as scratch:
        folder = args.output_dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = {}
        for variant in args.variants or VARIANTS:
            obstacle = get_obstacle(variant, settings)
            if obstacle is not None:
                print(f"{variant}: left out, {obstacle}")
                continue
            print(f"{variant}: {args.nproc} processes ...", flush=True)
            if not _launch(variant, settings, args.nproc, folder, snapshot=args.save_memory_snapshot):
                print(f"{variant}: FAILED, see above", file=sys.stderr)
                return 1
            results[variant] = json.loads((folder / f"{variant}.json").read_text(encoding="utf-8"))
    claims = check(results)
    print(format_table(results), "", sep="\n")
    for claim in claims:
        print(f"{'ok    ' if claim.holds else 'FAILED'} {claim.text} ({claim.figures})")
    if args.output_dir is not None:
        print(f"wrote {args.output_dir}; pictures: python scripts/fsdp2_benchmark.py visualize --dir {args.output_dir}")
    return 0 if all(claim.holds for claim in claims) else 1


def _get_settings(args: argparse.Namespace) -> Any:
    import torch

    from scripts.fsdp2.variants import Settings

    on_gpu = torch.cuda.is_available() and not args.cpu
    if on_gpu and torch.cuda.device_count() < args.nproc:
        raise ValueError(f"--nproc {args.nproc}: there are {torch.cuda.device_count()} GPUs. Give fewer, or --cpu")
    return Settings(
        model=args.model,
        flavor=args.flavor or ("3B" if on_gpu else "debugmodel"),
        device="cuda" if on_gpu else "cpu",
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len or (2048 if on_gpu else 64),
    )


def _launch(variant: str, settings: Any, nproc: int, folder: Path, *, snapshot: bool) -> bool:
    """Measure a variant in fresh processes, which write its JSON file. Return whether they ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={nproc}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--local_addr=localhost"]
    command += [str(Path(__file__)), "worker", "--variant", variant, "--output_dir", str(folder)]
    command += [
        "--settings",
        json.dumps(dataclasses.asdict(settings)),
        *(["--save_memory_snapshot"] if snapshot else []),
    ]
    threads = str(max((os.cpu_count() or 1) // nproc, 1))
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads, **os.environ}).returncode == 0


def work(args: argparse.Namespace) -> int:
    """Measure one variant, as one of its processes. Rank 0 writes what was seen."""
    import torch
    import torch.distributed as dist

    from scripts.fsdp2.measure import measure
    from scripts.fsdp2.variants import Settings

    settings = Settings(**json.loads(args.settings))
    device = torch.device("cpu")
    if settings.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    is_first = dist.get_rank() == 0
    snapshot = args.output_dir / SNAPSHOT.format(args.variant) if args.save_memory_snapshot and is_first else None
    result = measure(args.variant, settings, device, snapshot)
    if is_first:
        text = json.dumps({"settings": dataclasses.asdict(settings), **result})
        (args.output_dir / f"{args.variant}.json").write_text(text + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


def visualize(args: argparse.Namespace) -> int:
    """Draw what `run` wrote. Return the exit code."""
    files = [args.dir / f"{variant}.json" for variant in VARIANTS]
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()}
    if not results:
        print(f"{args.dir}: no results. Name the --output_dir of a run", file=sys.stderr)
        return 2
    for path in draw(results, args.dir):
        print(f"wrote {path}")
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is wrong in it ends the program with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="measure")
    runner.add_argument("--nproc", type=int, default=2, help="processes, one a GPU: 2 to 8 (default 2)")
    runner.add_argument("--output_dir", type=Path, help="folder for results")
    runner.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help="some of the variants above (default: all)"
    )
    runner.add_argument(
        "--save_memory_snapshot", action="store_true", help="rank 0's allocations, for pytorch.org/memory_viz"
    )
    runner.add_argument("--cpu", action="store_true", help="smoke test on CPUs, also where there are GPUs")
    runner.add_argument("--model", default="llama3", help="family of the network (default llama3)")
    runner.add_argument("--flavor", help="its size (default: 3B on GPUs, debugmodel on CPUs)")
    runner.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    runner.add_argument("--batch_size", type=int, default=1, help="sequences on each rank (default 1)")
    runner.add_argument("--seq_len", type=int, help="tokens of a sequence (default: 2048 on GPUs, 64 on CPUs)")
    runner.set_defaults(do=run)
    viewer = commands.add_parser("visualize", help="draw what `run` measured")
    viewer.add_argument("--dir", type=Path, required=True, help="the --output_dir of a run")
    viewer.set_defaults(do=visualize)
    worker = commands.add_parser("worker")  # what `run` starts
    worker.add_argument("--variant", required=True)
    worker.add_argument("--settings", required=True)
    worker.add_argument("--output_dir", type=Path, required=True)
    worker.add_argument("--save_memory_snapshot", action="store_true")
    worker.set_defaults(do=work)
    args = parser.parse_args(argv)
    if args.do is run and not 2 <= args.nproc <= 8:
        parser.error(f"--nproc {args.nproc}: 2 to 8 processes of one host")
    if args.do is run and args.steps < 1:
        parser.error(f"--steps {args.steps}: at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """See the top of the file. Returns the exit code."""
    args = parse_arguments(argv)
    try:
        return args.do(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
