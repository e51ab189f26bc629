"""What the tools in scripts/ have in common: a module of the user's, and mistakes that are told in a line."""

import argparse
import importlib
import sys
from collections.abc import Callable

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C


def add_import(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", *, registers: str) -> None:
    """Add `--import`. registers: what the user's module does register, for the help text."""
    parser.add_argument(
        "--import", dest="custom_import", metavar="MODULE", help=f"module of yours that registers {registers}"
    )


def import_custom(module: str | None) -> None:
    """Import a module of the user's, which may lie in the working directory. None: there is none.

    Raises:
        ImportError: it is not found, or does not find what it needs.
    """
    if module:
        sys.path.insert(0, "")
        importlib.import_module(module)


def run_tool(work: Callable[[], object], *, if_interrupted: str = "", speaks: bool = True) -> int:
    """Do a tool's work and return its exit code. What the user can mend is told in a line; anything else is a traceback.

    if_interrupted: what to say after Ctrl-C. speaks: whether this process is the one that tells.
    """
    try:
        work()
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, if_interrupted
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        code, message = EXIT_FAILURE, f"error: {error}"
    else:
        return 0
    if speaks and message:
        print(message, file=sys.stderr)
    return code
