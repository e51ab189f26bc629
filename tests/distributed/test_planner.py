"""Plans of runs that were measured, and of small ones. Each dry run is a process of its own, of the planner's making."""

import dataclasses
import json
from pathlib import Path

import pytest

from models.deepseek_v3.args import FLAVORS
from tests.distributed.planner_table import ROWS, compare
from trainer.config.manager import load_config
from trainer.planner.hardware import GIB, GPUS
from trainer.planner.main import answer
from trainer.planner.plan import Plan, make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"
MEASURED = {row.name: row for row in ROWS}


def plan(arguments: list[str], world_size: int) -> Plan:
    return make_plan(load_config(arguments).config, world_size)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("8 layers, PP 2 x FSDP 2, 1F1B", marks=pytest.mark.exhaustive),
        pytest.param("Llama 8B, SimpleFSDP by block, bf16 moments", marks=pytest.mark.exhaustive),
        "6 layers of 16B, EP 2",
    ],
)
def test_memory_and_speed_are_those_that_were_measured(name: str) -> None:
    """All rows: `python -m tests.distributed.planner_table`."""
    _, memory_error, _, speed_error = compare(MEASURED[name])
    assert abs(memory_error) < 0.05
    assert abs(speed_error) < 0.15


def test_plans_of_a_small_model(tmp_path: Path) -> None:
    debug = [
        "--job.config_file",
        str(CONFIGS / "debug_llama3.toml"),
        "--training.seq_len",
        "512",
        "--plan.memory_gib",
        "3",
    ]
    plain = plan(debug, 8)
    parallel = plan([*debug, "--parallelism.tensor_parallel_degree", "2", "--activation_checkpoint.mode", "full"], 8)
    n_bytes = 4 * plain.parameters / 8
    parts = plain.worst.memory.parts
    assert parts["parameters"] == pytest.approx(n_bytes, rel=0.15)
    assert parts["optimizer"] == pytest.approx(2 * n_bytes, rel=0.05)
    assert parallel.worst.memory.parts["activations"] < 0.5 * parts["activations"]
    assert {entry.axis for entry in plain.transfers} == {"fsdp"}
    assert {entry.axis for entry in parallel.transfers} == {"fsdp", "tp"}
    gathered = next(entry for entry in plain.transfers if entry.kind == "all-gather")
    assert gathered.bytes >= 2 * plain.parameters  # bf16, each weight once or twice
    assert plain.fits
    assert plain.notes[0].startswith("rates measured on H200")
    assert "between hosts" not in plain.notes[0]
    float8 = ["--model.converters", "float8", "--quantize.linear.float8.recipe_name", "delayed"]
    float8 += ["--quantize.linear.float8.enable_fsdp_float8_all_gather", "--training.gradient_wire_dtype", "float8"]
    low = plan([*debug, *float8, "--optimizer.state_dtype", "bfloat16"], 8)
    assert low.worst.memory.parts["optimizer"] == pytest.approx(n_bytes, rel=0.05)
    assert low.busy_seconds["float8 matmul"] > 0
    assert sum(entry.bytes for entry in low.transfers) < 0.5 * sum(entry.bytes for entry in plain.transfers)
    offloaded = plan([*debug, "--training.enable_cpu_offload", "--model.attn_mask_type", "block_causal"], 8)
    parts = offloaded.worst.memory.parts
    assert parts["parameters"] < 0.1 * n_bytes  # buffers
    assert parts["optimizer"] == parts["gradients"] == 0
    assert offloaded.worst.memory.reserved < plain.worst.memory.reserved
    # Shards there, in the forward pass and in the backward pass, gradients back.
    copied = GPUS["H200"].pcie_bandwidth * offloaded.busy_seconds["host copy"]
    assert 2 * n_bytes <= copied <= 3.1 * n_bytes
    assert offloaded.step_seconds > plain.step_seconds + 0.5 * offloaded.busy_seconds["host"]


