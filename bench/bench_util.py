"""What the benches share: alternating timing in one process, a small machine model and CSVs.

Other work on a machine, its clock and its caches drift. So contestants are timed in turns, in a new
random order each round, with the caches emptied before each run, and compared by the median of the
ratios within a round.

The machine model is the copy bandwidth (bytes read + bytes written over time), measured in the same
rounds where one bench times an op, and, for training steps, the measured rate of matrix products;
``floor`` of a row is the time at which an op would move its bytes, or do its FLOPs and move its
bytes, at these rates. Each bench says how it counts.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout is measured, whatever else is installed

SETTINGS = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "THP_MEM_ALLOC_ENABLE",
)  # of the environment; they change times on a CPU


@dataclass
class Contestant:
    """Something to time. ``floor_bytes``: what it must move at least, or None."""

    name: str
    run: Callable[[], object]
    floor_bytes: float | None = None


def alternate(
    contestants: Sequence[Contestant], runs: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Seconds of every run of every contestant, ``runs`` rounds in shuffled order with emptied
    caches; a GPU is waited for.
    """
    evict = torch.ones(
        24 * 2**20, device=device
    )  # 96 MiB; read, it leaves nothing else in the caches and nothing to write back
    wait = torch.cuda.synchronize if evict.is_cuda else lambda: None
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for round_ in range(-warmup, runs):
        for i in rng.permutation(len(contestants)):
            evict.sum()
            wait()
            start = time.perf_counter()
            contestants[i].run()
            wait()
            elapsed = time.perf_counter() - start
            if round_ >= 0:
                times[contestants[i].name].append(elapsed)
    return {name: np.array(values) for name, values in times.items()}


def alternate_with_copy(
    contestants: Sequence[Contestant], runs: int, warmup: int = 2, device: str = "cpu", mib: int = 256
) -> tuple[dict[str, np.ndarray], float]:
    """`alternate`, and the copy bandwidth of the same rounds, their median: on a shared CPU it
    changes by the second.
    """
    if device != "cpu":
        return alternate(contestants, runs, warmup, device), copy_bandwidth(device, mib)
    values = torch.ones(mib * 2**18)
    times = alternate([*contestants, Contestant("copy", lambda: values.mul_(1.0))], runs, warmup)
    return times, 2 * values.nbytes / float(np.median(times.pop("copy")))


def copy_bandwidth(device: str = "cpu", mib: int = 256, runs: int = 15) -> float:
    """Bytes per second of a large copy onto itself (read, scale, write back), reads and writes
    counted; the best of ``runs``.

    In place, because a copy to another place also reads the lines that it overwrites, which nobody
    counts.
    """
    values = torch.ones(mib * 2**18, device=device)
    seconds = min(float(t) for t in timed(lambda: values.mul_(1.0), device, runs))
    return 2 * values.nbytes / seconds


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, runs: int = 7) -> float:
    """FLOPs per second of a product of two ``size`` x ``size`` matrices; the best of ``runs``."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(float(t) for t in timed(lambda: left @ right, device, runs))


def timed(run: Callable[[], object], device: str, runs: int, warmup: int = 2) -> np.ndarray:
    """Seconds of each of ``runs`` calls in a row, by CUDA events on a GPU."""
    times = []
    for _ in range(warmup + runs):
        if device == "cpu":
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        else:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / 1e3)
    return np.array(times[warmup:])


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> str:
    """What is wrong with a result, or an empty string.

    fp32 within 1e-6 of the largest entry; bf16 and fp16 equal but for one unit in the last place in
    one entry of a thousand.
    """
    for i, (right, got) in enumerate(zip(expected, actual)):
        gap = (right.double() - got.double()).abs()
        largest = float(right.abs().max())
        if right.dtype.is_floating_point and right.dtype.itemsize == 2:
            unit = right.double().abs() * torch.finfo(right.dtype).eps + 1e-30
            same = bool((gap <= unit).all()) and float((gap > 0).double().mean()) <= 1e-3
        else:
            same = float(gap.max()) <= 1e-6 * largest
        if not same or right.shape != got.shape:
            return (
                f"result {i} differs by up to {float(gap.max()):.3g} from the reference (largest entry {largest:.3g})"
            )
    return ""


def rows(
    contestants: Sequence[Contestant], times: dict[str, np.ndarray], baseline: str, bandwidth: float, **labels: object
) -> list[dict]:
    """One CSV row a contestant; ``ratio``: seconds of the baseline over its own."""
    return [
        labels | row(c.name, times[c.name], times[baseline], c.floor_bytes, bandwidth) | {"baseline": baseline}
        for c in contestants
    ]


def row(name: str, taken: np.ndarray, baseline: np.ndarray, floor_bytes: float | None, bandwidth: float) -> dict:
    """Milliseconds and their quartiles, median ratio to the baseline's run of the same round, floor
    and share of it.
    """
    low, middle, high = (1e3 * float(np.quantile(taken, q)) for q in (0.25, 0.5, 0.75))
    floor = None if floor_bytes is None else 1e3 * floor_bytes / bandwidth
    return {
        "variant": name,
        "median_ms": _digits(middle),
        "q25_ms": _digits(low),
        "q75_ms": _digits(high),
        "runs": len(taken),
        "ratio": _digits(float(np.median(baseline / taken))),
        "floor_ms": "" if floor is None else _digits(floor),
        "share_of_floor": "" if floor is None else _digits(floor / middle),
        "copy_gb_s": _digits(bandwidth / 1e9),
    }


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def environment(device: str = "cpu") -> dict[str, object]:
    """Where a number comes from: device, threads, what the environment sets for torch on a CPU,
    versions, commit.
    """
    from lift_kernels import __version__

    settings = " ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "settings": settings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lift_kernels": __version__,
        "commit": commit(),
    }


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
    """Short hash of the checkout, with ``+`` when tracked files were changed since; ``unknown``
    without git.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno").strip() else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_folder(device: str = "cpu", root: Path | None = None) -> Path:
    """``bench/results/<device>``, made when missing."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder = (root or ROOT / "bench" / "results") / slug
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``--dry-run`` and ``--out``, as every bench takes them."""
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, seconds; writes no files without --out")
    parser.add_argument("--out", type=Path, help="folder for the files in place of bench/results/<device>")


def output_folder(arguments: argparse.Namespace) -> Path | None:
    """Where the files go, made when missing; None for a dry run that was given no folder."""
    if arguments.out is None:
        return None if arguments.dry_run else results_folder()
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments.out


def exit_status(table: Sequence[dict]) -> int:
    """1 when a row was refused, else 0."""
    return int(any(str(row.get("status", "")).startswith("refused") for row in table))


def write_csv(path: Path, table: Sequence[dict]) -> None:
    """All rows under one header; a column that a row lacks stays empty."""
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
