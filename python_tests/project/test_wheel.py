"""A wheel holds exactly the modules that the repository has now, and no old ones."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from helpers.wheels import ROOT, build_wheel, copy_source

OLD = "lift_kernels/owners.py"
"""A module of an earlier layout."""


def first_command_of_make_wheel() -> str:
    return re.search(r"^wheel:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def with_an_old_build(source: Path) -> None:
    """Leave an old module where setuptools collects the modules of a wheel."""
    for folder in ("lib", "lib.linux-x86_64-cpython-311"):
        old = source / "build" / folder / OLD
        old.parent.mkdir(parents=True)
        old.write_text("raise RuntimeError('an old module')\n")


def python_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return sorted(name for name in file.namelist() if name.endswith((".py", ".typed")))


@pytest.fixture(scope="module")
def present() -> list[str]:
    """The modules in git, and the mark of a typed package."""
    command = ["git", "ls-files", "lift_kernels/*.py", "lift_kernels/py.typed"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_wheel_has_the_present_modules(tmp_path, present):
    (tmp_path / "source").mkdir()
    source = copy_source(tmp_path / "source")
    assert python_files(build_wheel(source, tmp_path)) == sorted(present) and len(present) > 80


def test_make_wheel_starts_from_an_empty_build_folder(tmp_path, present):
    """Its first command removes build/, in which setuptools would find the old module."""
    assert first_command_of_make_wheel() == "rm -rf build"
    (tmp_path / "source").mkdir()
    source = copy_source(tmp_path / "source")
    with_an_old_build(source)
    subprocess.run(first_command_of_make_wheel(), shell=True, cwd=source, check=True)
    assert python_files(build_wheel(source, tmp_path)) == sorted(present)


def test_an_old_build_folder_would_be_noticed(tmp_path):
    (tmp_path / "source").mkdir()
    source = copy_source(tmp_path / "source")
    with_an_old_build(source)
    assert OLD in python_files(build_wheel(source, tmp_path))
