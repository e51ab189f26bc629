"""logging_setup.py and progress.py, in processes of their own: both work on the terminal's streams."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import logging, sys, warnings
    from trainer.components.logging_setup import setup_logging, take_warnings
    setup_logging(rank=int(sys.argv[1]), shown_ranks=(0, 8))
    setup_logging(rank=int(sys.argv[1]), shown_ranks=(0, 8))
    log = logging.getLogger("trainer.somewhere")
    log.info("some news")
    log.warning("a worry")
    log.warning("a worry of all", extra={"same_on_all_ranks": True})
    warnings.warn("library words")
    assert list(take_warnings()) == [("warning", "a worry"), ("warning", "a worry of all")]
    log.warning("the second best", extra={"is_fallback": True, "same_on_all_ranks": True})
    assert list(take_warnings()) == [("fallback", "the second best")]
    assert "torch" not in sys.modules
    """
)


def run(rank):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rank)], capture_output=True, text=True, check=True, timeout=60
    )


@pytest.mark.parametrize(("rank", "prefix"), [(0, ""), (8, "[rank 8] ")])
def test_shown_rank_says_everything_once_on_stdout(rank, prefix):
    done = run(rank)
    lines = done.stdout.splitlines()
    said = [f"INFO     {prefix}some news", f"WARNING  {prefix}a worry", f"WARNING  {prefix}a worry of all"]
    assert [line.split(" ", 1)[1] for line in lines[:3]] == said
    assert lines[3].endswith("UserWarning: library words")
    assert lines[4].endswith("the second best")
    assert len(lines) == 5
    assert done.stderr == ""


def test_other_rank_only_warns_and_names_itself_on_stderr():
    done = run(3)
    assert done.stdout == ""
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == ["WARNING  [rank 3] a worry"]


def run_on_terminal(program, rows, columns):
    """Run a program on a pseudo-terminal and return what it showed."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", program], stdin=child, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 65536):
            shown += chunk
    except OSError:
        pass  # Linux's answer once the other side is closed
    os.close(parent)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize(("rows", "columns"), [(24, 100), (0, 120), (0, 0)])
def test_log_line_and_progress_bar_share_a_terminal_without_tearing(rows, columns):
    shown = run_on_terminal(
        textwrap.dedent(
            """
            import logging
            from trainer.components.logging_setup import setup_logging
            from trainer.components.progress import ProgressBar
            setup_logging()
            bar = ProgressBar(total=50, initial=10)
            assert bar.visible
            bar.advance_to(20, loss=3.25)
            bar._bar.refresh()
            logging.getLogger().info("a line between")
            bar.advance_to(30)
            bar.close()
            bar.close()
            """
        ),
        rows,
        columns,
    )
    assert "20/50" in shown
    assert "loss 3.2500" in shown
    # The line stands alone: the bar is wiped before it (a return to the start of the row), and follows after it.
    row = next(row for row in shown.split("\n") if "a line between" in row)
    after_wipe = row.rstrip("\r").split("\r")[-1]
    assert after_wipe.replace("\033[2m", "").replace("\033[0m", "").endswith("INFO     a line between")
    assert "step" not in after_wipe


def test_progress_bar_is_silent_without_a_terminal():
    program = (
        "from trainer.components.progress import ProgressBar\n"
        "bar = ProgressBar(total=5)\nbar.advance_to(3, loss=1.0)\nassert not bar.visible\nbar.close()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == done.stderr == ""
