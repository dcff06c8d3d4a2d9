"""Refreshes by Chebyshev iteration: at real shapes on a GPU, small ones on the CPU."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
import torch
from helpers.bits import BF16, FP32, bits
from helpers.tensor_accounts import PeakBytes
from torch import Tensor, nn

from bench.common.fake_cuda import FakeCuda
from bench.gpu_parts.masks import slow_spectrum
from lift_kernels import LiftAdamW
from lift_kernels.masks import costs
from lift_kernels.masks.principal import Mask, MaskRequest, principal_masks


@dataclass(frozen=True)
class Place:
    """Where a test runs, and the sizes there."""

    device: str
    shape: tuple[int, int]
    ranks: tuple[int, int]


PLACES = [
    pytest.param(Place("cpu", (280, 600), (8, 16)), id="cpu"),
    pytest.param(Place("cuda", (1024, 2816), (32, 128)), id="gpu", marks=pytest.mark.gpu),
]
everywhere = pytest.mark.parametrize("place", PLACES)


def matrices(place: Place, rank: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    generator = torch.Generator(place.device).manual_seed(rank)
    return [slow_spectrum(*place.shape, rank, generator).to(dtype) for _ in range(count)]


def k_of(weight: Tensor) -> int:
    return weight.numel() // 20


def masks(weights: list[Tensor], rank: int, method: str, before: list[Mask] | None = None) -> list[Mask]:
    warm = [{} if before is None else {"basis": m.basis, "threshold": m.threshold} for m in before or weights]
    requests = [MaskRequest(w, rank, k_of(w), f"w{i}", **warm[i]) for i, w in enumerate(weights)]
    return principal_masks(requests, method=method, memory_budget=2**31)


def overlap(found: Tensor, exact: Tensor) -> float:
    return float(torch.isin(found, exact).double().mean())


def assert_same_masks(found: list[Mask], expected: list[Mask]) -> None:
    for one, other in zip(found, expected):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.threshold, other.threshold)
        assert torch.equal(bits(one.basis), bits(other.basis)) and one[3:6] == other[3:6]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "tall"])
@pytest.mark.parametrize("which", [0, 1], ids=["low rank", "high rank"])
@everywhere
def test_masks_of_several_matrices(place, which, wide, dtype):
    """Cold, and then warm from weights that moved: near the exact masks, and the same twice."""
    rank = place.ranks[which]
    weights = matrices(place, rank, dtype)
    weights = weights if wide else [w.T.contiguous() for w in weights]
    cold = masks(weights, rank, "chebyshev")
    assert_same_masks(masks(weights, rank, "chebyshev"), cold)
    generator = torch.Generator(place.device).manual_seed(7)
    noise = [torch.randn(w.shape, generator=generator, device=place.device) for w in weights]
    moved = [w + (0.02 * w.float().std() * n).to(dtype) for w, n in zip(weights, noise)]
    warm = masks(moved, rank, "chebyshev", cold)
    assert_same_masks(masks(moved, rank, "chebyshev", cold), warm)
    for found, present, method in ((cold, weights, "chebyshev"), (warm, moved, "warm")):
        for mask, exact, weight in zip(found, masks(present, rank, "gram"), present):
            index = mask.indices.long()
            assert (mask.method, mask.converged, len(index)) == (method, True, k_of(weight))
            assert bool((index[1:] > index[:-1]).all()) and 0 <= int(index[0]) and int(index[-1]) < weight.numel()
            assert overlap(mask.indices, exact.indices) >= 0.99
            assert mask.basis.device == weight.device and mask.basis.dtype == BF16
    assert max(overlap(a.indices, b.indices) for a, b in zip(cold, warm)) < 1, "the masks were to change"


def trained(place: Place, warm_start: str | None) -> tuple[list[nn.Parameter], LiftAdamW]:
    weights = [nn.Parameter(w) for w in matrices(place, place.ranks[0], BF16)]
    options = dict(lr=1e-4, rank=place.ranks[0], mask_method="chebyshev", refresh_interval=None)
    return weights, LiftAdamW(weights, warm_start=warm_start, **options)


def step(weights: list[nn.Parameter], optimizer: LiftAdamW, number: int) -> None:
    generator = torch.Generator(weights[0].device).manual_seed(number)
    for w in weights:
        w.grad = torch.randn(w.shape, generator=generator, device=w.device).to(w.dtype)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("warm_start", ["device", "cpu"])
@everywhere
def test_refreshes_of_a_run_that_goes_on_from_the_host(place, warm_start):
    """Bases may be kept there. A state loaded to the CPU gives the bits of a run without it."""
    weights, optimizer = trained(place, warm_start)
    step(weights, optimizer, 0)
    assert {m.method for m in optimizer.last_refresh.matrices} == {"chebyshev"}
    kept = place.device if warm_start == "device" else "cpu"
    assert {optimizer.state[w][key].device.type for w in weights for key in ("basis", "threshold")} == {kept}
    step(weights, optimizer, 1)

    file = io.BytesIO()
    torch.save({"weights": [w.detach() for w in weights], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    other, loaded = trained(place, warm_start)
    for w, value in zip(other, saved["weights"]):
        w.data.copy_(value)
    loaded.load_state_dict(saved["optimizer"])
    assert {loaded.state[w]["basis"].device.type for w in other} == {kept}
    assert {loaded.state[w][key].device.type for w in other for key in ("step", "indices", "master")} == {place.device}

    for one, run in ((weights, optimizer), (other, loaded)):
        step(one, run, 2)
        run.refresh()
        assert {m.method for m in run.last_refresh.matrices} == {"warm"} and run.last_refresh.overlap > 0.5
        step(one, run, 3)
    for w, o in zip(weights, other):
        assert torch.equal(bits(w.detach()), bits(o.detach()))
        for key, value in optimizer.state[w].items():
            assert torch.equal(bits(value), bits(loaded.state[o][key])), key


def test_the_exact_method_holds_the_memory_budget():
    """On fake CUDA tensors: copies, Gram matrices and their vectors, of as many as fit."""
    each = costs.factoring_bytes((1024, 1024), 32, 2, "gram")
    assert each == (2 + 12) * 2**20 and costs.factoring_bytes((1024, 1024), 32, 2) == (2 + 1.5) * 2**20
    with FakeCuda():
        weights = [torch.zeros(1024, 1024, dtype=BF16, device="cuda") for _ in range(8)]
        requests, sizes = [MaskRequest(weight, 32, 100) for weight in weights], []
        with PeakBytes(1024 * 1024) as account:
            principal_masks(requests, method="gram", memory_budget=2 * each, on_batch_done=sizes.append)
    assert sizes == [2, 2, 2, 2] and 2 * 2 * 2**22 <= account.peak <= 2 * each
