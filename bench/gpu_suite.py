"""One command for a machine with a GPU: build, test, then time the ops on LLaMA-2-7B shapes. One CSV, under 8 minutes.

Builds the extension in place for the card, runs the tests marked ``gpu``, and times with CUDA events `sparse_adamw_` on the
224 linear matrices (bf16, random 5 % masks clustered by rows) against torch.optim.AdamW(fused=True) on the same tensors, then
packed_l2_norm, packed_migrate, both ways of packed_weight_grad, lowrank_topk, bitmap_to_indices (their bounds: factors or
bitmaps read, results written; the arithmetic is not in them) and the masks of all matrices, cold and warm (bound: one read of
the weights a pass). Every op is checked against the reference first; a wrong one is not timed. A part that fails leaves a row
that says why, and the others go on. Needs torch, triton, numpy, pytest and ninja; no network.

``bound_ms`` is a count of bytes over the measured copy bandwidth: distinct 32-byte sectors of the weights (read and written)
and of dense gradients (read) that selected entries lie on, and the packed streams, as in bench_sparse_adamw.py.

    python bench/gpu_suite.py --out FOLDER     (--dry-run: tiny shapes on the CPU, without build and tests)
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import bench_util
import numpy as np
import torch
from bench_packed_ops import neighbour
from bench_sparse_adamw import Sparse, dense
from bench_util import Arena
from torch import Tensor

from lift_kernels import ops
from lift_kernels.masks import MaskRequest, principal_masks

BF16, FP32 = torch.bfloat16, torch.float32
DENSITY = 0.05


@dataclass
class Suite:
    """Where it runs, on what shapes (the matrices of one layer), and the rows so far."""

    device: str
    shapes: list[tuple[int, int]]
    layers: int
    runs: int
    rows: list[dict]
    bandwidth: float = float("nan")
    baseline: np.ndarray | None = None

    def part(self, name: str, work: Callable[[], object]) -> None:
        """Run one part; a failure becomes a row."""
        print(f"--- {name}", flush=True)
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.rows.append({"part": name, "status": f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]})
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def time(self, part: str, variant: str, problem: str, run: Callable[[], object], floor: float) -> np.ndarray | None:
        """Time ``run`` (whose bytes are ``floor``) unless the check found a ``problem``."""
        if problem:
            print(f"{variant}: wrong, not timed: {problem}", flush=True)
            self.rows.append({"part": part, "variant": variant, "status": f"wrong: {problem}", "correct": "no"})
            return None
        taken = bench_util.timed(run, self.device, self.runs)
        row = bench_util.row(variant, taken, taken if self.baseline is None else self.baseline, floor, self.bandwidth)
        row["bound_ms"], row["share_of_bound"] = row.pop("floor_ms"), row.pop("share_of_floor")
        if part != "step":
            del row["ratio"]
        self.rows.append({"part": part, "status": "ok", "correct": "yes"} | row)
        bench_util.show(self.rows[-1:], ["variant", "median_ms", "ratio", "bound_ms"])
        return taken

    def masks(self, layers: int) -> Arena:
        seeds = range(layers * len(self.shapes))
        shapes = self.shapes * layers
        return Arena.of([bench_util.clustered_indices(*shapes[i], DENSITY, i, self.device) for i in seeds])

    def matrices(self, layers: int, scale: float) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"generator": generator, "device": self.device, "dtype": BF16}
        return [torch.randn(shape, **options).mul_(scale) for shape in self.shapes * layers]


def command(suite: Suite, *arguments: str, **environment: str) -> None:
    """A child process in the checkout, its last line a row; raises when it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=bench_util.ROOT, env=os.environ | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)  # fmt: skip
    print(done.stdout[-4000:], flush=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    suite.rows.append({"part": "build" if "setup.py" in arguments else "tests", "status": "ok", "variant": last[:200]})


def steps(suite: Suite) -> None:
    """The dense step first; its state is freed before ours is made."""
    weights, grads = suite.matrices(suite.layers, 0.02), suite.matrices(suite.layers, 1e-3)
    adamw = dense(weights, grads, fused=True)
    floor = 7.0 * sum(weight.nbytes for weight in weights)
    suite.baseline = suite.time("step", "AdamW fused, bf16", "", adamw, floor)
    del adamw
    gc.collect()  # an optimizer holds itself in a cycle
    if suite.device != "cpu":
        torch.cuda.empty_cache()
    small, arena = suite.masks(1), suite.masks(suite.layers)
    layer = len(suite.shapes)
    for packed in (False, True):
        for label, options in {"fp32 moments": {}, "fp32 moments, fp32 master": {"master": True}}.items():
            name = f"{'packed' if packed else 'dense'} bf16 grads, {label}"
            problem = Sparse(weights[:layer], grads[:layer], small, packed=packed, **options).check()
            sparse = Sparse(weights, grads, arena, packed=packed, **options)
            suite.time("step", name, problem, sparse, sparse.floor_bytes())
            del sparse


def norm(suite: Suite) -> None:
    """The norm over packed gradients of all matrices."""
    arena = suite.masks(suite.layers)
    grads = [torch.randn(count, device=suite.device) for count in arena.counts]

    def run(backend: str | None = None) -> Tensor:
        return ops.packed_l2_norm(grads, arena.indices, arena.offsets, arena.counts, packed_grads=True, backend=backend)

    problem = bench_util.difference([run("reference")], [run()])
    suite.time("packed_l2_norm", "packed fp32 grads", problem, run, 4.0 * arena.entries)


def migrate(suite: Suite) -> None:
    """One fp32 moment of all matrices carried over to lists that share 95 %, matrix by matrix."""
    old = suite.masks(suite.layers).lists()
    sizes = [m * n for m, n in suite.shapes * suite.layers]
    new = [neighbour(index, size) for index, size in zip(old, sizes)]
    values = [torch.randn(len(index), device=suite.device) for index in old]

    def run(backend: str | None = None) -> list[Tensor]:
        return [ops.packed_migrate(*lists, backend=backend) for lists in zip(values, old, new)]

    problem = bench_util.difference(run("reference"), run())
    suite.time("packed_migrate", "fp32, 95 % stay", problem, run, 8.0 * sum(map(len, old + new)))


def weight_grad(suite: Suite) -> None:
    """The weight gradients of one layer's matrices, bf16: torch's dense products, then packed ones. Bytes: factors and results."""
    arena = suite.masks(1)
    options = {"generator": torch.Generator(suite.device).manual_seed(0), "device": suite.device, "dtype": BF16}
    for tokens in (64,) if suite.device == "cpu" else (2048, 16384):
        factors = [[torch.randn(tokens, side, **options) for side in shape] for shape in suite.shapes]
        lists = arena.lists()

        def run(backend: str | None = None, factors=factors, lists=lists, **way) -> list[Tensor]:
            return [ops.packed_weight_grad(*pair, index, backend=backend, **way) for pair, index in zip(factors, lists)]

        def products(factors=factors) -> None:
            for grad_output, input in factors:
                grad_output.t() @ input

        truth = [(g.float().t() @ x.float()).view(-1)[index.long()] for (g, x), index in zip(factors, lists)]
        torchs = [(g.t() @ x).view(-1)[index.long()].float() for (g, x), index in zip(factors, lists)]
        admitted = [2.0 * float((a - b).abs().max()) for a, b in zip(torchs, truth)]
        moved = float(sum(t.nbytes for pair in factors for t in pair))
        sides = sum(2.0 * m * n for m, n in suite.shapes)
        suite.time("packed_weight_grad", f"{tokens} tokens: dense products alone", "", products, moved + sides)
        for name, way in {"product and gather": {}, "fused": {"fused": True}}.items():
            if way and suite.device == "cpu":
                continue  # a Triton kernel
            errors = [float((a - b).abs().max()) for a, b in zip(run(**way), truth)]
            wrong = [i for i, (error, most) in enumerate(zip(errors, admitted)) if not error <= most]
            problem = "".join(f"matrix {i} is off by {errors[i]:.3g}, admitted {admitted[i]:.3g}; " for i in wrong)
            floor = moved + 4.0 * arena.entries
            suite.time("packed_weight_grad", f"{tokens} tokens: {name}", problem, lambda way=way, run=run: run(**way), floor)


def topk(suite: Suite) -> None:
    """The selection from the factors of the last shape: the bracket drawn from entries, and known from the last refresh."""
    (m, n), rank = suite.shapes[-1], min(128, *suite.shapes[-1])
    generator = torch.Generator(suite.device).manual_seed(0)
    left, right = (torch.randn(size, rank, generator=generator, device=suite.device) for size in (m, n))
    k = round(DENSITY * m * n)
    indices, threshold = ops.lowrank_topk(left, right, k)
    chosen = (left.double() @ right.double().T).abs().view(-1)[indices.long()]
    low = float(chosen.min()) if len(indices.unique()) == k else 0.0
    problem = "" if low >= float(threshold) * (1 - 1e-4) else f"an entry of {low:.4g} was chosen above {float(threshold):.4g}"
    floor = 4.0 * (m + n) * rank + m * n / 4 + 4.0 * k  # factors, bitmap written and read, list; the product is not in it
    suite.time("lowrank_topk", "sampled bracket", problem, lambda: ops.lowrank_topk(left, right, k), floor)
    known = torch.stack([threshold * 0.98, threshold * 1.02])
    suite.time("lowrank_topk", "known bracket", problem, lambda: ops.lowrank_topk(left, right, k, bracket=known), floor)


def bitmaps(suite: Suite) -> None:
    """The compaction alone: two matrices of the last shape whose bracket, 2 % about the k-th magnitude, holds it."""
    m, n = suite.shapes[-1]
    generator = torch.Generator(suite.device).manual_seed(0)
    magnitude = torch.randn(m, n, generator=generator, device=suite.device).abs_()
    k = round(DENSITY * m * n)
    threshold = magnitude.view(-1).topk(k).values[-1]
    bits = torch.nn.functional.pad((magnitude > threshold * 1.02).int(), (0, -n % 32)).unflatten(1, (-1, 32))
    words = (bits << torch.arange(32, device=suite.device, dtype=torch.int32)).sum(2, dtype=torch.int32)
    place = ((magnitude >= threshold * 0.98) & (magnitude <= threshold * 1.02)).view(-1).nonzero().view(-1)
    noted = (magnitude.view(-1)[place].view(torch.int32).long() << 32) + (2**31 - 1 - place)
    definite = int((magnitude > threshold * 1.02).sum())
    counts = torch.tensor([[definite, len(place)]] * 2, dtype=torch.int32, device=suite.device)
    arguments = words.expand(2, -1, -1).contiguous(), noted.expand(2, -1).contiguous(), counts, n, k
    expected = ops.bitmap_to_indices(*arguments, backend="reference")
    floor = 2.0 * (3 * m * n / 8 + 8 * len(place) + 4 * k)  # bitmaps copied and read, candidates read, lists written
    for backend in ["reference"] if suite.device == "cpu" else ["native-cuda", "triton"]:
        found = ops.bitmap_to_indices(*arguments, backend=backend)
        problem = "" if all(map(torch.equal, found, expected)) else "differs from the reference"
        suite.time("bitmap_to_indices", f"two matrices, {backend}", problem,
                   lambda backend=backend: ops.bitmap_to_indices(*arguments, backend=backend), floor)  # fmt: skip


def refresh(suite: Suite) -> None:
    """Masks of all matrices, cold and then warm from the bases of the cold ones; weights with a slowly decaying spectrum."""
    rank = min(128, min(map(min, suite.shapes)) // 4)
    generator = torch.Generator(suite.device).manual_seed(0)

    def weight(m: int, n: int) -> Tensor:
        u, v = (torch.randn(size, 2 * rank, generator=generator, device=suite.device) for size in (m, n))
        decay = torch.arange(1, 2 * rank + 1, device=suite.device).float() ** -0.15
        noise = torch.randn(m, n, generator=generator, device=suite.device).mul_(0.02)
        return noise.add_((u * decay) @ v.T, alpha=0.1 / min(m, n) ** 0.5).to(BF16)

    requests = [MaskRequest(weight(m, n), rank, round(DENSITY * m * n)) for m, n in suite.shapes * suite.layers]
    masks = principal_masks(requests, method="chebyshev")
    exact = principal_masks(requests[:1], method="gram")[0].indices
    overlap = float(torch.isin(masks[0].indices, exact).double().mean())
    problem = "" if overlap > 0.9 else f"only {overlap:.3f} of a mask is in the exact one"
    warm = [replace(r, basis=mask.basis, threshold=mask.threshold) for r, mask in zip(requests, masks)]
    runs, suite.runs = suite.runs, 3
    for variant, given in {"cold": requests, "warm": warm}.items():
        passes = principal_masks(given, method="chebyshev")
        floor = sum(mask.passes * r.weight.nbytes for mask, r in zip(passes, given))
        suite.time("refresh", variant, problem, lambda given=given: principal_masks(given, method="chebyshev"), floor)
    suite.runs = runs


def main(arguments: list[str] | None = None) -> Path:
    """Returns the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of the CSV")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, without build and tests")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run tries the suite on the CPU")
    tiny = [(64, 64)] * 4 + [(172, 64)] * 2 + [(64, 172)]
    llama = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    suite = Suite("cpu", tiny, 2, 3, []) if given.dry_run else Suite("cuda", llama, 32, 20, [])
    suite.bandwidth = bench_util.copy_bandwidth(suite.device, 8 if given.dry_run else 1024)
    if not given.dry_run:
        arch = "".join(map(str, torch.cuda.get_device_capability()))
        suite.part("build", lambda: command(suite, "setup.py", "build_ext", "--inplace", LIFT_CUDA_ARCHS=arch))
        suite.part("tests", lambda: command(suite, "-m", "pytest", "-q", "-m", "gpu", "python_tests"))
    parts = {"step": steps, "packed_l2_norm": norm, "packed_migrate": migrate, "packed_weight_grad": weight_grad,
             "lowrank_topk": topk, "bitmap_to_indices": bitmaps, "refresh": refresh}  # fmt: skip
    for name, work in parts.items():
        suite.part(name, lambda work=work: work(suite))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "gpu_suite.csv"
    bench_util.write_csv(path, [row | bench_util.environment(suite.device) for row in suite.rows])
    return path


if __name__ == "__main__":
    main()
