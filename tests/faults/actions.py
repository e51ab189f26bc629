"""What faults do. Importable, so that they travel to the processes of a run."""

import ctypes
import os
import signal
import threading
import time


def send_term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def send_term_twice() -> None:
    send_term()
    time.sleep(0.05)
    send_term()


def send_usr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def send_both() -> None:
    send_usr1()
    send_term_twice()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("the loss of rank 1 is wet")


def crash() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stall() -> None:
    time.sleep(300)


def wait_for_data_while_another_is_told_to_stop() -> None:
    """Rank 0 prepares data; rank 1 has its, and waits for rank 0 in C code when the signal comes."""
    if os.environ["RANK"] == "0":
        time.sleep(300)
    threading.Timer(0.5, send_usr1).start()


def be_told_to_stop_while_another_waits() -> None:
    """Rank 1 is stopped while it prepares data; rank 0 has its, and waits for rank 1 in C code."""
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        send_term()
