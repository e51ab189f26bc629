"""Entry point: `python -m trainer.train --job.config_file FILE [--section.key value ...]`, one process a device.

Everything about the configuration is checked before torch is imported, so that a mistake is answered at once. This is the only
file that reads the environment.
"""

import importlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.components.launch import Launch
from trainer.components.logging_setup import setup_logging
from trainer.components.run_status import RunStatus
from trainer.config.durations import parse_duration
from trainer.config.errors import ConfigError, RunError
from trainer.config.manager import LoadedConfig, load_config
from trainer.config.render import format_config, write_config
from trainer.distributed.stop_signals import StopRequestedError, StopSignals
from trainer.preflight import check, check_conversion, check_registered

logger = logging.getLogger(__name__)

FAILED = 1
BAD_CONFIGURATION = 2
INTERRUPTED = 130  # as a shell reports Ctrl-C
_EARLY = " before training began"


def main(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run what the command line asks for.

    Return the exit code: 0, 1 for a run that cannot go on, 2 for a configuration that cannot be run, 130 after Ctrl-C.
    """
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    shown_ranks = {int(word) for word in environment.get("LOG_RANK", "0").split(",") if word.strip().isdecimal()}
    setup_logging(rank=rank, shown_ranks=shown_ranks)
    loaded = load_config(argv)
    config = loaded.config
    setup_logging(rank=rank, shown_ranks=shown_ranks, color=not config.metrics.disable_color_printing)
    plans = config.job.plan or config.job.plan_search
    if plans and config.plan.world_size is not None:
        world_size = config.plan.world_size
    try:
        # A search checks the layouts that it tries.
        check(loaded, None if config.job.plan_search else world_size, log_warnings=rank == 0, needs_files=not plans)
        if config.experimental.custom_import and not config.job.validate_only:
            importlib.import_module(config.experimental.custom_import)
            check_registered(loaded, needs_files=not plans)
        if config.model.converters and not (config.job.validate_only or plans):
            check_conversion(loaded, local_rank=int(environment.get("LOCAL_RANK", 0)), world_size=world_size)
    except ConfigError as error:
        # Every process of a host finds the same; one tells it.
        if int(environment.get("LOCAL_RANK", rank)) == 0:
            print(error, file=sys.stderr)
        return BAD_CONFIGURATION
    if config.job.validate_only:
        print(format_config(loaded))
        return 0
    if plans:
        return _plan(loaded, world_size)
    return _run(loaded, environment, rank=rank, world_size=world_size)


def _plan(loaded: LoadedConfig, world_size: int) -> int:
    """Answer without starting anything. Return the exit code: 0, 1 where nothing fits, 2 for what cannot be planned."""
    from trainer.planner.main import answer  # late: it imports torch

    try:
        return answer(loaded.config, world_size)
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIGURATION


def _run(loaded: LoadedConfig, environment: Mapping[str, str], *, rank: int, world_size: int) -> int:
    config = loaded.config
    status = RunStatus(Path(config.job.dump_folder), is_writer=rank == 0)
    if rank == 0:
        try:
            _write_down(loaded)
            status.clear()
        except OSError as error:
            logger.error(
                "job.dump_folder = %s: cannot be written (%s). Name another folder, or let this user write there",
                config.job.dump_folder, error,
            )  # fmt: skip
            return FAILED
    with StopSignals() as signals:
        try:
            return _train(loaded, environment, status, signals, rank=rank, world_size=world_size)
        except StopRequestedError:
            logger.warning("%s%s: the run ends", signals.requested, _EARLY, extra={"same_on_all_ranks": True})
            status.write("preempted", step=0, reason=f"{signals.requested}{_EARLY}")
            return 0


def _train(
    loaded: LoadedConfig,
    environment: Mapping[str, str],
    status: RunStatus,
    signals: StopSignals,
    *,
    rank: int,
    world_size: int,
) -> int:
    # Late: importing torch takes seconds, and neither an answer of `main` nor a stop before it needs that.
    from torch.distributed.elastic.multiprocessing.errors import record

    from trainer.distributed.watchdog import Watchdog
    from trainer.trainer import Trainer

    config = loaded.config
    launch = _describe_launch(environment, rank=rank, world_size=world_size, time_limit=config.job.time_limit)
    trainer: Trainer | None = None

    def get_step() -> int:
        return 0 if trainer is None else trainer.state.step

    def tell_of_leaving(message: str | None) -> None:
        reason = message or f"{signals.requested or 'SIGTERM'}{'' if trainer else _EARLY}"
        status.write("preempted" if message is None else "failed", step=get_step(), reason=reason)

    watchdog = Watchdog(config.comm, signals=signals, on_leave=tell_of_leaving)

    @record  # torchrun's closing report names the rank that failed first, with its traceback
    def train() -> str:
        nonlocal trainer
        try:
            with watchdog, Trainer(config, launch, watchdog, signals) as trainer:
                return trainer.train()
        except RunError as error:
            raise error.with_traceback(None) from None

    try:
        reason = train()
    except KeyboardInterrupt:
        # The user knows why: no traceback. torchrun, which got the same signal, ends the other processes.
        kept = "the same command goes on from the newest checkpoint" if config.checkpoint.enable else "nothing was kept"
        logger.warning("interrupted; %s", kept)
        status.write("preempted", step=get_step(), reason="Ctrl-C")
        return INTERRUPTED
    except Exception as error:
        status.write("failed", step=get_step(), reason=watchdog.message or f"{type(error).__name__}: {error}")
        if isinstance(error, RunError):  # the watchdog has told it, on one rank
            return FAILED
        raise
    if reason and not config.checkpoint.enable:
        reason += "; checkpoint.enable = false, so nothing was saved"
    status.write("preempted" if reason else "complete", step=get_step(), reason=reason or "training.steps are done")
    return 0


def _describe_launch(environment: Mapping[str, str], *, rank: int, world_size: int, time_limit: str | None) -> Launch:
    """Return what the environment tells of this process and its run."""
    from trainer.components.metric_writers import WANDB_NAMES  # late: it imports torch

    restart_counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return Launch(
        rank=rank,
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        world_size=world_size,
        is_restart=any(environment.get(name, "0") != "0" for name in restart_counts),
        ends_at=_find_end(time_limit, environment) if rank == 0 else None,
        # Not the API key, which the package reads for itself: what is here may end up in a report.
        wandb_variables={name: environment[name] for name in WANDB_NAMES if name in environment},
    )


def _find_end(time_limit: str | None, environment: Mapping[str, str]) -> float | None:
    """Return when this process has to have ended, by `time.monotonic`: by what is set, else by what SLURM says. None: whenever."""
    if time_limit is not None:
        seconds = parse_duration(time_limit)
        # run_train.sh says when it was started, which restarts in place do not change.
        spent = time.time() - float(environment.get("BLOOMERY_START_TIME", time.time()))
        return None if seconds is None else time.monotonic() + seconds - spent
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    try:
        command = ["squeue", "-h", "-j", job, "-o", "%L"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("SLURM does not say how much time job %s has left (%s): set job.time_limit", job, error)
        return None
    seconds = parse_duration(answer)
    return None if seconds is None else time.monotonic() + seconds


def _write_down(loaded: LoadedConfig) -> None:
    """Say what is run, and keep the resolved configuration beside its results."""
    config = loaded.config
    logger.info("%s (%s %s)", config.job.description, config.model.name, config.model.flavor)
    if config.job.print_config:
        print(format_config(loaded), flush=True)
    folder = Path(config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "config.toml", origins=loaded.origins)
    if config.job.save_config_file:
        write_config(config, folder / config.job.save_config_file, origins=loaded.origins)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
