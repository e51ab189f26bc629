"""Whole runs of the trainer on one GPU: fast and exact to resume, and what is left when something goes wrong.

Runs of one test module share a process, so that CUDA starts and the blocks are compiled once.
"""

import contextlib
import gzip
import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.common.attention import build_document_mask
from tests.distributed.harness import run_distributed
from trainer.components import passes as passes_module
from trainer.components.hardware import use_device
from trainer.components.metric_writers import METRICS_FILE, read_metrics
from trainer.config.manager import load_config
from trainer.distributed.watchdog import Watchdog
from trainer.preflight import check
from trainer.trainer import Launch, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS, SAVED_STEP = 6, 3

COMMON = [
    "--model.flavor=debugmodel",
    "--model.attn_mask_type=block_causal",
    "--training.dataset=text",
    "--training.local_batch_size=4",
    "--training.seq_len=256",
    "--lr_scheduler.warmup_steps=2",
    "--metrics.log_freq=1",
    "--metrics.enable_tensorboard=false",
    "--metrics.progress_bar=false",
    "--activation_checkpoint.mode=none",
]
FAST = [
    "--compile.enable",
    "--activation_checkpoint.mode=selective",
    "--activation_checkpoint.selective_ac_option=op",
    "--checkpoint.enable",
    f"--checkpoint.interval={SAVED_STEP}",
    "--checkpoint.async_mode=async_with_pinned_mem",
    "--debug.deterministic",
    f"--training.steps={STEPS}",
]


