"""The gpu tests can be collected with few packages installed, as on machines with a card."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.extras import MISSING, extras_of_file
from helpers.restricted_imports import FIVE, ROOT, TARGET, blocked_by, only_allowed_imports

PACKAGES = {"five packages": FIVE, "target machine": TARGET}
COLLECT = [
    sys.executable,
    "-m",
    "pytest",
    "--collect-only",
    "-q",
    "-m",
    "gpu",
    "-p",
    "no:cacheprovider",
    "python_tests",
]
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture(scope="module")
def all_gpu_tests():
    """Those that are collected where everything is installed."""
    assert not any(MISSING.values()), f"everything should be installed here: {MISSING}"
    return listed(subprocess.run(COLLECT, cwd=ROOT, env=os.environ | NO_PLUGINS, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("packages", PACKAGES)
def test_gpu_tests_are_collected(all_gpu_tests, tmp_path, packages):
    """Every gpu test whose file needs no other package is collected, without an error.

    This holds with five packages and with those of a card's machine. A file that needs more is left
    out with a line that says so.
    """
    environment = only_allowed_imports(tmp_path, PACKAGES[packages]) | NO_PLUGINS
    done = subprocess.run(COLLECT, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    blocked = blocked_by(PACKAGES[packages])
    left_out = {file for file in MISSING if extras_of_file(file) & blocked}
    expected = {test for test in all_gpu_tests if file_of(test) not in left_out}
    assert listed(done.stdout) == expected and len(expected) > 700
    for file in ("finetune/test_finetune_run.py", "project/test_readme.py", "integrations/test_trl.py"):
        assert file in left_out and f"{file} is left out: " in done.stdout, done.stdout[:3000]
    files = {file_of(test) for test in expected}
    ops = {f"ops/test_{name}.py" for name in ("sparse_adamw", "lowrank_topk", "packed_ops")}
    assert ops | {"optim/test_lift_adamw.py"} <= files
    assert ("optim/test_optimizer_training.py" in left_out) == (packages == "five packages")


def file_of(test: str) -> str:
    """The file of a test, within python_tests."""
    return test.split("::")[0].removeprefix("python_tests/")


def listed(output: str) -> set[str]:
    """The tests that pytest listed."""
    return {line for line in output.splitlines() if line.startswith("python_tests/") and "::" in line}
