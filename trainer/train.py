"""Entry point: `python -m trainer.train --job.config_file FILE [--section.key value ...]`, one process a device.

Everything about the configuration is checked before torch is imported, so that a mistake is answered at once. This is the only
file that reads the environment.
"""

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.components.logging_setup import setup_logging
from trainer.config.errors import ConfigError
from trainer.config.manager import LoadedConfig, load_config
from trainer.config.render import format_config, write_config
from trainer.preflight import check, check_registered

logger = logging.getLogger(__name__)

BAD_CONFIGURATION = 2
INTERRUPTED = 130  # as a shell reports Ctrl-C


def main(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run what the command line asks for. Return the exit code: 0, 2 for a configuration that cannot be run, 130 after Ctrl-C."""
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    shown_ranks = {int(word) for word in environment.get("LOG_RANK", "0").split(",") if word.strip().isdecimal()}
    setup_logging(rank=rank, shown_ranks=shown_ranks)
    loaded = load_config(argv)
    config = loaded.config
    setup_logging(rank=rank, shown_ranks=shown_ranks, color=not config.metrics.disable_color_printing)
    try:
        check(loaded, world_size, log_warnings=rank == 0)
        if config.experimental.custom_import and not config.job.validate_only:
            importlib.import_module(config.experimental.custom_import)
            check_registered(loaded)
    except ConfigError as error:
        # Every rank finds the same; one tells it.
        if rank == 0:
            print(error, file=sys.stderr)
        return BAD_CONFIGURATION
    if config.job.validate_only:
        print(format_config(loaded))
        return 0
    return _run(loaded, environment, rank=rank, world_size=world_size)


def _run(loaded: LoadedConfig, environment: Mapping[str, str], *, rank: int, world_size: int) -> int:
    config = loaded.config
    if rank == 0:
        _write_down(loaded)

    # Late: importing torch takes seconds, and no answer above needs it.
    from torch.distributed.elastic.multiprocessing.errors import record

    from trainer.components.metric_writers import WANDB_NAMES
    from trainer.distributed.watchdog import Watchdog
    from trainer.trainer import Launch, Trainer

    launch = Launch(
        rank=rank,
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        world_size=world_size,
        # Not the API key, which the package reads for itself: what is here may end up in a report.
        wandb_variables={name: environment[name] for name in WANDB_NAMES if name in environment},
    )

    @record  # torchrun's closing report names the rank that failed first, with its traceback
    def train() -> None:
        with Watchdog(config.comm) as watchdog, Trainer(config, launch, watchdog) as trainer:
            trainer.train()

    try:
        train()
    except KeyboardInterrupt:
        # The user knows why: no traceback. torchrun, which got the same signal, ends the other processes.
        kept = "the same command goes on from the newest checkpoint" if config.checkpoint.enable else "nothing was kept"
        logger.warning("interrupted; %s", kept)
        return INTERRUPTED
    return 0


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
