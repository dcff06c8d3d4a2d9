"""A comparison that is killed at any time ends with the same rows and table."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HANG_S = 600


@pytest.mark.slow
def test_sigkill_at_random_points_changes_no_row(tiny, tmp_path):
    command = [sys.executable, "-m", "helpers.killed_comparisons", str(tiny), str(tmp_path), "0"]
    path = os.pathsep.join(filter(None, sys.path))  # the process imports helpers too
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kills, and the rows and the table of the undisturbed comparison" in result.stdout
    assert int(result.stdout.splitlines()[-1].split()[0]) >= 3
