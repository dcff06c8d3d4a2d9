"""Small problems on which every backend must agree with the reference.

The command ``doctor`` runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch
from ..optim.lift_adamw import LiftAdamW

OK = "OK"


def check_backend(name: str, device: str) -> list[str]:
    """Compare the ops of a backend with the reference.

    Args:
        name: name of the backend.
        device: device of the inputs, "cpu" or "cuda".

    Returns:
        One text for each op that fails or disagrees with the reference.
    """
    problems = []
    for op in dispatch.ops_of(name):
        try:
            error, limit = CASES[op](name, device)
            if not error <= limit:
                problems.append(f"{op} is off by {error:.2g}, the limit is {limit:.2g}")
        except Exception as error:  # a broken backend may raise anything
            problems.append(f"{op} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return problems


def _data(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return a 32 x 48 matrix, a gradient and a sorted index list of 300 of the 1,536 entries."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(32, 48, generator=generator).to(device, dtype) for _ in range(2))
    return weight, grad, _index_list(0, device)


def _index_list(seed: int, device: str) -> Tensor:
    return torch.randperm(1536, generator=torch.Generator().manual_seed(seed))[:300].sort().values.int().to(device)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; infinity where there is a NaN."""
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


def _arena_migrate(name: str, device: str) -> tuple[float, float]:
    """A longer list and a shorter one; indices, moments, master, births and counts together."""
    results = []
    for backend in (name, "reference"):
        weight, _, _ = _data(device, torch.bfloat16)
        lists = [_index_list(seed, device) for seed in range(4)]
        exp_avg, exp_avg_sq, master = (torch.arange(700.0, device=device) + i for i in range(3))
        births = torch.arange(700, dtype=torch.int32, device=device)
        indices = torch.cat([lists[0], lists[0][:100], lists[1][:200], lists[2][:100]])
        steps = torch.tensor([5.0, 9.0], device=device)
        kept = ops.arena_migrate_(
            [weight, weight],
            [lists[2], lists[3][:150]],
            indices,
            [0, 400],
            [100, 200],
            exp_avg,
            exp_avg_sq,
            steps,
            master=master,
            births=births,
            backend=backend,
        )
        results.append(torch.cat([x.double() for x in (kept, indices, exp_avg, exp_avg_sq, master, births)]))
    return _difference(*results), 0.0


def _norm(name: str, device: str) -> tuple[float, float]:
    _, grad, indices = _data(device)
    expected = grad.flatten()[indices.long()].double().norm()
    return _difference(ops.packed_l2_norm([grad], indices, [0], [300], backend=name), expected), 1e-5 * float(expected)


def _adamw(name: str, device: str) -> tuple[float, float]:
    """Three steps in fp32. Allowed are 2 ulp of the largest weight."""
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
    """A bit for each entry of a list but one, which is the larger of two candidates."""
    expected = _index_list(0, device)
    flags = torch.zeros(1536, dtype=torch.int32, device=device)
    flags[expected[1:].long()] = 1
    words = (flags.view(1, 1, 48, 32) << torch.arange(32, dtype=torch.int32, device=device)).sum(-1, dtype=torch.int32)
    candidates = torch.tensor([[5 << 32, (7 << 32) + 2**31 - 1 - int(expected[0])]], device=device)
    counts = torch.tensor([[299, 2]], dtype=torch.int32, device=device)
    return _difference(ops.bitmap_to_indices(words, candidates, counts, 1536, 300, backend=name)[0][0], expected), 0.0


def _weight_grad(name: str, device: str) -> tuple[float, float]:
    weight, grad, indices = _data(device)
    expected = (weight.T @ grad).flatten()  # 48 x 48
    found = ops.packed_weight_grad(weight, grad, indices, backend=name)
    return _difference(found, expected[indices.long()]), 1e-4


def _topk(name: str, device: str) -> tuple[float, float]:
    """A product with entries so far apart that rounding does not change their order."""
    left = torch.arange(1.0, 33.0, device=device)[:, None]
    right = 40.0 ** torch.linspace(0, 1, 48, device=device)[:, None]
    expected = (left @ right.T).flatten().topk(300).indices.sort().values
    return _difference(ops.lowrank_topk(left, right, 300, backend=name)[0], expected), 0.0


def _chebyshev(name: str, device: str) -> tuple[float, float]:
    product, block = (ops.gaussian_sketch(2, 90, 20, seed=s, device=device, backend="reference") for s in (5, 6))
    edge = torch.full((2,), 3.0, device=device)
    found = [ops.chebyshev_step_(product, block.clone(), None, edge, backend=b)[0] for b in (name, "reference")]
    return _difference(*found), 1e-5


CASES: dict[str, Callable[[str, str], tuple[float, float]]] = {
    "sparse_adamw_": _adamw,
    "packed_gather": _gather,
    "packed_scatter_": _scatter,
    "packed_migrate": _migrate,
    "arena_migrate_": _arena_migrate,
    "packed_l2_norm": _norm,
    "packed_weight_grad": _weight_grad,
    "lowrank_topk": _topk,
    "bitmap_to_indices": _bitmap,
    "gaussian_sketch_": _sketch,
    "cholesky_qr_": _qr,
    "chebyshev_step_": _chebyshev,
}
"""By op: a function of (backend, device) that returns the error and the largest allowed error."""


def check_optimizer(device: str) -> list[str]:
    """Compare three optimizer steps of the default backend with the reference.

    The steps have bf16 weights, clipping and a refresh.

    Args:
        device: device of the parameter, "cpu" or "cuda".

    Returns:
        A text for a failure or a disagreement, or an empty list.
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
    except Exception as error:  # as in check_backend
        return [f"LiftAdamW raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"]


if __name__ == "__main__":  # in a process with TRITON_INTERPRET=1
    found = check_backend("triton", "cpu")
    print("; ".join(found) or OK)
    sys.exit(bool(found))
