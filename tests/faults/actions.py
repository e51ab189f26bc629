"""What faults do. Importable, so that they travel to the processes of a run."""

import ctypes
import os
import signal
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
