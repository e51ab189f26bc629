"""Runs that were measured on H200 (docs/benchmarks.md), and what the planner says of them.

`python -m tests.distributed.planner_table` plans all of them and prints the table of docs/planner.md.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from models.deepseek_v3.args import FLAVORS as DEEPSEEK_FLAVORS
from models.llama3.args import FLAVORS as LLAMA_FLAVORS
from trainer.config.manager import load_config
from trainer.planner.hardware import GIB
from trainer.planner.plan import Plan, make_plan

_CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"
_COPY_ENGINES = ("--job.config_file", str(_CONFIGS / "llama3_8b.toml"), "--parallelism.fsdp_collectives", "copy_engine")
_LLAMA = (*_COPY_ENGINES[:-1], "nccl")
_DEFAULT = ("--parallelism.fsdp_reshard_after_forward", "default")
_FOUR_LAYERS = ("--model.flavor", "4 layers of 8B")
_LOW_MOMENTS = ("--optimizer.state_dtype", "bfloat16")
_FLOAT8 = ("--job.config_file", str(_CONFIGS / "llama3_8b_float8.toml"), *_COPY_ENGINES[2:], *_DEFAULT)
_RECIPE = "--quantize.linear.float8.recipe_name"
_PRECOMPUTES = "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
_GATHERS_BF16 = (f"{_PRECOMPUTES}=false", "--quantize.linear.float8.enable_fsdp_float8_all_gather=false")
_LAYERS = (*_LLAMA, *_DEFAULT, "--model.flavor", "8 layers of 8B", "--training.local_batch_size")
_DEEPSEEK = ("--job.config_file", str(_CONFIGS / "deepseek_v3_16b.toml"), "--activation_checkpoint.mode")
_SIX_LAYERS = ("none", "--model.flavor", "6 layers of 16B", "--training.local_batch_size", "8")
_PP = ("--parallelism.pipeline_parallel_degree", "2")
_TP = ("--parallelism.tensor_parallel_degree", "2")
_CP = ("--parallelism.context_parallel_degree", "2")
_ONE_B = ("--job.config_file", str(_CONFIGS / "llama3_1b.toml"), "--activation_checkpoint.mode", "none")
_SCHEDULE = "--parallelism.pipeline_parallel_schedule"
_FULL = ("--activation_checkpoint.mode", "full", "--parallelism.context_parallel_degree")
_OP = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op")
_SIMPLE = ("--parallelism.data_parallel_implementation", "simple_fsdp", "--compile.scope", "model")
_BY_BLOCK = ("--compile.graph_passes", "transformer_block_bucketing")


@dataclass(frozen=True)
class Row:
    """One measured run."""

    name: str
    gpus: int
    arguments: tuple[str, ...]
    memory_gib: float
    """Reserved at most, as the log has it."""
    tokens_per_second: float
    """Per device."""


ROWS = (
    Row("Llama 8B, batch 2, reshard", 4, (*_LLAMA, *_DEFAULT), 106.4, 10567),
    Row("Llama 8B, batch 2, never reshard", 4, _LLAMA, 120.1, 10615),
    Row("Llama 8B, batch 1, copy engines", 4, (*_COPY_ENGINES, "--training.local_batch_size", "1"), 85.3, 10176),
    Row(
        "Llama 8B, 32,768 tokens, CP 2, full AC", 4,
        (*_LLAMA, *_DEFAULT, *_FULL, "2", "--training.seq_len", "32768"), 49.3, 5803,
    ),
    Row(
        "Llama 8B, 131,072 tokens, CP 4, full AC", 4,
        (*_LLAMA, *_DEFAULT, *_FULL, "4", "--training.seq_len", "131072", "--training.local_batch_size", "1"), 49.6, 2588,
    ),
    Row("Llama 8B, batch 2, copy engines, bf16 moments", 2, (*_COPY_ENGINES, *_DEFAULT, *_LOW_MOMENTS), 120.6, 10581),
    Row("Llama 8B, selective AC by operation", 2, (*_LLAMA, *_DEFAULT, *_OP), 95.8, 9376),
    Row("Llama 8B, full AC", 2, (*_LLAMA, *_DEFAULT, *_FULL[:2]), 72.6, 8457),
    Row("Llama 8B, TP 2, selective AC by operation", 2, (*_LLAMA, *_DEFAULT, *_OP, *_TP), 80.3, 8231),
    Row(
        "Llama 8B, PP 2, batch 8, selective AC by operation", 2,
        (*_LLAMA, *_DEFAULT, *_OP, *_PP, "--training.local_batch_size", "8"), 93.3, 8151,
    ),
    Row("Llama 8B, SimpleFSDP, bf16 moments", 2, (*_LLAMA, *_DEFAULT, *_LOW_MOMENTS, *_SIMPLE), 110.2, 10126),
    Row("Llama 8B, SimpleFSDP by block, bf16 moments", 2, (*_LLAMA, *_DEFAULT, *_LOW_MOMENTS, *_SIMPLE, *_BY_BLOCK), 109.7, 10380),
    Row("Llama 8B, float8 tensorwise, float8 gather", 2, _FLOAT8, 119.5, 14265),
    Row("Llama 8B, float8 delayed, float8 gather", 2, (*_FLOAT8, _RECIPE, "delayed", f"{_PRECOMPUTES}=false"), 119.5, 14687),
    Row("Llama 8B, float8 tensorwise", 2, (*_FLOAT8, *_GATHERS_BF16), 115.3, 13917),
    Row("Llama 8B, float8 rowwise", 2, (*_FLOAT8, *_GATHERS_BF16, _RECIPE, "rowwise"), 114.5, 11379),
    Row(
        "Llama 8B, float8 rowwise_with_gw_hp, bf16 moments", 2,
        (*_FLOAT8, *_GATHERS_BF16, _RECIPE, "rowwise_with_gw_hp", *_LOW_MOMENTS), 121.9, 12185,
    ),
    Row("4 layers of 8B", 1, (*_LLAMA, *_DEFAULT, *_FOUR_LAYERS), 46.7, 56212),
    Row("4 layers, float8 tensorwise", 1, (*_FLOAT8, *_FOUR_LAYERS), 44.3, 66601),
    Row("4 layers, float8 delayed", 1, (*_FLOAT8, *_FOUR_LAYERS, _RECIPE, "delayed", f"{_PRECOMPUTES}=false"), 44.3, 67427),
    Row("8 layers of 8B, FSDP 4", 4, (*_LAYERS, "2"), 35.7, 34612),
    Row("8 layers, FSDP 2 x TP 2", 4, (*_LAYERS, "4", *_TP), 34.7, 32749),
    Row("8 layers, FSDP 2 x CP 2", 4, (*_LAYERS, "4", *_CP), 35.8, 33432),
    Row("8 layers, TP 2 x CP 2", 4, (*_LAYERS, "8", *_TP, *_CP), 34.8, 31587),
    Row("8 layers, PP 2 x FSDP 2, 1F1B", 4, (*_LAYERS, "4", *_PP), 34.6, 27971),
    Row("8 layers, PP 2 x FSDP 2, Interleaved1F1B", 4, (*_LAYERS, "4", *_PP, _SCHEDULE, "Interleaved1F1B"), 39.5, 28884),
    Row("8 layers, PP 2 x FSDP 2, ZBVZeroBubble", 4, (*_LAYERS, "4", *_PP, _SCHEDULE, "ZBVZeroBubble"), 46.2, 27692),
    Row("8 layers, PP 2 x TP 2, 1F1B", 4, (*_LAYERS, "8", *_PP, *_TP), 24.2, 28305),
    Row("8 layers, FSDP 2, batch 4", 2, (*_LAYERS, "4"), 63.9, 36539),
    Row("8 layers, FSDP 2, batch 2", 2, (*_LAYERS, "2"), 46.5, 33620),
    Row("8 layers, TP 2", 2, (*_LAYERS, "8", *_TP), 65.1, 34219),
    Row("8 layers, CP 2", 2, (*_LAYERS, "8", *_CP), 64.0, 35287),
    Row("8 layers, CP 2, Ulysses", 2, (*_LAYERS, "8", *_CP, "--parallelism.context_parallel_method", "ulysses"), 66.4, 34581),
    Row("Llama 1B, documents", 2, (*_ONE_B, "--model.attn_mask_type", "block_causal"), 54.4, 54440),
    Row("Llama 1B, CPU offload", 2, (*_ONE_B, "--training.enable_cpu_offload"), 46.0, 19381),
    Row("6 layers of DeepSeek-V3 16B", 1, (*_DEEPSEEK, *_SIX_LAYERS), 82.0, 87876),
    Row("6 layers of 16B, FSDP 2", 2, (*_DEEPSEEK, *_SIX_LAYERS), 58.3, 90324),
    Row("6 layers of 16B, EP 2", 2, (*_DEEPSEEK, *_SIX_LAYERS, "--parallelism.expert_parallel_degree", "2"), 57.3, 84521),
    Row("DeepSeek-V3 16B, no AC", 4, (*_DEEPSEEK, "none"), 125.6, 19582),
    Row("16B, EP 4, no AC", 4, (*_DEEPSEEK, "none", "--parallelism.expert_parallel_degree", "4"), 126.6, 18766),
    Row("16B, selective AC by operation", 4, (*_DEEPSEEK[:2], *_OP), 108.9, 21406),
    Row("16B, selective AC by operation, bf16 moments", 2, (*_DEEPSEEK[:2], *_OP, *_LOW_MOMENTS), 116.5, 17458),
)  # fmt: skip


def plan_row(row: Row) -> Plan:
    """Return what the planner says of a measured run."""
    for n_layers in (4, 8):
        LLAMA_FLAVORS[f"{n_layers} layers of 8B"] = dataclasses.replace(LLAMA_FLAVORS["8B"], n_layers=n_layers)
    DEEPSEEK_FLAVORS["6 layers of 16B"] = dataclasses.replace(DEEPSEEK_FLAVORS["16B"], n_layers=6)
    return make_plan(load_config(row.arguments).config, row.gpus)


def compare(row: Row) -> tuple[float, float, float, float]:
    """Return planned memory in GiB, its deviation from the measured one as a share, planned tokens/s, and its deviation."""
    plan = plan_row(row)
    memory, speed = plan.worst.memory.reserved / GIB, plan.tokens_per_second
    return memory, memory / row.memory_gib - 1, speed, speed / row.tokens_per_second - 1


def main() -> None:
    """Print the table. Takes some 15 seconds of a core for each row."""
    print(
        "| run | GPUs | GiB: measured | planned | | tokens/s per GPU: measured | planned | |\n|-|-|-|-|-|-|-|-|",
        flush=True,
    )
    for row in ROWS:
        memory, memory_error, speed, speed_error = compare(row)
        cells = [row.name, row.gpus, row.memory_gib, f"{memory:.1f}", f"{100 * memory_error:+.1f}%"]
        cells += [f"{row.tokens_per_second:,.0f}", f"{speed:,.0f}", f"{100 * speed_error:+.1f}%"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
