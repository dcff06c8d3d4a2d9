"""Wheels of the package without its native extension, built from a copy of the working tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
sys.modules["torch"] = None  # as in an isolated build
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


def copy_source(folder: Path) -> Path:
    """Copy what a pure-Python wheel is built from into an empty folder."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "lift_kernels", folder / "lift_kernels", ignore=ignored)
    return folder


def build_wheel(source: Path, out: Path) -> Path:
    """Build a wheel in a process that sees no torch, and so compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"LIFT_CUDA": "0"}
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path
