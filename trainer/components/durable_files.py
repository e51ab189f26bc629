"""Files that outlast a power cut."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file anew, through to stable storage. Its name is there for good after `sync_folder`."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
