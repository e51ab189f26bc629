"""How a run ended, in a file for scripts that start it again. Imports no torch."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Literal

from trainer.components.durable_files import write_text

logger = logging.getLogger(__name__)

STATUS_FILE = "status.json"

Status = Literal["complete", "preempted", "failed"]


class RunStatus:
    """Writes `status.json` into the dump folder: whole or not at all, and from one rank.

    complete: `training.steps` are done. preempted: told to stop before that; starting the run again goes on. failed: an
    error. There is no file while a run goes on, nor after one that had no time to say anything (SIGKILL, a host that is gone).
    """

    def __init__(self, folder: Path, *, is_writer: bool) -> None:
        self.path = folder / STATUS_FILE
        self._is_writer = is_writer

    def clear(self) -> None:
        """Remove what an earlier run said."""
        if self._is_writer:
            self.path.unlink(missing_ok=True)

    def write(self, status: Status, *, step: int, reason: str) -> None:
        """Say how the run ended. step: optimizer steps done. reason: one sentence. A disk that fails is only told."""
        if not self._is_writer:
            return
        content = {"status": status, "step": step, "reason": reason, "time": time.time()}
        draft = self.path.with_name(f".{STATUS_FILE}.{os.getpid()}")
        try:
            write_text(draft, json.dumps(content, indent=1))
            draft.replace(self.path)
        except OSError as error:
            logger.warning(
                "%s could not be written: %s. The run is %s at step %d: %s", self.path, error, status, step, reason
            )
