"""One voice in the log: who speaks, where, and in which form. Torch-free, so that it can be set up before torch loads."""

import logging
import sys
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from typing import TextIO

from tqdm import tqdm

_LEVEL_COLORS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[1;31m"}
_DIM, _RESET = "\033[2m", "\033[0m"
_MAX_KEPT = 200


class _LineFormatter(logging.Formatter):
    """`12:34:56 INFO     message`, with the rank before the message for every rank but the first."""

    def __init__(self, *, rank: int, color: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._prefix = f"[rank {rank}] " if rank else ""
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        head = f"{self.formatTime(record, self.datefmt)} {record.levelname:<8}"
        if self._color:
            color = _LEVEL_COLORS.get(record.levelno, _DIM)
            head = f"{color}{head}{_RESET}"
        return f"{head} {self._prefix}{text}"


class _ProgressBarHandler(logging.Handler):
    """Writes lines to a stream with any progress bar taken away for the moment, so that neither tears the other."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if getattr(tqdm, "_instances", None):
                tqdm.write(line, file=self._stream)
            else:
                self._stream.write(line + "\n")
            self._stream.flush()
        except Exception:
            self.handleError(record)


class _WarningKeeper(logging.Handler):
    """Holds warnings and fallbacks until they are taken, the newest where there are very many."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[tuple[str, str]] = deque(maxlen=_MAX_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        kind = "fallback" if getattr(record, "is_fallback", False) else "warning"
        if (kind == "fallback" or record.levelno >= logging.WARNING) and record.name != "py.warnings":
            self.kept.append((kind, record.getMessage()))


def take_warnings() -> Iterator[tuple[str, str]]:
    """Yield what this process has warned of since they were last taken, from any thread: kind and message.

    The kind is "warning", or "fallback" for what was logged, at any level, with `extra={"is_fallback": True}`: something else
    was done than what the settings ask for first. Warnings of libraries are left out.
    """
    for handler in logging.getLogger().handlers:
        while isinstance(handler, _WarningKeeper) and handler.kept:
            yield handler.kept.popleft()


def setup_logging(*, rank: int = 0, shown_ranks: Collection[int] = (0,), color: bool = True) -> None:
    """Send the log of this process to the terminal: everything from a shown rank, warnings and errors from any other.

    A shown rank writes to stdout at level INFO. Other ranks write from level WARNING on, to stderr, and Python warnings
    of libraries are left out there: each rank has the same, and a shown one tells them. May be called again, and the
    last call counts. A warning that each rank finds alike (about the settings, say) is logged with
    `extra={"same_on_all_ranks": True}`, and only shown ranks tell it.

    Args:
        rank: number of this process over all hosts.
        shown_ranks: ranks that speak.
        color: colours, where the stream is a terminal.
    """
    shown = rank in shown_ranks
    stream = sys.stdout if shown else sys.stderr
    handler = _ProgressBarHandler(stream)
    if not shown:
        handler.addFilter(lambda record: not getattr(record, "same_on_all_ranks", False))
    handler.setFormatter(_LineFormatter(rank=rank, color=color and stream.isatty()))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old, _ProgressBarHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    if not any(isinstance(old, _WarningKeeper) for old in root.handlers):
        root.addHandler(_WarningKeeper())
    root.setLevel(logging.INFO if shown else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if shown else logging.ERROR)
    # A library's warning is one line: message and place, without the line of source that follows by default.
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"{filename}:{lineno}: {category.__name__}: {message}"
    )
