"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.bits import HANG_S

import lift_kernels


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code without this process's interpreter mode and level of the CPU ops."""
    own = {"TRITON_INTERPRET", "LIFT_CPU_LEVEL"}
    inherited = {key: value for key, value in os.environ.items() if key not in own}
    path = os.pathsep.join([str(Path(lift_kernels.__file__).parents[1]), inherited.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return done
