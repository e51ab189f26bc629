"""On what a run runs: versions, hardware, and the state of the program's source."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trainer.components.hardware import GIB, get_device_name, get_host_memory

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "torchao", "numpy", "datasets")
_GIT_SECONDS = 5


def describe_environment(device: torch.device, world_size: int) -> dict[str, dict[str, Any]]:
    """Return what a reader needs to repeat a run, as JSON holds it: `versions`, `hardware` and `program`.

    device: of this process; the others are taken to be alike. world_size: devices of the run.
    """
    versions: dict[str, Any] = {"python": platform.python_version()}
    versions |= {name: found for name in _PACKAGES if (found := _find_version(name))}
    hardware: dict[str, Any] = {"device": get_device_name(device), "devices": world_size}
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"device_memory_gib": round(properties.total_memory / GIB, 1)}
    hardware |= {
        "host": platform.node(),
        "host_cpus": os.cpu_count(),
        "host_memory_gib": round(get_host_memory() / GIB, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return {"versions": versions, "hardware": hardware, "program": {"commit": _find_commit()}}


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _find_commit() -> str | None:
    """Return the commit of the source, with `-dirty` where files differ from it; None where there is no git to ask."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
