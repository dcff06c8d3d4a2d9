"""The rates of the machine, of which rooflines are made: the best of several runs each."""

from __future__ import annotations

import torch

from bench.common import timing
from bench.gpu_parts.runner import Run


def work(run: Run) -> None:
    """The copy bandwidth and the rates of products."""
    run.note_environment()
    mib, side = (8, 256) if run.dry else (1024, 8192)
    bandwidth = timing.copy_bandwidth(run.device, mib)
    run.add("copy bandwidth", rate_name="copy", rate=bandwidth, shape=f"{mib} MiB, read and written", correct="")
    dtypes = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        a, b, out = (torch.ones(side, side, device=run.device, dtype=dtype) for _ in range(3))
        a.normal_()
        b.normal_()  # zeros and ones would draw less power, and clock higher, than a real product
        seconds = float(timing.timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), run.device, 10).min())
        run.add(
            f"product, {name}",
            rate_name=name,
            rate=2.0 * side**3 / seconds,
            shape=f"{side} x {side} x {side}",
            correct="",
        )
    torch.backends.cuda.matmul.fp32_precision = "ieee"
