"""Rows of results: their columns, where they come from, CSV files and printed tables.

A bench runs in the user's environment, as it is. `environment` records the variables that change
times. `bench.common.tuned` measures a second time with those of `TUNED`.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench import ROOT
from bench.common.timing import Candidate
from lift_kernels.ops import dispatch

SETTINGS = ("OMP_", "GOMP_", "KMP_", "THP_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "LIFT_CPU_", "ATEN_CPU_", "MKL_")
"""Beginnings of the environment variables that change times on a CPU: threads, memory, level."""

TUNED = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "THP_MEM_ALLOC_ENABLE": "1"}
"""Settings that help where cores are shared, and where memory is touched here and there.

Threads that wait sleep, where by default they spin on cores that others need. torch asks for huge
pages, which take fewer address translations. Both are read when a process starts.
"""


def rows(
    candidates: Sequence[Candidate], times: dict[str, np.ndarray], baseline: str, bandwidth: float, **labels: object
) -> list[dict]:
    """One CSV row per candidate. ``ratio``: seconds of the baseline over its own."""
    return [
        labels | row(c.name, times[c.name], times[baseline], c.roofline_bytes, bandwidth) | {"baseline": baseline}
        for c in candidates
    ]


def row(name: str, taken: np.ndarray, baseline: np.ndarray, roofline_bytes: float | None, bandwidth: float) -> dict:
    """The columns of a timed candidate.

    They hold milliseconds and their quartiles, the median of the ratios to the baseline's run of
    the same round, the roofline and the share of it that was reached.
    """
    low, middle, high = (1e3 * float(np.quantile(taken, q)) for q in (0.25, 0.5, 0.75))
    roofline = None if roofline_bytes is None else 1e3 * roofline_bytes / bandwidth
    return {
        "variant": name,
        "median_ms": _digits(middle),
        "q25_ms": _digits(low),
        "q75_ms": _digits(high),
        "runs": len(taken),
        "ratio": _digits(float(np.median(baseline / taken))),
        "floor_ms": "" if roofline is None else _digits(roofline),
        "share_of_floor": "" if roofline is None else _digits(roofline / middle),
        "copy_gb_s": _digits(bandwidth / 1e9),
    }


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def environment(device: str = "cpu") -> dict[str, object]:
    """Where a number comes from: device, level, threads, settings, versions, commit.

    ``settings`` has the variables that `SETTINGS` means. ``environment`` is "tuned" when those of
    `TUNED` are among them, else "default".
    """
    from lift_kernels import __version__

    return {
        "device": device_name(device),
        "level": cpu_level() if device == "cpu" else "",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": "tuned" if is_tuned() else "default",
        "settings": " ".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(SETTINGS)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lift_kernels": __version__,
        "commit": commit(),
    }


def is_tuned() -> bool:
    """Whether this process has the settings of `TUNED`."""
    return all(os.environ.get(name) == value for name, value in TUNED.items())


def cpu_level() -> str:
    """The level of the compiled code that runs here, such as x86-64-v3.

    ``LIFT_CPU_LEVEL`` chooses a lower one. It is empty without compiled code.
    """
    return dispatch.cpu_level()


def device_name(device: str = "cpu") -> str:
    """The card's or the processor's name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found.group(1).strip() if found else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Short hash of the checkout.

    A ``+`` follows when tracked files were changed since. Without git it is ``unknown``.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "--short", "HEAD").strip()
        return head + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_folder(device: str = "cpu", root: Path | None = None) -> Path:
    """``bench/results/<device>-<level>``, made when missing. A card has no level.

    Words that every processor's name has are left out.
    """
    name = device_name(device)
    if device == "cpu":
        name = re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b", " ", name) + f" {cpu_level()}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = (root or ROOT / "bench" / "results") / slug
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``--dry-run`` and ``--out``, as every bench takes them."""
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, seconds; writes no files without --out")
    parser.add_argument("--out", type=Path, help="folder for the files in place of bench/results/<device>-<level>")


def output_folder(arguments: argparse.Namespace) -> Path | None:
    """Where the files go, made when missing. None for a dry run that was given no folder."""
    if arguments.out is None:
        return None if arguments.dry_run else results_folder()
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments.out


def exit_status(table: Sequence[dict]) -> int:
    """1 when a row was refused, else 0."""
    return int(any(str(row.get("status", "")).startswith("refused") for row in table))


def write_csv(path: Path, table: Sequence[dict]) -> None:
    """All rows under one header. A column that a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table)
    print(f"wrote {path}")


def show(table: Sequence[dict], columns: Sequence[str]) -> None:
    """Print the columns of the rows, aligned."""
    cells = [list(columns)] + [[str(row.get(column, "")) for column in columns] for row in table]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)), flush=True)
