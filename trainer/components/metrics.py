"""What one sees of a run: a line every few steps, a progress bar, curves, and a summary at the end.

Units. A token is a position given to the model, padding and positions without a loss included. `tokens_per_second` is per
device: tokens of all ranks, by the number of devices and the seconds between two logged steps. Seconds inside
`MetricsLogger.pause()` (validation, checkpoints) are not counted. `tflops` and `mfu` take the FLOPs of exact causal
attention and of the forward and backward pass without recomputation; `mfu_full` takes those of attention over the whole
square, as torchtitan and PaLM (arXiv 2204.02311, appendix B) do, and is higher for the same speed. Both are percent of
the dense bf16 peak, and absent where that is not known. `data_wait` is the share of the time (0 to 1) in which the loop
waited for a batch. Memory is that of the first rank's device, at its peak since the last logged step.
"""

import logging
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.components.checkpoint_write import SaveReport
from trainer.components.environment import describe_environment
from trainer.components.hardware import MemoryMonitor, MemoryUse, get_device_name, get_peak_flops
from trainer.components.logging_setup import take_warnings
from trainer.components.metric_writers import METRICS_FILE, MetricWriter, build_writers
from trainer.components.progress import ProgressBar
from trainer.components.stragglers import Stragglers
from trainer.config.schema import MetricsConfig

logger = logging.getLogger(__name__)

_COLORS = {"step": "31", "loss": "32", "grad": "33", "tok/s": "34", "mfu": "36", "mem": "35", "data": "37", "eta": "90"}


@dataclass(frozen=True)
class Workload:
    """What one step costs, for speed and MFU.

    Args:
        world_size: devices of the run.
        dp_degree: ranks that see different data.
        flops_per_token: forward and backward FLOPs of one token with exact causal attention.
        flops_per_token_full: the same with attention over the whole square.
        peak_flops: dense peak of one device in FLOP/s. None: by the name of the device, where the table has it.
    """

    world_size: int
    dp_degree: int
    flops_per_token: float
    flops_per_token_full: float
    peak_flops: float | None = None


@dataclass(frozen=True)
class Summary:
    """A run, or the part of it since the last resume, in a few numbers."""

    steps: int
    first_loss: float | None
    last_loss: float | None
    tokens_seen: int
    median_tokens_per_second: float | None
    seconds: float
    peak_memory_gib: float


