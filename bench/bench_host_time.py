"""What a step costs beside its arithmetic: hundreds of tiny matrices.

There are 224 matrices of 40 x 50, as many as in LLaMA-2-7B. Their entries take microseconds, so the
time of a step is that of Python and of the handling of tensor lists. It is the least time of a step
on any device. Steps with dense and with packed gradients, with and without clipping, are compared
with ``AdamW(fused=True)`` on all entries. ``op_ms`` is the call of ``sparse_adamw_`` in a step,
``rest_ms`` the step without it. One thread computes.

Each variant first takes two steps beside the reference backend. A wrong one has a row without a
time, and the exit status is 1.

    python -m bench.bench_host_time [--runs 100] [--out DIR]
        (--dry-run: a few matrices, no files without --out)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import results, timing
from bench.common.timing import Candidate
from lift_kernels import LiftAdamW, ops, pack_gradients

ADAMW = "AdamW(fused=True)"
VARIANTS = {
    "dense gradients": (False, None),
    "dense gradients, clipped": (False, 1.0),
    "packed gradients": (True, None),
    "packed gradients, clipped": (True, 1.0),
}


class Steps:
    """An optimizer of tiny matrices whose gradients stay, and the times of its op calls."""

    def __init__(self, matrices: int, dtype: torch.dtype, packed: bool, clip: float | None, backend: str | None = None):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(40, 50, bias=False) for _ in range(matrices))).to(dtype)
        options = {"selection": "random", "density": 0.05}
        params = pack_gradients(self.model, ".*", **options) if packed else list(self.model.parameters())
        self.optimizer = LiftAdamW(params, refresh_interval=None, max_grad_norm=clip, backend=backend, **options)
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape).to(p.dtype)
        self.op_seconds: list[float] = []

    def run(self) -> None:
        op = ops.sparse_adamw_
        ops.sparse_adamw_ = self._timed  # type: ignore[assignment]
        self._op, seconds = op, len(self.op_seconds)
        try:
            self.optimizer.step()
        finally:
            ops.sparse_adamw_ = op
        assert len(self.op_seconds) == seconds + 1, "a step of these matrices is one launch"

    def _timed(self, *arguments, **options) -> None:
        start = time.perf_counter()
        self._op(*arguments, **options)
        self.op_seconds.append(time.perf_counter() - start)

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.model]


def problem_with(matrices: int, dtype: torch.dtype, packed: bool, clip: float | None) -> str:
    """What is wrong with two steps beside the reference, or an empty string."""
    found = []
    for backend in ("reference", None):
        steps = Steps(matrices, dtype, packed, clip, backend)
        steps.run()
        steps.run()
        found.append([torch.cat([weight.flatten() for weight in steps.weights()])])
    return timing.difference(*found)


def compare(matrices: int, dtype: torch.dtype, runs: int) -> list[dict]:
    """A row of AdamW on all entries, and one of each variant."""
    labels = {"op": "step", "set": f"{matrices} matrices of 40 x 50, {str(dtype).removeprefix('torch.')}"}
    dense = Steps(matrices, dtype, packed=False, clip=None)
    adamw = torch.optim.AdamW(dense.model.parameters(), fused=True)
    candidates, steps, refused = [Candidate(ADAMW, adamw.step)], {}, []
    for name, options in VARIANTS.items():
        if problem := problem_with(matrices, dtype, *options):
            refused.append(labels | {"variant": name, "status": f"refused, it is wrong: {problem}"})
            continue
        steps[name] = Steps(matrices, dtype, *options)
        candidates.append(Candidate(name, steps[name].run))
    times = timing.time_interleaved(candidates, runs)
    table = results.rows(candidates, times, ADAMW, float("nan"), **labels)
    for row in table:
        row.pop("copy_gb_s")
        if row["variant"] in steps:
            op = np.array(steps[row["variant"]].op_seconds[-runs:])
            row["op_ms"] = round(1e3 * float(np.median(op)), 4)
            row["rest_ms"] = round(1e3 * float(np.median(times[row["variant"]] - op)), 4)
    return [row | {"status": "ok"} for row in table] + refused


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="interleaved rounds")
    results.add_output_options(parser)
    arguments = parser.parse_args(argv)
    matrices, runs = (3, 2) if arguments.dry_run else (224, arguments.runs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = [
            row | results.environment()
            for dtype in (torch.float32, torch.bfloat16)
            for row in compare(matrices, dtype, runs)
        ]
    finally:
        torch.set_num_threads(threads)
    results.show(table, ["set", "variant", "median_ms", "q25_ms", "q75_ms", "ratio", "op_ms", "rest_ms", "status"])
    if folder := results.output_folder(arguments):
        results.write_csv(folder / "host_time.csv", table)
    return results.exit_status(table)


if __name__ == "__main__":
    raise SystemExit(main())
