"""Whole runs of the program inside a test: `main` on each rank, with a trainer that tells what it did and can be disturbed."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_distributed
from trainer.components import checkpoint_files
from trainer.components.checkpoint_files import write_manifest
from trainer.config.errors import RunError
from trainer.distributed.watchdog import Watchdog

SECRETS = {name: f"hush-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
"""In the environment of every run."""
USER_MODULE = "tests.distributed.user_module"

CONFIG = f"""
[job]
dump_folder = "FOLDER/run"

[experimental]
custom_import = "{USER_MODULE}"

[model]
name = "bloomlet"
flavor = "tiny"
attn_mask_type = "block_causal"  # ranks have different numbers of labels

[optimizer]
lr = 5e-3

[lr_scheduler]
warmup_steps = 2
total_steps = 7
decay_type = "cosine"
min_lr_factor = 0.1

[training]
dataset = "notes"
local_batch_size = 2
global_batch_size = 8
seq_len = 64
steps = 7
mixed_precision_param = "float32"

[data]
packing = "best_fit"
cache_dir = "FOLDER/cache"

[validation]
dataset = "notes_held_out"
local_batch_size = 2
seq_len = 64
freq = 2

[activation_checkpoint]
mode = "none"

[metrics]
log_freq = 1
enable_tensorboard = false

[checkpoint]
interval = 2
keep_latest_k = 0
"""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in the first microbatch of some steps, on one rank. kind: a `loss` or `gradient` that is not finite, or a `spike`."""

    steps: tuple[int, ...]
    kind: str = "loss"
    rank: int = 0
    save_seconds: float = 0.0
    """Checkpoints take so much longer."""
    full_disk: tuple[int, ...] = ()
    """Saves of these steps find the disk full."""


@dataclass
class Account:
    """What one rank saw of a run."""

    exit_code: int | None = None
    error: str = ""
    """Type and message of what the run ended with, whether `main` raised it or told it."""
    stdout: str = ""
    stderr: str = ""
    sequences: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """Tokens of each sequence that this rank trained on, by step."""
    valid_tokens: dict[int, int] = field(default_factory=dict)
    """Labels of this rank, by step."""
    first_batches: list[dict[str, Tensor]] = field(default_factory=list)
    """This rank's microbatches of the first step."""
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Whole parameters and optimizer states, by step after which they were taken; 0 is before the first step."""


class Run:
    """A folder with a configuration, in which runs are started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "run.toml"
        self.config_file.write_text(CONFIG.replace("FOLDER", str(folder)))
        self.dump_folder = folder / "run"

    def __call__(
        self,
        world_size: int,
        *overrides: str,
        keep: tuple[int, ...] = (),
        fault: Fault | None = None,
        variables: Mapping[str, str] | None = None,
    ):
        """Start `main` on some ranks; return each rank's account, with the states after the steps in `keep`.

        variables: further ones of the environment that `main` is given.
        """
        argv = ["--job.config_file", str(self.config_file), *overrides]
        return run_distributed(run_main, world_size, argv, keep, fault, dict(variables or {}))

    def clone(self, name: str) -> "Run":
        """Return another run beside this one, which shares its token files."""
        folder = self.folder / name
        folder.mkdir()
        other = Run(folder)
        text = other.config_file.read_text().replace(f"{folder}/cache", f"{self.folder}/cache")
        other.config_file.write_text(text)
        return other

    @property
    def checkpoints(self) -> Path:
        return self.dump_folder / "checkpoint"

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """What metrics.jsonl holds: records of steps (a step trained twice counts the last time), or events of a kind."""
        lines = [json.loads(line) for line in (self.dump_folder / "metrics.jsonl").read_text().splitlines()]
        if event is not None:
            return [line for line in lines if line.get("event") == event]
        return list({line["step"]: line for line in lines if "event" not in line}.values())

    def curve(self, key: str = "loss") -> list[float]:
        return [line[key] for line in self.lines()]


