"""A bench measured again with the settings of `results.TUNED`, in a process of its own.

They are read when a process starts, so this process cannot take them on.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.common import results

SETTINGS = " ".join(f"{name}={value}" for name, value in results.TUNED.items())


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tuned", action="store_true", help=f"measure again in a process with {SETTINGS}, and add those rows"
    )


def rows_again(module: str, file: str, argv: Sequence[str] | None) -> list[dict]:
    """The rows that ``module`` writes to ``file`` when it runs with ``argv`` and the settings.

    SystemExit when this process has the settings already, or when the other one fails. Refused rows
    are no failure: they are rows.
    """
    if results.is_tuned():
        raise SystemExit(f"--tuned adds rows with {SETTINGS}, but this process has these settings already; unset them")
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--tuned"]
    with tempfile.TemporaryDirectory() as folder:
        # The last --out counts.
        command = [sys.executable, "-m", module, *given, "--out", folder]
        print(f"again with {SETTINGS}", flush=True)
        status = subprocess.run(command, cwd=ROOT, env=os.environ | results.TUNED).returncode
        path = Path(folder) / file
        if not path.exists():
            raise SystemExit(f"{module} with {SETTINGS} wrote no rows; its exit status is {status}")
        with path.open(newline="") as stream:
            return list(csv.DictReader(stream))
