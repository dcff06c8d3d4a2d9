"""What it costs to factor matrices: the method that is predicted to be faster, memory, copies."""

from __future__ import annotations

import pytest
import torch
from helpers.spectra import slow_spectrum
from helpers.tensor_accounts import PeakBytes
from torch.torch_version import TorchVersion

from lift_kernels.masks import costs, lowrank
from lift_kernels.masks.lowrank import batched_factors, low_rank_factors
from lift_kernels.masks.principal import MaskRequest, principal_masks


def test_auto_takes_what_is_predicted_to_be_faster():
    assert costs.cheapest_method((192, 576), 64) == "gram"
    assert costs.cheapest_method((4096, 11008), 64) == "chebyshev"
    assert costs.cheapest_method((576, 576), 64) == "gram"
    assert costs.cheapest_method((576, 576), 64, warm=True) == "chebyshev"
    # Measured, as multiples of the time of the exact method: 2.9, 3.0, 2.7, 2.2, 1.9 and 1.2.
    for shape, rank in (
        ((512, 257), 100),
        ((448, 600), 192),
        ((384, 384), 160),
        ((1024, 384), 160),
        ((1536, 512), 200),
        ((300, 11008), 80),
    ):
        assert costs.cheapest_method(shape, rank, warm=True) == "gram"
    assert low_rank_factors(slow_spectrum(60, 50), 4).method == "gram"
    # Eigenproblems are dear on a GPU, but a cold start would have a block of all 576 directions.
    assert costs.cheapest_method((576, 576), 200, warm=True, device="cuda") == "chebyshev"
    assert costs.cheapest_method((576, 576), 288, warm=True, device="cuda") == "gram"


@pytest.mark.parametrize(("version", "together"), [("2.11.0+cu130", False), ("2.12.0", True)])
def test_the_method_follows_from_how_torch_solves_eigenproblems(version, together, monkeypatch):
    """Before torch 2.12 those of sides above 512 are solved one by one, which takes longer."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    for side, alone in ((128, False), (512, False), (513, not together)):
        cost = 9.0e9 * side if alone else 3.9e9 * side / 32 + 600 * side**3
        assert costs._eigh_flops(side, "cuda") == cost
    assert costs._eigh_flops(4096, "cuda") == pytest.approx(600 * 4096**3, rel=0.02)
    method = costs.cheapest_method((600, 600), 150, device="cuda")  # a block of 300
    assert method == ("gram" if together else "chebyshev")
    assert costs._eigh_flops(100, "cpu") == 12e6


def test_eigenproblems_cost_what_was_measured_on_a_card():
    """An H100 at 412 TFLOP/s: 3.44 ms for 32 of side 256, 1.12 for 32 of side 128, 95 for 4096."""
    for side, measured in ((256, 3.44e-3), (128, 1.12e-3)):
        assert 32 * costs._eigh_flops(side, "cuda, together") / 412e12 == pytest.approx(measured, rel=0.2)
    for side, measured in ((256, 4.92e-3), (512, 13.5e-3), (4096, 95.2e-3)):
        assert costs._eigh_flops(side, "cuda, one by one") / 412e12 == pytest.approx(measured, rel=0.2)


def test_a_state_keeps_a_place_for_a_basis_wherever_some_device_leaves_one():
    shapes = [(576, 576), (1536, 576), (600, 600), (4096, 1024), (256, 4096), (300, 300)]
    for shape in shapes:
        for rank in (8, 64, 150, 250):
            kinds = [
                costs.cheapest_method(shape, rank, warm=True, device=d) for d in ("cpu", "cuda", *costs._EIGH_FLOPS)
            ]
            assert costs.may_leave_basis(shape, rank) == ("chebyshev" in kinds)


def test_a_batch_holds_the_memory_budget(monkeypatch):
    """Copies and blocks of as many matrices as fit, at least one."""
    sizes = []
    requests = [MaskRequest(slow_spectrum(60, 40, seed=i), 4, 50) for i in range(5)]
    each = 4 * 60 * 40 + 12 * costs.block_width((60, 40), 4) * 100
    assert each == costs.factoring_bytes((60, 40), 4, 4)
    for budget in (0, each, 2 * each - 1, 2 * each, 5 * each):
        sizes.append([])
        principal_masks(requests, memory_budget=budget, on_batch_done=sizes[-1].append)
    assert sizes == [[1] * 5, [1] * 5, [1] * 5, [2, 2, 1], [5]]


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-40])
@pytest.mark.parametrize("count", [1, 3])
def test_fp32_copies_of_a_batch_exist_once(shape, scale, count):
    """The memory budget holds, also where a cold start follows a warm one."""
    weights = [(slow_spectrum(*shape, seed=seed) * scale).bfloat16() for seed in range(count)]
    stale = torch.eye(300, 16)
    with PeakBytes(300 * 400) as account:
        factors = batched_factors(weights, 8, method="chebyshev", warm_starts=[stale] * count)
    assert account.peak == count * 4 * 300 * 400
    assert {f.method for f in factors} == {"cold after warm"}


def test_a_single_fp32_matrix_is_not_copied():
    weights = [slow_spectrum(300, 400), slow_spectrum(400, 300)]
    with PeakBytes(300 * 400) as account:
        for weight in weights:
            low_rank_factors(weight, 8, method="chebyshev")
    assert account.peak == 0


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_holds_the_bits_of_its_matrices(shape, dtype):
    weights = [(slow_spectrum(*shape, seed=seed) * 2.0**-40).to(dtype) for seed in range(3)]
    units = [1.0, 2.0**40, 2.0**39]
    before = [weight.clone() for weight in weights]
    batch = lowrank._tall_batch(weights, units)
    assert torch.equal(batch, torch.stack([lowrank._tall(w, unit) for w, unit in zip(weights, units)]))
    lies = batch if shape[0] >= shape[1] else batch.mT  # as the matrices do, so that copies are fast
    assert lies.is_contiguous() and all(map(torch.equal, weights, before))
