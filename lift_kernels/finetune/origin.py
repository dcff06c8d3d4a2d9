"""Where figures come from: the machine, and the state of this package."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def machine(device: torch.device) -> str:
    """Return what seconds were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """Return the commit of a clone of this package, with a + if it was changed, else the version.

    It is asked for once, because the code that runs stays what it was when the process began.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in another repository
        return _git("rev-parse", "--short=12", "HEAD") + "+" * bool(_git("diff", "HEAD", "--name-only", ".."))
    except (OSError, subprocess.SubprocessError):
        return f"version {importlib.metadata.version('lift_kernels')}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
