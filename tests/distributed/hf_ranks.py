"""What the ranks of tests about Hugging Face files run. Imports no transformers, which takes each process seconds."""

import contextlib
import functools
import io
from pathlib import Path

import torch

from scripts.generate import main
from trainer.components import hf_checkpoint
from trainer.components.checkpoint import CheckpointManager
from trainer.components.hf_checkpoint import build_hugging_face
from trainer.components.hf_export import Export
from trainer.components.hf_files import HFFolder
from trainer.components.network import Network
from trainer.components.tokenizer import build_tokenizer
from trainer.config.manager import load_config
from trainer.config.schema_training import ModelConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.parallelize import parallelize

MESHES = {
    "llama": ["data_parallel_shard_degree", "tensor_parallel_degree", "pipeline_parallel_degree"],
    "llama_tied": ["data_parallel_shard_degree", "tensor_parallel_degree"],
    "deepseek_v3": ["data_parallel_shard_degree", "pipeline_parallel_degree", "expert_parallel_degree"],
}


def load_and_save(folder: str, case: str, axis: str) -> int:
    """Begin from a folder and save another, on a mesh of that axis. Return the numbers that this rank has read."""
    read = 0
    read_box = HFFolder.read

    def count(self, name, box=None):
        nonlocal read
        x = read_box(self, name, box)
        read += x.numel()
        return x

    HFFolder.read = count  # this process runs nothing else
    argv = [f"--parallelism.{axis}=2", "--training.mixed_precision_param=float32", "--checkpoint.enable"]
    argv += ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={folder}/{case}"]
    argv += ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    config = load_config(argv).config
    dims = ParallelDims.from_config(config.parallelism, 2)
    dims.build_mesh("cpu")
    network = Network.from_hf(HFFolder(f"{folder}/{case}"))
    model = network.build_meta()
    parallelize(model, plan=network.spec.build_plan(network.args), dims=dims, config=config)
    init_weights(model, seed=1, device=torch.device("cpu"), buffer_device=torch.device("cpu"))
    output = Path(folder, f"{case}-{axis}")
    hugging_face = build_hugging_face(
        config.checkpoint,
        model=ModelConfig(name=network.spec.name),
        args=network.args,
        folder=output,
        tokenizer=build_tokenizer("byte"),
    )
    manager = CheckpointManager({"model": model}, section=config.checkpoint, folder=output, hugging_face=hugging_face)
    assert manager.load() == 0
    if case == "llama" and axis == "tensor_parallel_degree":
        for name, parameter in model.named_parameters():
            if name == "layers.1.attention.wk.weight":
                assert parameter.to_local().shape[0] == parameter.shape[0] // 2, "sharded, or the test is none"
    assert manager.save(3, last=True)
    manager.close()
    return read


def load_and_save_all(folder: str) -> dict[tuple[str, str], int]:
    # Several files, so that ranks share the writing.
    hf_checkpoint.Export = functools.partial(Export, shard_size=100_000)
    return {(case, axis): load_and_save(folder, case, axis) for case, axes in MESHES.items() for axis in axes}


def generate(argv: list[str]) -> tuple[int, str]:
    """Run the script that samples, and return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return main(argv), out.getvalue()