class Probe(Trainer):
    """The trainer, with a copy of its weights and optimizer states after each step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states: dict[int, dict[str, Tensor]] = {}

    def _after_step(self) -> None:
        named = {**dict(self.model.named_parameters()), **self.optimizers.state_dict()}
        self.states[self.state.step] = {name: _local(tensor).clone() for name, tensor in named.items()}
        super()._after_step()


def _local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


@contextlib.contextmanager
def open_trainer(folder: Path, *overrides: str) -> Iterator[Probe]:
    """Build a trainer that starts and ends a process group of its own, in place of that of the test."""
    if dist.is_initialized():
        dist.destroy_process_group()
    paths = [f"--training.dataset_path={folder.parent}/text", f"--data.cache_dir={folder.parent}/cache"]
    loaded = load_config([*COMMON, *paths, f"--job.dump_folder={folder}", *overrides])
    check(loaded, 1)
    folder.mkdir(exist_ok=True)
    try:
        with Watchdog(loaded.config.comm) as watchdog, Probe(loaded.config, Launch(), watchdog) as trainer:
            yield trainer
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.use_deterministic_algorithms(False)


def read_steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder / METRICS_FILE) if "event" not in record]


def find_differences(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    assert some.keys() == others.keys()
    return [name for name, tensor in some.items() if not torch.equal(tensor, others[name])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text: documents of a few words to a few sentences."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    generator = random.Random(0)
    words = ("iron", "bloom", "slag", "charcoal", "tuyere", "furnace", "anvil", "hammer")
    for number in range(400):
        text = " ".join(generator.choices(words, k=generator.randint(5, 60)))
        (folder / "text" / f"{number}.txt").write_text(text)
    return folder


# --- exactness ---


def train_fast_resumed_and_plain(folder: Path) -> dict[str, Any]:
    """Train compiled; again from the checkpoint in the middle; and in fp32, eager, with a dense mask and no recomputation."""
    with open_trainer(folder / "fast", *FAST) as trainer:
        trainer.train()
        fast = trainer.states
    saved = f"checkpoint/step-{SAVED_STEP}"
    shutil.copytree(folder / "fast" / saved, folder / "resumed" / saved)
    with open_trainer(folder / "resumed", *FAST) as trainer:
        trainer.train()
        resumed = trainer.states
    differences = {step: find_differences(resumed[step], fast[step]) for step in resumed}
    dense = lambda positions, device_type: build_document_mask(positions, device_type="cpu")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes_module, "build_document_mask", dense)
        with open_trainer(
            folder / "plain", "--training.mixed_precision_param=float32", "--training.steps=1"
        ) as trainer:
            trainer.train()
    return {"differences": differences, "changed": find_differences(fast[1], fast[STEPS])}


@pytest.fixture(scope="module")
def exact(folder: Path) -> dict[str, Any]:
    return run_distributed(train_fast_resumed_and_plain, 1, folder, backend="nccl", timeout=280.0)[0]


def test_resume_from_a_pinned_asynchronous_checkpoint_is_bitwise(exact: dict[str, Any], folder: Path) -> None:
    assert exact["differences"] == {step: [] for step in range(SAVED_STEP + 1, STEPS + 1)}
    assert exact["changed"], "otherwise this test shows nothing"
    expected = {record["step"]: (record["loss"], record["grad_norm"]) for record in read_steps(folder / "fast")}
    resumed = {record["step"]: (record["loss"], record["grad_norm"]) for record in read_steps(folder / "resumed")}
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert resumed == {step: values for step, values in expected.items() if step > SAVED_STEP}


@pytest.mark.usefixtures("exact")
def test_compiled_bf16_run_agrees_with_a_plain_one(folder: Path) -> None:
    fast, plain = read_steps(folder / "fast"), read_steps(folder / "plain")
    assert fast[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-2)
    assert fast[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=5e-2)
    assert fast[-1]["loss"] < fast[0]["loss"]
    assert fast[-1]["memory_gib"] > 0


# --- when something goes wrong ---


class SpoiledLoss:
    """A loss that turns not finite at its second call."""

    def __init__(self, loss_fn: Any) -> None:
        self.loss_fn, self.calls = loss_fn, 0

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls += 1
        loss = self.loss_fn(*args)
        return loss * float("nan") if self.calls == 2 else loss


class GreedyLoss(SpoiledLoss):
    """A loss that asks, at its second call, for twice the memory of the device."""

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
        return self.loss_fn(*args)


def train_through_faults(folder: Path) -> dict[str, Any]:
    """Train four steps, the second of which is not finite, with a trace of the last; then run out of memory."""
    facts: dict[str, Any] = {}
    profiling = ["--profiling.enable_profiling", "--profiling.profile_freq=4", "--profiling.profiler_warmup=1"]
    skip = ["--training.steps=4", "--training.nonfinite_policy=skip"]
    with open_trainer(folder / "skips", *skip, *profiling) as trainer:
        trainer.passes.loss_fn = SpoiledLoss(trainer.passes.loss_fn)
        trainer.train()
        states = trainer.states
        facts["changes"] = {step: len(find_differences(states[step], states[step - 1])) for step in (2, 3, 4)}
        facts["counts"] = {states[4][name].item() for name in states[4] if name.endswith(".step")}
        facts["finite"] = all(bool(tensor.isfinite().all()) for tensor in states[4].values())
        facts["parameters"] = len(list(trainer.model.parameters()))
    with open_trainer(folder / "memory", "--training.steps=3", "--profiling.enable_memory_snapshot") as trainer:
        trainer.passes.loss_fn = GreedyLoss(trainer.passes.loss_fn)
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            facts["error"] = str(error)
    return facts


@pytest.fixture(scope="module")
def faults(folder: Path) -> dict[str, Any]:
    return run_distributed(train_through_faults, 1, folder, backend="nccl", timeout=200.0)[0]


def test_step_that_is_not_finite_updates_nothing_and_training_goes_on(faults: dict[str, Any], folder: Path) -> None:
    assert faults["changes"][2] == 0, "weights, moments and counts"
    assert faults["changes"][3] >= 3 * faults["parameters"]
    assert faults["counts"] == {3.0}, "a skipped step does not count in Adam's bias correction"
    assert faults["finite"]
    (record,) = [json.loads(line) for line in (folder / "skips" / "nonfinite.jsonl").read_text().splitlines()]
    assert (record["step"], record["loss"]) == (2, "nan")


@pytest.mark.usefixtures("faults")
def test_trace_holds_kernels_of_the_gpu(folder: Path) -> None:
    (path,) = (folder / "skips" / "profile_traces").glob("*/rank_0.trace.json.gz")
    assert path.parent.name == "step_4"
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) > 50


def test_running_out_of_memory_leaves_a_snapshot(faults: dict[str, Any], folder: Path) -> None:
    assert "out of memory" in faults["error"]
    (path,) = (folder / "memory" / "memory_snapshot").glob("*/rank_0.pickle")
    assert path.parent.name == "step_2_out_of_memory"
    snapshot = pickle.loads(path.read_bytes())
    assert snapshot["segments"]
    assert any(event["action"] == "oom" for event in snapshot["device_traces"][0])


def test_more_processes_than_gpus_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"there are {count}"):
        use_device(count)