def run_main(argv: list[str], keep: tuple[int, ...], fault: Fault | None, variables: Mapping[str, str]) -> Account:
    """Run `main` on this rank of the test's process group."""
    from trainer import trainer as trainer_module
    from trainer.train import main

    account = Account()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def write_manifest_slowly(*args: Any) -> None:
        if fault is not None:
            time.sleep(fault.save_seconds)
            if args[1]["step"] in fault.full_disk:
                raise OSError(28, "No space left on device")
        write_manifest(*args)

    def note(_: Watchdog, error: BaseException) -> None:
        if isinstance(error, RunError):
            account.error = f"{type(error).__name__}: {error}"

    probe = _make_probe(account, keep, fault if fault is not None and fault.rank == rank else None)
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), **SECRETS, **variables}
    with (
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
        mock.patch.object(trainer_module, "Trainer", probe),
        # The process group of the test stays.
        mock.patch.object(trainer_module, "open_store"),
        mock.patch.object(trainer_module, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(Watchdog, "explain", note),
        mock.patch.object(checkpoint_files, "write_manifest", write_manifest_slowly),
        mock.patch.dict(os.environ, SECRETS),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            account.exit_code = main(argv, environment)
        except Exception as error:
            account.error = f"{type(error).__name__}: {error}"
        stdout.seek(0)
        stderr.seek(0)
        account.stdout, account.stderr = stdout.read(), stderr.read()
    return account


def _make_probe(account: Account, keep: tuple[int, ...], fault: Fault | None) -> type:
    from trainer.components.loss import IGNORE_INDEX
    from trainer.trainer import Trainer

    class Probe(Trainer):
        """The trainer, observed at its seams."""

        _is_first_microbatch = False

        def train_step(self) -> None:
            if self.state.step == 0:
                self._take_states()
            self._is_first_microbatch = True
            super().train_step()

        def _next_batch(self) -> dict[str, Tensor]:
            batch = super()._next_batch()
            step = self.state.step + 1
            account.sequences.setdefault(step, []).extend(tuple(row) for row in batch["tokens"].tolist())
            valid = int((batch["labels"] != IGNORE_INDEX).sum())
            account.valid_tokens[step] = account.valid_tokens.get(step, 0) + valid
            if step == 1:
                account.first_batches.append(batch)
            return batch

        def _build_passes(self, *args: Any) -> Any:
            passes = super()._build_passes(*args)
            loss_fn = passes.loss_fn

            def spoiled(*args: Tensor) -> Tensor:
                loss = loss_fn(*args)
                hit = fault is not None and torch.is_grad_enabled() and self._is_first_microbatch
                self._is_first_microbatch = False
                if hit and self.state.step + 1 in fault.steps:
                    if fault.kind == "gradient":
                        return _PoisonGradient.apply(loss)
                    return loss * (float("nan") if fault.kind == "loss" else 50.0)
                return loss

            passes.loss_fn = spoiled
            return passes

        def _after_step(self) -> None:
            self._take_states()
            super()._after_step()

        def _take_states(self) -> None:
            if self.state.step in keep:
                named = {**dict(self.model.named_parameters()), **self.optimizers.state_dict()}
                account.states[self.state.step] = {name: _whole(tensor) for name, tensor in named.items()}

    return Probe


class _PoisonGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_succeeded(accounts: list[Account]) -> list[Account]:
    for account in accounts:
        assert (account.exit_code, account.error) == (0, ""), account.stdout + account.stderr
    return accounts


def assert_equal_states(actual: Account, expected: Account, step: int) -> None:
    """Parameters and optimizer states are the same in every bit."""
    assert actual.states[step].keys() == expected.states[step].keys()
    different = [n for n, value in actual.states[step].items() if not torch.equal(value, expected.states[step][n])]
    assert not different


def sequences_by_step(accounts: list[Account]) -> dict[int, list[tuple[int, ...]]]:
    """What all ranks trained on in each step, in an order that does not depend on who had what."""
    return {
        step: sorted(row for account in accounts for row in account.sequences[step]) for step in accounts[0].sequences
    }
