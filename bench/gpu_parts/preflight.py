"""What comes before the timings: build, tests and compute-sanitizer.

The extension is built for this card, the tests marked ``gpu`` run, and compute-sanitizer watches
the CUDA ops.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import ROOT
from bench.gpu_parts.runner import Run

MARGIN_S = 10.0
"""What a stage keeps of its budget, so that its rows are written before it is killed."""


def child(arguments: Sequence[str], **environment: str) -> tuple[subprocess.Popen, Path]:
    """A process, started in the checkout's root, and the file that takes its output.

    It belongs to the stage's group, which is killed as a whole.
    """
    handle, name = tempfile.mkstemp(suffix=".log")
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | environment, stdout=handle, stderr=subprocess.STDOUT
    )
    os.close(handle)
    return process, Path(name)


def finish(process: subprocess.Popen, log: Path, seconds: float) -> tuple[str, bool]:
    """Output of a process, and whether it had to be killed after ``seconds``.

    These may be infinite.
    """
    try:
        process.wait(None if seconds == math.inf else max(0.1, seconds))
        killed = False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        killed = True
    output = log.read_text(errors="replace")
    log.unlink()
    return output, killed


def last_line(output: str) -> str:
    return (output.strip().splitlines() or [""])[-1][:300]


def build(run: Run) -> None:
    """The extension, in place, for this card's architecture alone.

    A machine without nvcc gets the CPU ops, and a row says so.
    """
    run.note_environment()
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout, flush=True)
    if run.dry:
        run.add("extension", status="left out of the dry run", correct="")
        return
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    process, log = child(command, LIFT_CUDA_ARCHS=arch, LIFT_REQUIRE_NATIVE="1")
    output, killed = finish(process, log, run.left() - MARGIN_S)
    print(output[-6000:], flush=True)
    if process.returncode != 0:
        run.add(
            f"extension for sm_{arch}", status="killed, it took too long" if killed else f"failed: {last_line(output)}"
        )
        return
    from lift_kernels.ops import dispatch

    for name, backend in dispatch.backends().items():  # the extension is loaded here for the first time
        status = "ok" if backend.usable else f"not usable: {backend.reason}"[:300]
        run.add(f"backend {name}", status=status, seconds=round(time.perf_counter() - start, 1))


def tests(run: Run) -> None:
    """The ``gpu`` tests in several processes, each of which runs every n-th test.

    There is one row per file with a failure, and one for all.
    """
    run.note_environment()
    shards = 1 if run.dry else max(1, min(14, (os.cpu_count() or 2) - 2))
    mode = ["--collect-only", "python_tests/ops/test_packed_ops.py"] if run.dry else ["python_tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu_parts.shard_plugin"]
    command.append("--continue-on-collection-errors")  # one file must not take all others along
    # Plugins that happen to be installed here are not needed, and loading one imports its package.
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    children = [child([*command, *mode], LIFT_SHARD=f"{i}/{shards}", **environment) for i in range(shards)]
    done, red, late = Counter(), Counter(), 0
    for process, log in children:
        output, killed = finish(process, log, run.left() - MARGIN_S)
        print(output[-30_000:], flush=True)  # tracebacks of a whole file that fails
        late += killed
        if process.returncode not in (0, 1) and not killed:
            red[f"(pytest ended with {process.returncode}) {last_line(output)}"] += 1
        red.update(failed_files(output))
        done.update(
            {
                word: int(n)
                for n, word in re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", last_line(output))
            }
        )
        done["collected"] += sum(int(n) for n in re.findall(r"(\d+)/\d+ tests collected", output))
    for file, count in red.items():
        run.add(file, status=f"failed: {count} tests", correct="no")
    status = f"killed, it took too long: {late} of {shards} processes" if late else "failed" if red else "ok"
    if done["passed"] == 0 and not run.dry and status == "ok":
        status = "failed: no test ran"
    run.add(
        "gpu tests",
        status=status,
        correct="" if run.dry else "no" if red or late else "yes",
        shape=", ".join(f"{n} {word}" for word, n in done.items() if n),
    )


def failed_files(output: str) -> list[str]:
    """The test file, within python_tests, of each failure or error that pytest lists."""
    return re.findall(r"^(?:FAILED|ERROR) python_tests/([\w/]+\.py)", output, re.MULTILINE)


def sanitizer_path() -> str | None:
    """compute-sanitizer of CUDA_HOME, on PATH, or at the toolkit's usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "compute-sanitizer") for home in homes]
    candidates.insert(len(homes) - 1, "compute-sanitizer")
    return next((found for found in map(shutil.which, candidates) if found), None)


def sanitizer(run: Run) -> None:
    """memcheck and racecheck on every one of the `sanitizer_cases`.

    Each pair of a tool and an op has a process, and all run side by side. The cases also compare
    results with the reference.
    """
    driver = [sys.executable, "-m", "bench.gpu_parts.sanitizer_cases", run.device]
    if run.dry:
        output, _ = finish(*child(driver), run.left())
        print(output, flush=True)
        status = "ok" if output.count(": right") == len(cases()) else f"failed: {last_line(output)}"
        run.add("the ops' small cases on the CPU", status=status)
        return
    tool = sanitizer_path()
    if tool is None:
        run.add(
            "compute-sanitizer", status="missing: neither in CUDA_HOME/bin nor on PATH; it is part of the CUDA toolkit"
        )
        return
    # Each tensor gets memory of its own, or an access beyond it would land in the allocator's block
    # and go unseen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch asks for symbols that a driver may lack, which memcheck would report.
    tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    children = {
        (name, op): child([tool, "--tool", name, *options, "--error-exitcode", "9", *driver, op], **environment)
        for name, options in tools.items()
        for op in cases()
    }
    for name in tools:
        problems, right = [], 0
        for op in cases():
            process, log = children[name, op]
            output, killed = finish(process, log, run.left() - MARGIN_S)
            print(f"{name} {output[-4000:]}", flush=True)
            said = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .+)", output)
            fine = output.count(": right") == 1
            right += fine
            if killed:
                problems.append(f"{op}: killed, it took too long")
            elif process.returncode != 0 or not fine or not said:
                problems.append(f"{op}: {(said or [last_line(output)])[-1]}")
        run.add(
            f"compute-sanitizer {name}",
            status=f"failed: {'; '.join(problems)}"[:300] if problems else "ok",
            correct="no" if problems else "yes",
            shape=f"{right} of {len(cases())} ops right, {len(problems)} with findings",
        )


def cases() -> list[str]:
    """Names of the ops that have a case."""
    from bench.gpu_parts.sanitizer_cases import CASES

    return [name for name, _ in CASES]
