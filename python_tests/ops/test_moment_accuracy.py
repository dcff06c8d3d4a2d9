"""How far updates by 8-bit moments are from those by fp32 moments, over simulated trainings."""

from __future__ import annotations

import pytest
import torch

from lift_kernels import ops
from lift_kernels.ops.state_formats import decode, dither, encode_first, encode_root, groups_of

ROWS, ROW = 150, 75  # rows of selected entries; groups of 32 reach over their ends
ENTRIES = ROWS * ROW


class Gradients:
    """Those of rows whose scales differ by a factor of e^1.5 in the standard deviation."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = torch.randn(ROWS, 1, generator=self.generator).mul(1.5).exp().expand(ROWS, ROW).flatten()

    def next(self) -> torch.Tensor:
        return torch.randn(ENTRIES, generator=self.generator) * self.scale

    def entering(self) -> torch.Tensor:
        """2 % of the entries."""
        return torch.rand(ENTRIES, generator=self.generator) < 0.02


class Run:
    """Steps of the op, whose updates are read from weights that start at zero."""

    def __init__(self, coded: bool, betas: tuple[float, float]):
        self.betas = betas
        self.m = torch.zeros(ENTRIES, dtype=torch.int8 if coded else torch.float32)
        self.v = torch.zeros(ENTRIES, dtype=torch.uint8 if coded else torch.float32)
        names = ("exp_avg_scale", "exp_avg_sq_scale") if coded else ()
        self.scales = {name: torch.zeros(groups_of(ENTRIES)) for name in names}
        self.indices = torch.arange(ENTRIES, dtype=torch.int32)

    def update(self, grad: torch.Tensor, step: int, backend: str) -> torch.Tensor:
        weight = torch.zeros(ENTRIES)
        arena = self.indices, [0], [ENTRIES], self.m, self.v, torch.tensor([float(step)])
        options = {"betas": self.betas, "packed_grads": True, "backend": backend}
        ops.sparse_adamw_([weight], [grad], *arena, 1.0, **options, **self.scales)
        return weight


@pytest.mark.native
@pytest.mark.parametrize("betas, admitted", [((0.9, 0.999), 0.05), ((0.9, 0.95), 0.04)])
def test_updates_are_near_those_by_fp32_moments(betas, admitted):
    """Over 600 steps. Every 100th brings entries whose moments are zero, which then move most."""
    gradients = Gradients(0)
    exact, coded = Run(False, betas), Run(True, betas)
    errors, largest = [], {exact: 0.0, coded: 0.0}
    for step in range(1, 601):
        if step % 100 == 0:
            enters = gradients.entering()
            for tensor in (exact.m, exact.v, coded.m, coded.v):
                tensor[enters] = 0
        grad = gradients.next()
        updates = {run: run.update(grad, step, "native-cpu") for run in (exact, coded)}
        errors.append(((updates[coded] - updates[exact]).norm() / updates[exact].norm()).item())
        largest = {run: max(largest[run], update.abs().max().item()) for run, update in updates.items()}
    mean = sum(errors) / len(errors)
    assert 0.01 < mean <= admitted, f"{mean:.4f} of the updates"
    assert largest[coded] <= 1.5 * largest[exact]


def test_why_roots_are_dithered():
    """With a beta2 of 0.999, a root that is rounded to nearest follows its scale alone.

    Gradients become four times smaller after 1500 steps. 1500 steps later, roots that are rounded
    by the dither are as right as before.
    """
    generator = torch.Generator().manual_seed(1)
    count, beta2 = 1024, 0.999
    positions, exact = torch.arange(count), torch.zeros(count)
    codes = {name: encode_root(exact) for name in ("dithered", "nearest")}
    for step in range(1, 3001):
        square = torch.randn(count, generator=generator).mul(1.0 if step <= 1500 else 0.25).square()
        exact = beta2 * exact + (1 - beta2) * square
        for name, up in (("dithered", dither(positions, step)), ("nearest", 0.5)):
            second = decode(*codes[name]).square()
            codes[name] = encode_root((beta2 * second + (1 - beta2) * square).sqrt(), up)
    ratio = {name: (decode(*code) / exact.sqrt()).log() for name, code in codes.items()}
    assert ratio["dithered"].square().mean().sqrt() < 0.05
    assert ratio["nearest"].square().mean().sqrt() > 0.1


def test_first_moments_need_no_dither():
    """They change by more than a code in a step."""
    generator = torch.Generator().manual_seed(2)
    exact, codes = torch.zeros(1024), encode_first(torch.zeros(1024))
    errors = []
    for _ in range(300):
        grad = torch.randn(1024, generator=generator)
        exact = exact.lerp(grad, 0.1)
        codes = encode_first(decode(*codes).lerp(grad, 0.1))
        errors.append(((decode(*codes) - exact).norm() / exact.norm()).item())
    assert max(errors[100:]) < 0.05
