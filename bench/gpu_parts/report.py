"""What the stages of the GPU suite share: timing by CUDA events, the machine's rates, rows.

Timing on a card. Each repetition is preceded by a kernel that only waits (5 ms), so that the host
has queued the whole call before the card reaches it; two events around the call then measure the
card alone, and ``host_ms`` says what the call cost the host. Calls that wait for the card
themselves (``waits``) go without it and are measured as they are. A call whose tensors would fit
the L2 cache is given several times with different tensors (`Run.sets`), which take turns; the last
results stay alive, so that results rotate too. All tensors are touched and all kernels are compiled
before the first repetition that counts. Events are used and not graphs, because graphs would hide
what the host costs and cannot hold the calls that wait.

On the CPU (``--dry-run``) the clock is `time.perf_counter`; those figures try the suite out and say
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

import bench_util
import numpy as np
import torch

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
    rates: dict[str, float] = field(
        default_factory=dict
    )  # "copy": bytes a second; "bf16", "tf32", "fp32": FLOP a second

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.deadline - time.monotonic()

    def add(self, variant: str, **columns: object) -> dict:
        """Write a row at once: what a stage has found stays when it is killed."""
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
        """What ``check`` finds wrong, an exception included; an empty string when all is well."""
        try:
            return check()
        except Exception as error:  # told in the row, as any other mistake of the op
            traceback.print_exc()
            return one_line(error)

    def free(self) -> None:
        """Give memory back that nobody holds; an optimizer holds itself in a cycle."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def sets(self, nbytes: float) -> int:
        """How many copies of a call's tensors (``nbytes`` in all) take turns so that the L2 cache
        serves none of them.
        """
        if self.dry:
            return 2
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", L2_BYTES) or L2_BYTES
        return max(1, min(64, -int(-3 * l2 // nbytes)))

    def measure(self, ready: Sequence[Callable[[], Call]], waits: bool, repeats: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of ``repeats`` calls on the device, and of the host in each. ``ready`` are
        called, untimed, for what is timed.
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
        """Time a variant and write its row; returns its median in seconds, None where there is
        none.

        Args:
            calls: what is timed, several calls in turns; or ``ready``, which makes the next call,
                untimed.
            problem: what the check found; not empty: the variant is refused. None: not ours,
                nothing to check.
            moved, flops: bytes that it must move and arithmetic that it must do. The floor is the
                longer of the two at the rates of this run: the copy bandwidth, and ``rate``.
            against: name and median of the variant that ``ratio`` compares with.
            derived: further columns, made of the median.
            measured: seconds that the caller took itself, in place of ``calls``.
            labels: further columns.
        """
        correct = {None: "", "": "yes"}.get(problem, "no")
        if problem:
            self.add(variant, **labels, correct=correct, status=f"refused, it is wrong: {problem}"[:300])
            return None
        if problem is not None:
            labels.setdefault("backend", dispatch.choose(None, torch.device(self.device), "sparse_adamw_"))
        several = list(calls) if isinstance(calls, Sequence) else [calls]
        factories = [ready] if ready is not None else [lambda call=call: call for call in several]
        try:
            if measured is not None:
                taken = host = np.array(measured)
            else:
                taken, host = self.measure(factories, waits, repeats or self.repeats)
        except Exception as error:  # told in the row; what is timed next goes on
            traceback.print_exc()
            self.add(variant, **labels, correct=correct, status=f"failed: {one_line(error)}")
            return None
        median = float(np.median(taken))
        row = {
            f"{name}_ms": 1e3 * float(np.quantile(taken, q))
            for name, q in (("median", 0.5), ("min", 0.0), ("q25", 0.25), ("q75", 0.75), ("max", 1.0))
        }
        row["host_ms"] = 1e3 * float(np.median(host))
        row |= {name: make(median) for name, make in derived.items()}
        if against is not None:
            row["ratio"], labels["baseline"] = against[1] / median, against[0]
        floors = {"bytes": (moved, "copy"), "flops": (flops, rate)}
        known = {
            name: work / self.rates[of] for name, (work, of) in floors.items() if work is not None and of in self.rates
        }
        if known:
            labels["floor_of"] = max(known, key=lambda name: known[name])
            row["floor_ms"] = 1e3 * known[labels["floor_of"]]
            row["share_of_floor"] = row["floor_ms"] / row["median_ms"]
        digits = {name: float(f"{value:.4g}") for name, value in row.items()}
        self.add(variant, **labels, correct=correct, repeats=len(taken), **digits)
        return median


def environment(device: str) -> dict[str, object]:
    """`bench_util.environment`, and the versions that matter on a card."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return bench_util.environment(device) | {"triton": triton, "cuda": torch.version.cuda or "none"}


def machine(run: Run) -> None:
    """The stage ``machine``: the rates that floors are made of, the best of several runs each."""
    run.note_environment()
    mib, side = (8, 256) if run.dry else (1024, 8192)
    bandwidth = bench_util.copy_bandwidth(run.device, mib)
    run.add("copy bandwidth", rate_name="copy", rate=bandwidth, shape=f"{mib} MiB, read and written", correct="")
    dtypes = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        a, b, out = (torch.ones(side, side, device=run.device, dtype=dtype) for _ in range(3))
        a.normal_()
        b.normal_()  # zeros and ones would draw less power, and clock higher, than a real product
        seconds = float(bench_util.timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), run.device, 10).min())
        run.add(
            f"product, {name}",
            rate_name=name,
            rate=2.0 * side**3 / seconds,
            shape=f"{side} x {side} x {side}",
            correct="",
        )
    torch.backends.cuda.matmul.fp32_precision = "ieee"