def plan_four_layers(monkeypatch: pytest.MonkeyPatch, world_size: int, *more: str, **parallelism: str) -> Plan:
    """Plan a mixture with experts on two ranks, one dense block, and recomputation. more: arguments."""
    sizes = dataclasses.replace(FLAVORS["debugmodel"], n_layers=4, balance_loss_alpha=0.01)
    monkeypatch.setitem(FLAVORS, "4 layers", sizes)
    arguments = {
        "job.config_file": str(CONFIGS / "debug_deepseek_v3.toml"),
        "model.flavor": "4 layers",
        "parallelism.expert_parallel_degree": "2",
        "activation_checkpoint.mode": "full",
    } | {f"parallelism.{key}": value for key, value in parallelism.items()}
    return plan([*(word for key, value in arguments.items() for word in (f"--{key}", value)), *more], world_size)


@pytest.mark.exhaustive
def test_two_passes_at_once_are_both_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = {"pipeline_parallel_degree": "2", "pipeline_parallel_schedule": "DualPipeV"}
    together = plan_four_layers(monkeypatch, 8, **schedule)
    apart = plan_four_layers(monkeypatch, 8, **schedule, pipeline_parallel_expert_parallel_overlap="false")
    assert together.worst.memory.reserved == pytest.approx(apart.worst.memory.reserved, rel=0.2)
    counts = [sorted((x.axis, x.kind, x.count) for x in planned.transfers) for planned in (together, apart)]
    assert counts[0] == counts[1]
    # Turns hide exchanges: no pass is counted in the time of the other as well.
    assert together.step_seconds < 1.02 * apart.step_seconds


@pytest.mark.exhaustive
def test_stages_in_float8_bring_their_amaxes_together() -> None:
    float8 = ["--model.converters", "float8", "--quantize.linear.float8.recipe_name", "delayed"]
    stages = ["--parallelism.pipeline_parallel_degree", "2"]
    planned = plan(["--job.config_file", str(CONFIGS / "debug_llama3.toml"), *float8, *stages], 8)
    assert [entry.count for entry in planned.transfers if entry.axis == "stage"] == [1]


def test_experts_are_gathered_once_for_each_of_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes late or again in a backward pass with recomputation: blocks, and the gradient of the balance loss."""
    n_layers, n_dense = 4, 1
    planned = plan_four_layers(monkeypatch, 64, "--training.enable_cpu_offload")
    counts = {(entry.axis, entry.kind): entry.count for entry in planned.transfers}
    # 32 ranks for 8 experts: what each matrix is cut along is not its first dim.
    assert counts["efsdp", "all-gather"] == 2 * (n_layers - n_dense)
    # Embeddings, blocks and output; the output stays gathered between its passes.
    assert counts["fsdp", "all-gather"] == 2 * (n_layers + 2) - 1
    assert "between hosts assumed: 45 GB/s" in planned.notes[0]
    parts, n_bytes = planned.worst.memory.parts, 4 * planned.parameters / 64
    assert parts["gathered weights"] > 0
    # In host memory, experts too: shards are copied for each gather, gradients back.
    assert parts["parameters"] < 0.5 * n_bytes  # buffers
    assert parts["optimizer"] == parts["gradients"] == 0
    copied = GPUS["H200"].pcie_bandwidth * planned.busy_seconds["host copy"]
    assert 2.8 * n_bytes < copied < 3.5 * n_bytes


def test_answer_is_no_where_memory_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    debug = ["--job.config_file", str(CONFIGS / "debug_llama3.toml"), "--plan.memory_gib", "0.5"]
    config = load_config([*debug, "--job.dump_folder", str(tmp_path)]).config
    assert answer(config, 8) == 1
    assert "NO, it does not fit" in capsys.readouterr().out
    data = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert data["fits"] is False
    assert data["gpu_bytes"] == GIB // 2
    assert (tmp_path / "plan" / "memory.png").exists()


def test_copy_engines_that_would_be_refused_are_refused() -> None:
    sharding = ["--parallelism.fsdp_collectives", "copy_engine", "--plan.gpus_per_host", "4"]
    debug = ["--job.config_file", str(CONFIGS / "debug_llama3.toml"), *sharding]
    with pytest.raises(ValueError, match="spans 2 hosts of 4 GPUs"):
        plan(debug, 8)
    assert plan(debug, 4).fits
