"""Runs a stage of the GPU suite: timing by CUDA events, checks, rooflines and rows.

Timing on a card. Each repetition is preceded by a kernel that only waits (5 ms). So the host has
queued the whole call before the card reaches it. Two events around the call then measure the card
alone, and ``host_ms`` says what the call cost the host. Calls that wait for the card themselves
(``waits``) go without that kernel and are measured as they are.

A call whose tensors would fit the L2 cache is given several times with different tensors
(`Run.sets`), which take turns. The last results stay alive, so that results rotate too. All tensors
are touched and all kernels are compiled before the first repetition that counts. Events are used
and not graphs, because graphs would hide what the host costs and cannot hold the calls that wait.

On the CPU (``--dry-run``) the clock is `time.perf_counter`. Those figures try the suite out and say
nothing else.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from bench.common import results
from lift_kernels.ops import dispatch

Call = Callable[[], object]
LAG_CYCLES = 9_000_000  # of the waiting kernel: about 5 ms
L2_BYTES = 50 * 2**20  # of an H100, where torch does not say


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@dataclass
class Run:
    """One stage in its process: the device, the time it may take, and where its rows go."""

    stage: str
    device: str
    rows: Path
    deadline: float  # on `time.monotonic`, which all processes share; infinite in the dry run
    repeats: int = 20
    rates: dict[str, float] = field(default_factory=dict)
    """Per second: bytes of "copy", FLOPs of "bf16", "tf32" and "fp32"."""

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.deadline - time.monotonic()

    def add(self, variant: str, **columns: object) -> dict:
        """Write a row at once, so that what a stage has found stays when it is killed."""
        row = {"stage": self.stage, "variant": variant, "status": "ok"} | columns
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
        return row

    def note_environment(self) -> None:
        """Tell the suite what the rows of all stages were measured on."""
        with self.rows.open("a") as file:
            file.write(json.dumps({"environment": environment(self.device)}) + "\n")

    def problem(self, check: Callable[[], str]) -> str:
        """What ``check`` finds wrong, an exception included. An empty string when all is well."""
        try:
            return check()
        except Exception as error:  # reported in the row, as any other mistake of the op
            traceback.print_exc()
            return one_line(error)

    def free(self) -> None:
        """Give memory back that nobody holds. An optimizer holds itself in a cycle."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def sets(self, nbytes: float) -> int:
        """How many copies of a call's tensors take turns so that the L2 cache serves none of them.

        A call's tensors have ``nbytes`` in all.
        """
        if self.dry:
            return 2
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", L2_BYTES) or L2_BYTES
        return max(1, min(64, -int(-3 * l2 // nbytes)))

    def measure(self, ready: Sequence[Callable[[], Call]], waits: bool, repeats: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of ``repeats`` calls on the device, and of the host in each.

        ``ready`` are called, untimed, for what is timed.
        """
        kept: deque[object] = deque(maxlen=len(ready))
        if self.dry:
            taken = []
            for i in range(-1, repeats):
                call = ready[i % len(ready)]()
                start = time.perf_counter()
                kept.append(call())
                taken.append(time.perf_counter() - start)
            return np.array(taken[1:]), np.array(taken[1:])
        for i in range(max(2, len(ready)) if repeats > 1 else 1):
            kept.append(ready[i % len(ready)]()())
        torch.cuda.synchronize()
        events, host = [], []
        for i in range(repeats):
            call = ready[i % len(ready)]()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not waits:
                torch.cuda._sleep(LAG_CYCLES)
            before.record()
            start = time.perf_counter()
            kept.append(call())
            host.append(time.perf_counter() - start)
            after.record()
            events.append((before, after))
        torch.cuda.synchronize()
        return np.array([before.elapsed_time(after) / 1e3 for before, after in events]), np.array(host)

    def time(
        self,
        variant: str,
        calls: Call | Sequence[Call] = (),
        *,
        ready: Callable[[], Call] | None = None,
        problem: str | None = None,
        moved: float | None = None,
        flops: float | None = None,
        rate: str = "bf16",
        against: tuple[str, float] | None = None,
        waits: bool = False,
        derived: Mapping[str, Callable[[float], float]] = MappingProxyType({}),
        repeats: int | None = None,
        measured: Sequence[float] | None = None,
        **labels: object,
    ) -> float | None:
        """Time a variant and write its row.

        Args:
            calls: what is timed. Several calls take turns.
            ready: makes the next call, untimed, in place of ``calls``.
            problem: what the check found. When it is not empty, the variant is refused. None: a
                baseline, with nothing to check.
            moved, flops: bytes that it must move and arithmetic that it must do. The roofline is
                the longer of the two at the rates of this run: the copy bandwidth, and ``rate``.
            against: name and median of the variant that ``ratio`` compares with.
            derived: further columns, made of the median.
            measured: seconds that the caller took itself, in place of ``calls``.
            labels: further columns.

        Returns:
            Its median in seconds, None where there is none.
        """
        correct = {None: "", "": "yes"}.get(problem, "no")
        if problem:
            self.add(variant, **labels, correct=correct, status=f"refused, it is wrong: {problem}"[:300])
            return None
        if problem is not None:
            labels.setdefault("backend", dispatch.choose(None, torch.device(self.device), "sparse_adamw_"))
        try:
            if measured is not None:
                taken = host = np.array(measured)
            else:
                taken, host = self.measure(in_turns(calls, ready), waits, repeats or self.repeats)
        except Exception as error:  # reported in the row; what is timed next goes on
            traceback.print_exc()
            self.add(variant, **labels, correct=correct, status=f"failed: {one_line(error)}")
            return None
        median = float(np.median(taken))
        numbers = milliseconds(taken, host) | {name: make(median) for name, make in derived.items()}
        if against is not None:
            labels["baseline"], numbers["ratio"] = against[0], against[1] / median
        if limit := self.roofline(moved, flops, rate):
            labels["floor_of"], seconds = limit
            numbers |= {"floor_ms": 1e3 * seconds, "share_of_floor": seconds / median}
        digits = {name: float(f"{value:.4g}") for name, value in numbers.items()}
        self.add(variant, **labels, correct=correct, repeats=len(taken), **digits)
        return median

    def roofline(self, moved: float | None, flops: float | None, rate: str) -> tuple[str, float] | None:
        """``bytes`` or ``flops``, whichever limits a variant, and its seconds; or None."""
        works = {"bytes": (moved, "copy"), "flops": (flops, rate)}
        known = {
            name: work / self.rates[of] for name, (work, of) in works.items() if work is not None and of in self.rates
        }
        return max(known.items(), key=lambda item: item[1]) if known else None


def in_turns(calls: Call | Sequence[Call], ready: Callable[[], Call] | None) -> list[Callable[[], Call]]:
    """What makes the calls that take turns."""
    if ready is not None:
        return [ready]
    return [lambda call=call: call for call in (calls if isinstance(calls, Sequence) else [calls])]


def milliseconds(taken: np.ndarray, host: np.ndarray) -> dict[str, float]:
    """Median, extremes and quartiles on the device, and the median of the host."""
    quantiles = {"median": 0.5, "min": 0.0, "q25": 0.25, "q75": 0.75, "max": 1.0}
    found = {f"{name}_ms": 1e3 * float(np.quantile(taken, q)) for name, q in quantiles.items()}
    return found | {"host_ms": 1e3 * float(np.median(host))}


def environment(device: str) -> dict[str, object]:
    """`bench.common.results.environment`, and the versions that matter on a card."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return results.environment(device) | {"triton": triton, "cuda": torch.version.cuda or "none"}
