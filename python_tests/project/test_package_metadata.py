"""What an installation says about itself: version, links, types. Built without torch in sight."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lift_kernels

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
sys.modules["torch"] = None  # as in an isolated build
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "lift_kernels", source / "lift_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


def test_the_metadata_is_complete(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == lift_kernels.__version__
    assert metadata["Author"] == "The lift_kernels authors" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2506.00772"]
    assert metadata["Keywords"] and "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_version_is_written_once():
    assert f'"{lift_kernels.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_types_are_installed(wheel):
    assert "lift_kernels/py.typed" in wheel.namelist()
