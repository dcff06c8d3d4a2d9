"""The small factorizations of a refresh against torch's.

They are eigenproblems and subspace-iteration ops. The widths are those of rank 128.

- torch.linalg.eigh and `symmetric_eigen`, which replaces it where torch solves a batch one after
  the other: ``eigh_cost`` is what one costs in FLOPs of a TF32 product a third power of the side.
  Such a number is used for CUDA in `lift_kernels.masks.lowrank`. Checked: orthonormal vectors that
  solve the problem, 1e-5.
- `gaussian_sketch` against torch.randn: bytes written. Checked against the reference, 1e-5.
- `cholesky_qr_` and `chebyshev_step_` against torch.linalg.qr and the reference (Cholesky of the
  scaled Gram matrix and a triangular solve). Roofline: 2 n l^2 FLOPs at the fp32 rate (Gram matrix
  and product with R^-1, a triangle each; one such product more with a second block), or the blocks
  read twice and written once (the step reads three and writes two). Checked: the columns are
  orthonormal and equal the reference's, 1e-3.

Blocks of 32 matrices, 134 MB, are larger than the L2 cache.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_parts.runner import Run
from lift_kernels import ops
from lift_kernels.ops import dispatch
from lift_kernels.ops.symmetric_eigen import symmetric_eigen


def eigenproblems(run: Run) -> None:
    for batch, side in ((1, 32), (2, 16)) if run.dry else ((1, 4096), (1, 512), (1, 256), (32, 256), (32, 128)):
        generator = torch.Generator(run.device).manual_seed(0)
        factor = torch.randn(batch, side, 2 * side, generator=generator, device=run.device)
        gram = factor @ factor.mT
        rate, work = run.rates.get("tf32", float("nan")), batch * side**3
        labels = {
            "op": "eigh",
            "dtype": "fp32",
            "waits": True,
            "shape": f"{batch} of {side} x {side}",
            "derived": {"eigh_cost": lambda s, r=rate, w=work: s * r / w},
        }
        taken = run.time("torch.linalg.eigh", partial(torch.linalg.eigh, gram), repeats=3, **labels)
        if side > 512:
            continue  # left to torch
        against = None if taken is None else ("torch.linalg.eigh", taken)
        problem = run.problem(lambda gram=gram: not_eigen(gram, *symmetric_eigen(gram)))
        run.time("symmetric_eigen", partial(symmetric_eigen, gram), problem=problem, against=against, **labels)


def not_eigen(matrices: Tensor, values: Tensor, vectors: Tensor) -> str:
    """What is wrong with eigenvalues and eigenvectors, relative to the largest eigenvalue."""
    product = matrices.double() @ vectors.double() / values.double().amax()
    return not_orthonormal(vectors) or far(product, vectors.double() * (values / values.amax()).double()[:, None], 1e-5)


def far(got: Tensor, right: Tensor, tolerance: float) -> str:
    error = float((got.double() - right.double()).abs().max())
    return "" if error <= tolerance and got.shape == right.shape else f"off by {error:.3g}, admitted {tolerance:g}"


def not_orthonormal(block: Tensor) -> str:
    gram = block.double().mT @ block.double()
    return far(gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram), 1e-4)


def subspace_ops(run: Run) -> None:
    batch, rows, width = (2, 64, 16) if run.dry else (32, 4096, 256)
    shape = (batch, rows, width)
    labels = {"dtype": "fp32", "shape": f"{batch} of {rows} x {width}"}
    sketch = partial(ops.gaussian_sketch, *shape, seed=1, device=run.device)
    baseline = run.time("torch.randn", partial(torch.randn, shape, device=run.device), op="gaussian_sketch_", **labels)
    problem = run.problem(lambda: far(sketch(), sketch(backend="reference"), 1e-5))
    against = None if baseline is None else ("torch.randn", baseline)
    run.time(
        "gaussian_sketch",
        sketch,
        problem=problem,
        moved=4.0 * batch * rows * width,
        op="gaussian_sketch_",
        against=against,
        backend=default(run, "gaussian_sketch_"),
        **labels,
    )

    start = sketch(backend="reference")
    product, previous = (
        ops.gaussian_sketch(*shape, seed=seed, device=run.device, backend="reference") for seed in (2, 3)
    )
    edge = torch.full((batch,), 2.0, device=run.device)
    flops, block_bytes = 2.0 * batch * rows * width**2, 4.0 * batch * rows * width
    qr = run.time(
        "torch.linalg.qr", partial(torch.linalg.qr, start), op="cholesky_qr_", waits=True, repeats=3, **labels
    )

    def orthonormal(backend: str | None) -> Tensor:
        block = start.clone()
        status = ops.cholesky_qr_(block, backend=backend)
        assert not bool(status.any()), f"status {status.tolist()}"
        return block

    def stepped(backend: str | None) -> tuple[Tensor, Tensor]:
        block = start.clone()
        raised, status = ops.chebyshev_step_(product, block, previous, edge, backend=backend)
        assert not bool(status.any()), f"status {status.tolist()}"
        return raised, block

    def qr_problem(backend: str | None) -> str:
        block = orthonormal(backend)
        return not_orthonormal(block) or far(block, orthonormal("reference"), 1e-3)

    def step_problem(backend: str | None) -> str:
        (raised, block), (right, moved) = stepped(backend), stepped("reference")
        return not_orthonormal(raised) or far(raised, right, 1e-3) or far(block, moved, 1e-3)

    for backend in dict.fromkeys(("reference", default(run, "cholesky_qr_"))):
        against = None if qr is None else ("torch.linalg.qr", qr)
        problem = run.problem(lambda b=backend: qr_problem(b))
        qr_call = partial(ops.cholesky_qr_, start.clone(), backend=backend)
        run.time(
            f"cholesky_qr_, {backend}",
            qr_call,
            problem=problem,
            flops=flops,
            rate="fp32",
            moved=3 * block_bytes,
            against=against,
            op="cholesky_qr_",
            backend=backend,
            **labels,
        )
        problem = run.problem(lambda b=backend: step_problem(b))
        step = partial(ops.chebyshev_step_, product, start.clone(), previous, edge, backend=backend)
        run.time(
            f"chebyshev_step_, {backend}",
            step,
            problem=problem,
            flops=1.5 * flops,
            rate="fp32",
            moved=8 * block_bytes,
            op="chebyshev_step_",
            backend=backend,
            **labels,
        )


def default(run: Run, op: str) -> str:
    return dispatch.choose(None, torch.device(run.device), op)


def work(run: Run) -> None:
    eigenproblems(run)
    subspace_ops(run)