class MetricsLogger:
    """Collects what the training loop reports, and shows and stores it every `log_freq` steps.

    The loop calls `begin` once, then in each step `add_data_wait`, `add_tokens` and, at its end, `log`. The device is
    waited for only in the steps that are logged: the first of this process, each `log_freq`-th and the last.

    Args:
        section: `metrics`.
        dump_folder: folder of the run.
        rank: number of this process. Only the first one shows a line; others write with `save_for_all_ranks`.
        device: device of this process.
        total_steps: steps of the whole run.
        workload: what a step costs.
        wandb_variables: the WANDB_* variables of the environment.
        run_config: the resolved configuration, for W&B.
        stragglers: what compares the ranks, if anything does.
    """

    def __init__(
        self,
        *,
        section: MetricsConfig,
        dump_folder: str | Path,
        rank: int,
        device: torch.device,
        total_steps: int,
        workload: Workload,
        wandb_variables: Mapping[str, str] | None = None,
        run_config: Mapping[str, Any] | None = None,
        stragglers: Stragglers | None = None,
    ) -> None:
        if section.log_freq < 1:
            raise ValueError(f"metrics.log_freq = {section.log_freq}: must be at least 1 step")
        self._section, self._workload = section, workload
        self._rank, self._total_steps = rank, total_steps
        self._stragglers = stragglers
        self._dump_folder = Path(dump_folder)
        self._wandb = (wandb_variables or {}, run_config)
        self._color = sys.stdout.isatty() and not section.disable_color_printing
        name = get_device_name(device)
        self._peak_flops = workload.peak_flops or get_peak_flops(name)
        if self._peak_flops is None and rank == 0:
            logger.info("no peak FLOP/s is known for %s, so MFU is left out", name)
        self._active = rank == 0 or section.save_for_all_ranks
        self._device = device
        self._memory = MemoryMonitor(device)
        self._writers: list[MetricWriter] = []
        self._bar: ProgressBar | None = None
        self._speeds: list[float] = []
        self._losses: list[float] = []
        self._peak_memory = 0.0
        self._first_step = self._last_step = self.tokens_seen = 0
        self._began = time.perf_counter()
        self._elapsed_before = 0.0
        self._open_window(0, self._began)

    def begin(self, *, step: int, tokens_seen: int, elapsed_seconds: float = 0.0) -> None:
        """Open the files and start the clock, just before the first step of this process.

        Args:
            step: steps already done: 0, or the step of the checkpoint.
            tokens_seen: tokens of all ranks up to there.
            elapsed_seconds: time that it took up to there.
        """
        self._first_step = self._last_step = step
        self.tokens_seen = tokens_seen
        if self._active:
            self._open_files(step, tokens_seen)
        # Opening TensorBoard and W&B takes seconds that are no training.
        self._began = time.perf_counter()
        self._elapsed_before = elapsed_seconds
        self._open_window(step, self._began)

    def get_elapsed_seconds(self) -> float:
        """Return the time since the first step of the run, without that between a stop and a resume."""
        return self._elapsed_before + time.perf_counter() - self._began

    def agree_on_elapsed_seconds(self) -> float:
        """Return that time, the same on all ranks: what differs by rank could not be resumed on another number of them. Collective."""
        elapsed = torch.tensor(self.get_elapsed_seconds(), dtype=torch.float32, device=self._device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        return elapsed.item()

    def rewind(self, step: int, *, tokens_seen: int, failed_step: int) -> None:
        """Go on from an earlier step of this process. Readers of the file leave out the records after it, as at a resume.

        tokens_seen: of all ranks up to there. failed_step: the step that was the reason.
        """
        self.tokens_seen = tokens_seen
        self.event("rollback", step, failed_step=failed_step)
        self.event("resume", step, quiet=True, tokens_seen=tokens_seen)
        self._open_window(step, time.perf_counter())

    def _open_files(self, step: int, tokens_seen: int) -> None:
        variables, run_config = self._wandb
        self._writers = build_writers(
            section=self._section,
            dump_folder=self._dump_folder,
            rank=self._rank,
            step=step,
            wandb_variables=variables,
            run_config=run_config,
        )
        if self._rank == 0:
            self._bar = ProgressBar(total=self._total_steps, initial=step, enabled=self._section.progress_bar)
        self.event("resume" if step else "start", step, quiet=True, tokens_seen=tokens_seen)
        environment = describe_environment(self._device, self._workload.world_size)
        self.event("environment", step, quiet=True, **environment)

    def _open_window(self, step: int, now: float) -> None:
        """Begin to count for the next logged step."""
        self._window_step, self._window_began = step, now
        self._window_tokens, self._window_wait, self._paused = 0, 0.0, 0.0

    def add_tokens(self, count: int) -> None:
        """Count positions that this data-parallel rank gave to the model. Every such rank must give as many."""
        self._window_tokens += count
        self.tokens_seen += count * self._workload.dp_degree

    def add_data_wait(self, seconds: float) -> None:
        """Count seconds in which the training loop waited for a batch."""
        self._window_wait += seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of speed: for validation, checkpoints and traces."""
        if self._device.type == "cuda":
            # What the device still has to do belongs to training.
            torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def should_log(self, step: int) -> bool:
        """Whether `step` is logged. The same on all ranks, so that it can decide on a collective."""
        return step in (self._first_step + 1, self._total_steps) or step % self._section.log_freq == 0

    def log(
        self,
        step: int,
        *,
        loss: torch.Tensor | float,
        grad_norm: torch.Tensor | float,
        lr: float,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Report a finished step. Costs nothing, and waits for nothing, unless `should_log(step)`.

        Args:
            step: steps done, this one included.
            loss: mean over the valid tokens of all ranks; a 0-dim tensor or a number.
            grad_norm: norm of the whole gradient before clipping; likewise.
            lr: learning rate of this step.
            extra: further values. 0-dim tensors are fetched like the loss.
        """
        self._last_step = step
        if not self._active:
            return
        if not self.should_log(step):
            if self._bar is not None:
                self._bar.advance_to(step)
            return
        record = {"step": step, "loss": _to_number(loss), "grad_norm": _to_number(grad_norm), "lr": lr}
        further = {key: _to_number(value) for key, value in (extra or {}).items()}
        # The clock is read after the loss is there: only then has the device done this step.
        now = time.perf_counter()
        memory = self._memory.read()
        record |= self._measure(step, now) | _get_memory_values(memory)
        if self._rank == 0 and self._stragglers is not None:
            further |= self._stragglers.tell(step_seconds=record["step_seconds"])
        record |= {
            "tokens_seen": self.tokens_seen,
            "elapsed_seconds": self.get_elapsed_seconds(),
            "time": time.time(),
            **further,
        }
        self._keep(record)
        for writer in self._writers:
            writer.write_step(record)
        self._tell_warnings(step)
        if self._bar is not None:
            self._bar.advance_to(step, loss=record["loss"])
        if self._rank == 0:
            logger.info(self._format_line(record))
        self._open_window(step, now)

    def _measure(self, step: int, now: float) -> dict[str, Any]:
        """Speed since the last logged step."""
        work = self._workload
        seconds = max(now - self._window_began - self._paused, 1e-9)
        steps = max(step - self._window_step, 1)
        # One data-parallel rank is world_size / dp_degree devices.
        speed = self._window_tokens * work.dp_degree / work.world_size / seconds
        peak = self._peak_flops
        return {
            "tokens_per_second": speed,
            "mfu": None if peak is None else 100 * speed * work.flops_per_token / peak,
            "mfu_full": None if peak is None else 100 * speed * work.flops_per_token_full / peak,
            "tflops": speed * work.flops_per_token / 1e12,
            "step_seconds": seconds / steps,
            "data_wait": min(self._window_wait / seconds, 1.0),
            "data_wait_seconds": self._window_wait / steps,
        }

    def _keep(self, record: Mapping[str, Any]) -> None:
        """Remember what the summary needs. The first step of a process warms up, so its speed says nothing."""
        if record["step"] > self._first_step + 1:
            self._speeds.append(record["tokens_per_second"])
        self._losses = [*self._losses[:1], record["loss"]]
        self._peak_memory = max(self._peak_memory, record["memory_gib"])

    def _format_line(self, record: Mapping[str, Any]) -> str:
        cells = [
            ("step", f"{record['step']}/{self._total_steps}"),
            ("loss", f"{record['loss']:.4f}"),
            ("grad", f"{record['grad_norm']:.3f}"),
            ("lr", f"{record['lr']:.2e}"),
            ("tok/s", f"{record['tokens_per_second']:,.0f}"),
            ("mfu", None if record["mfu"] is None else f"{record['mfu']:.1f}%"),
            ("mem", f"{record['memory_gib']:.2f}GiB ({record['memory_percent']:.0f}%)"),
            ("data", f"{100 * record['data_wait']:.1f}% ({record['data_wait_seconds']:.3f}s)"),
        ]
        left = (self._total_steps - record["step"]) * record["step_seconds"]
        # The first step of a process compiles and warms up: no measure of the others.
        cells.append(("eta", format_seconds(left) if record["step"] > self._first_step + 1 else None))
        return "  ".join(self._paint(name, text) for name, text in cells if text is not None)

    def _paint(self, name: str, text: str) -> str:
        color = _COLORS.get(name)
        return f"\033[{color}m{name} {text}\033[0m" if self._color and color else f"{name} {text}"

    def event(self, kind: str, step: int, *, quiet: bool = False, **fields: Any) -> None:
        """Note that something happened after `step`: a checkpoint, a skipped step, a validation.

        Args:
            kind: one word. Curves of its numbers are named `kind/field`.
            step: steps done.
            quiet: leave it out of the log.
            fields: what there is to say. 0-dim tensors are fetched.
        """
        values = {key: _to_number(value) for key, value in fields.items()}
        for writer in self._writers:
            writer.write_event(kind, step, values)
        if not quiet and self._rank == 0:
            told = ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            logger.info("%s at step %d: %s", kind, step, told)
        self._tell_warnings(step)

    def _tell_warnings(self, step: int) -> None:
        """Note what this process has warned of. step: known of at that time; a warning may be a few steps older."""
        for kind, message in take_warnings() if self._writers else ():
            for writer in self._writers:
                writer.write_event(kind, step, {"message": message})

    def report_saves(self, step: int, reports: Iterable[SaveReport]) -> None:
        """Note the saves that have ended by `step`, in the background too: what each cost, or that it failed."""
        for report in reports:
            values = {"saved_step": report.step, "seconds": report.seconds, "stall_seconds": report.stall_seconds}
            if report.error:
                self.event("checkpoint_failed", step, quiet=True, **values, error=report.error)
            else:
                self.event("checkpoint", step, quiet=True, **values, gib=report.size / 2**30)

    def summarize(self) -> Summary:
        """Return the numbers of this process so far."""
        return Summary(
            steps=self._last_step - self._first_step,
            first_loss=self._losses[0] if self._losses else None,
            last_loss=self._losses[-1] if self._losses else None,
            tokens_seen=self.tokens_seen,
            median_tokens_per_second=statistics.median(self._speeds) if self._speeds else None,
            seconds=time.perf_counter() - self._began,
            peak_memory_gib=self._peak_memory,
        )

    def close(self, *, checkpoint: str | Path | None = None) -> None:
        """Take the progress bar away, log a summary and close the files. Can be called twice.

        Args:
            checkpoint: where the newest checkpoint is.
        """
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if not self._writers:
            return
        summary = self.summarize()
        self.event("end", self._last_step, quiet=True, **{k: v for k, v in vars(summary).items() if v is not None})
        for writer in self._writers:
            writer.close()
        self._writers = []
        if self._rank == 0:
            for line in self._describe(summary, checkpoint):
                logger.info(line)

    def _describe(self, summary: Summary, checkpoint: str | Path | None) -> Iterator[str]:
        yield f"trained {summary.steps} steps in {format_seconds(summary.seconds)}"
        if summary.first_loss is not None and summary.last_loss is not None:
            yield f"loss        {summary.first_loss:.4f} -> {summary.last_loss:.4f}"
        yield f"tokens      {summary.tokens_seen:,} seen"
        if summary.median_tokens_per_second is not None:
            yield f"speed       {summary.median_tokens_per_second:,.0f} tokens/s per device (median)"
        if summary.steps:
            yield f"memory      {summary.peak_memory_gib:.2f} GiB at most"
        yield f"metrics     {self._dump_folder / METRICS_FILE}"
        if self._section.enable_tensorboard:
            yield f"curves      tensorboard --logdir {self._dump_folder / self._section.save_tb_folder}"
        if checkpoint is not None:
            yield f"checkpoint  {checkpoint}"


def _get_memory_values(use: MemoryUse) -> dict[str, Any]:
    return {
        "memory_gib": use.gib,
        "memory_percent": use.percent,
        "memory_active_gib": use.active_gib,
        "memory_retries": use.retries,
        "memory_ooms": use.out_of_memory,
    }


def _to_number(value: Any) -> Any:
    """A 0-dim tensor as a Python number; anything else as it is."""
    if isinstance(value, torch.Tensor):
        # Gathering is a collective, and not every rank comes here.
        assert not hasattr(value, "full_tensor"), "metrics take plain tensors: call full_tensor() on all ranks first"
        return value.item()
    return value


def format_seconds(seconds: float) -> str:
    """Write a duration as one reads it: 42s, 12m05s, 3h07m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
