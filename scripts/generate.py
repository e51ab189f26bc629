#!/usr/bin/env python
"""Samples text from a checkpoint: one of this program's (a run's folder, .../checkpoint or .../step-500), or a Hugging Face folder.

A model that is too large for one GPU is spread over several by torchrun, sharded (FSDP) or, with --tensor-parallel, cut:

    torchrun --nproc-per-node 8 scripts/generate.py CHECKPOINT --tensor-parallel 8 --prompt "Once upon a time"

Keys and values of earlier tokens are kept. FSDP gathers all weights for every token, so that --tensor-parallel is faster where
the model has it.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from trainer.components.checkpoint import CheckpointManager
from trainer.components.checkpoint_files import list_steps, step_path
from trainer.components.generation import Generator, Sampling, stream_text
from trainer.components.hf_checkpoint import HuggingFaceFiles
from trainer.components.hf_files import HFFolder, is_hf_folder
from trainer.components.native_weights import NativeWeights
from trainer.components.network import Network, find_saved_model
from trainer.components.tokenizer import Tokenizer, build_tokenizer
from trainer.components.tools import add_import, import_custom, run_tool
from trainer.config.manager import load_config
from trainer.config.schema import CheckpointConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import materialize
from trainer.parallelize import parallelize

_DTYPES = ("float32", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="of a folder of steps, the newest is taken")
    parser.add_argument("--prompt", action="append", default=[], help="text to go on from; may be given several times")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="file with such a text")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens after each (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 the likely is likelier; 0: the likeliest (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among K tokens; 0: all (%(default)s)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among those that hold this probability (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of weights and activations (bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="settings of the run (default: those in the checkpoint or in its run's folder)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="as in model.hf_assets_path (default: that of the run)")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="processes that share each matrix (%(default)s)"
    )
    add_import(parser, registers="the model")
    return parser


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def agree(self, token: int) -> int:
        """Return the token of rank 0."""
        if self.world_size == 1:
            return token
        shared = torch.tensor([token], device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared.item())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1 or options.tensor_parallel < 1:
        parser.error("--max-new-tokens and --tensor-parallel must be at least 1")
    processes = Processes(*(int(os.environ.get(name, default)) for name, default in _LAUNCH.items()))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def sample() -> None:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        prompts = [*options.prompt, *(Path(file).read_text(encoding="utf-8") for file in options.prompt_file)]
        if not prompts:
            raise ValueError("give a --prompt or a --prompt-file; --prompt '' begins a document")
        if processes.world_size % options.tensor_parallel:
            raise ValueError(
                f"--tensor-parallel {options.tensor_parallel} must divide the number of processes, {processes.world_size}: start "
                "them with torchrun --nproc-per-node"
            )
        with process_group(processes):
            run(options, prompts, sampling, processes)

    return run_tool(sample, speaks=processes.rank == 0)


_LAUNCH = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}


@contextlib.contextmanager
def process_group(processes: Processes) -> Any:
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.device)
    if processes.world_size == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, prompts: Sequence[str], sampling: Sampling, processes: Processes) -> None:
    import_custom(options.custom_import)
    path = find_checkpoint(options.checkpoint)
    network, tokenizer = describe(path, options)
    if tokenizer.vocab_size > network.args.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {network.args.vocab_size}: it was trained with another. "
            "Name that one with --tokenizer"
        )
    model, plan = build_model(network, path, options, processes, tokenizer)
    generator = Generator(
        model,
        plan=plan,
        max_length=network.args.max_seq_len,
        vocab_size=tokenizer.vocab_size,
        multiple_of=options.tensor_parallel,
        agree=processes.agree,
    )
    for prompt in prompts:
        started = time.perf_counter()
        chosen: list[int] = []
        ids = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
        stop = None if options.ignore_eos else tokenizer.eos_id
        tokens = generator.generate(
            ids, max_new_tokens=options.max_new_tokens, sampling=sampling, seed=options.seed, stop=stop
        )
        show(prompt, processes)
        for piece in stream_text(tokenizer, note(tokens, chosen), skip=stop):
            show(piece, processes)
        show("\n", processes)
        if processes.rank == 0:
            seconds = time.perf_counter() - started
            print(
                f"[{path}: {len(chosen)} tokens in {seconds:.1f} s, {len(chosen) / seconds:.1f} tokens/s]",
                file=sys.stderr,
            )


def note(tokens: Iterator[int], chosen: list[int]) -> Iterator[int]:
    for token in tokens:
        chosen.append(token)
        yield token


def show(text: str, processes: Processes) -> None:
    if processes.rank == 0:
        print(text, end="", flush=True)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path names: itself, or the newest in it, or in the folder `checkpoint` of a run."""
    for folder in (path, path / "checkpoint"):
        steps = list_steps(folder)
        if steps:
            return step_path(folder, steps[-1])
    return path


def describe(path: Path, options: argparse.Namespace) -> tuple[Network, Tokenizer]:
    """Return the network of a checkpoint and its tokenizer."""
    if is_hf_folder(path):
        network, assets = Network.from_hf(HFFolder(path), with_predictions=False), str(path)
    else:
        network = Network.from_native(NativeWeights(path), options.config)
        saved = find_saved_model(path, options.config)
        assets = str(path) if saved is None else saved.hf_assets_path
    # Each prompt is a document.
    args = replace(network.args, attn_mask_type="causal")
    return Network(network.spec, args), build_tokenizer(options.tokenizer or assets)


def build_model(
    network: Network, path: Path, options: argparse.Namespace, processes: Processes, tokenizer: Tokenizer
) -> tuple[torch.nn.Module, Any]:
    """Return the network with its weights, spread over all processes, and its plan."""
    device = processes.device
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model: Any = network.build_meta()
    plan = network.spec.build_plan(network.args)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    if processes.world_size > 1:
        argv = [f"--parallelism.tensor_parallel_degree={options.tensor_parallel}", f"--training.dtype={dtype}"]
        argv += [f"--training.mixed_precision_param={dtype}", "--activation_checkpoint.mode=none"]
        config = load_config(argv).config
        dims = ParallelDims.from_config(config.parallelism, processes.world_size)
        dims.build_mesh(device.type)
        if options.tensor_parallel > 1 and not plan.tp:
            raise ValueError(
                f"--tensor-parallel: {network.spec.name} has no plan for it. Leave it out: weights are sharded"
            )
        parallelize(model, plan=plan, dims=dims, config=config)
    materialize(model, device, device)
    model.init_buffers(device)
    is_hf = is_hf_folder(path)
    section = CheckpointConfig(initial_load_path=str(path), initial_load_in_hf=is_hf)
    files = (
        HuggingFaceFiles(network, folder=path.parent, initial_path=path, dtype=dtype, tokenizer=tokenizer)
        if is_hf
        else None
    )
    manager = CheckpointManager({"model": model}, section=section, folder=path.parent, hugging_face=files)
    manager.load()
    manager.close()
    return model, plan


if __name__ == "__main__":
    sys.exit(main())
