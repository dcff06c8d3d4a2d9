"""The script of `make corners`: its rows, its exit status, and the tests that it chooses.

No environment is made here.
"""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.extras import TESTS, extras_of_file
from helpers.wheels import ROOT


@pytest.fixture(scope="module")
def corners():
    loader = importlib.machinery.SourceFileLoader("corners", str(ROOT / ".ci" / "corners"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("corners", loader))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@pytest.fixture
def run(corners, tmp_path, monkeypatch):
    """Call the script with a wheel that is not looked at. Returns its status and its rows."""
    wheel = tmp_path / "lift_kernels-0-py3-none-any.whl"
    wheel.touch()
    monkeypatch.setenv("PYTHON311", "/nowhere/python3.11")
    monkeypatch.setenv("PYTHON313", "/nowhere/python3.13")

    def call(*arguments: str) -> tuple[int, list[dict[str, str]]]:
        table = tmp_path / "new" / "corners.csv"
        status = corners.main(
            ["--wheel", str(wheel), "--csv", str(table), "--logs", str(tmp_path / "logs"), *arguments]
        )
        with table.open(newline="") as file:
            return status, list(csv.DictReader(file))

    return call


def junit(path: Path, *modules: str, failures: int = 0, errors: int = 0, skipped: int = 0) -> Path:
    cases = "".join(f'<testcase classname="{module}" name="test"/>' for module in modules)
    numbers = f'tests="{len(modules)}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
    path.write_text(f"<testsuites><testsuite {numbers}>{cases}</testsuite></testsuites>")
    return path


def test_a_missing_python_is_named(run, capsys):
    status, rows = run()
    assert status == 1
    assert [(row["python"], row["torch"], row["status"]) for row in rows] == [
        ("3.11", "torch==2.11.*", "not run: no Python 3.11; set PYTHON311"),
        ("3.11", "torch", "not run: no Python 3.11; set PYTHON311"),
        ("3.13", "torch==2.11.*", "not run: no Python 3.13; set PYTHON313"),
        ("3.13", "torch", "not run: no Python 3.13; set PYTHON313"),
    ]
    assert "not run: no Python 3.13; set PYTHON313" in capsys.readouterr().out
    assert run("--allow-missing") == (0, rows)


def test_another_version_is_a_missing_one(run, monkeypatch):
    """As a shim that runs, but not this version."""
    monkeypatch.setenv("PYTHON311", "true")
    status, rows = run("--only", "Python 3.11")
    assert status == 1 and {row["status"] for row in rows} == {"not run: no Python 3.11; set PYTHON311"}


def test_a_corner_that_fails_is_no_missing_one(run, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.13.9\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON313", str(python))
    status, rows = run("--allow-missing")
    assert status == 1
    assert [row["status"] for row in rows[2:]] == ["failed: python -m venv failed"] * 2
    assert f"$ {python} -m venv" in (tmp_path / "logs" / "python3.13-oldest.log").read_text()


def test_nothing_to_run_is_a_failure(run):
    assert run("--only", "Python 2") == (1, [])


def test_a_missing_wheel_is_said(corners, capsys, tmp_path):
    with pytest.raises(SystemExit):
        corners.main(["--wheel", str(tmp_path / "none.whl")])
    assert "run make wheel, or give --wheel" in capsys.readouterr().err


def test_counts_of_a_report(corners, tmp_path):
    modules = ["python_tests.ops.test_a"] * 5 + ["python_tests.ops.test_b"] * 3
    report = junit(tmp_path / "report.xml", *modules, failures=2, errors=1, skipped=1)
    assert corners.counts(report, ["ops/test_a.py", "ops/test_b.py"]) == (4, 3)
    with pytest.raises(corners.Failed, match=r"no test of ops/test_c\.py ran"):
        corners.counts(report, ["ops/test_a.py", "ops/test_c.py"])


def test_the_suite_needs_no_more_than_is_installed(corners):
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    packages = [text.partition(">")[0] for name in corners.EXTRAS.split(",") for text in extras[name]]
    assert {"triton", "transformers", "safetensors", "peft"} <= set(packages)
    needs = {*corners.TEST_NEEDS, *packages, *(folder.name for folder in TESTS.iterdir())}
    for file in {*corners.SUITE, *corners.INTERPRETED}:
        assert (TESTS / file).is_file(), file
        assert extras_of_file(file) <= needs, file


def test_the_corners_are_those_of_the_metadata(corners):
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    oldest, newest = corners.PYTHONS
    assert project["requires-python"] == f">={oldest}" and "torch>=2.11" in project["dependencies"]
    assert corners.oldest_torch() == "torch==2.11.*"
    named = [text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text]
    assert (named[0], named[-1]) == (oldest, newest) and len(named) == 3


def test_children_see_no_other_modules_or_backends(corners, monkeypatch):
    for name in ("PYTHONPATH", "LIFT_CPU_LEVEL", "TRITON_INTERPRET", "VIRTUAL_ENV", "PYTEST_ADDOPTS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "an index")
    found = corners.environment()
    assert found["PIP_EXTRA_INDEX_URL"] == "an index" and "PATH" in found
    assert not [name for name in found if name.startswith(("PYTHON", "LIFT_", "TRITON_", "VIRTUAL_ENV", "PYTEST_"))]
