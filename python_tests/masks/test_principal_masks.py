"""Masks: exactly k entries of largest |W_r|, and k from densities and budgets.

Ties go to the lower position.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.spectra import assert_index_list, assert_principal, stable_top, truncated, with_spectrum

from lift_kernels import ops, principal_indices
from lift_kernels.masks.budget import entry_count
from lift_kernels.masks.lowrank import low_rank_factors
from lift_kernels.masks.principal import MaskRequest, principal_masks
from lift_kernels.masks.selection import largest_indices, random_indices
from lift_kernels.ops import threshold_bracket


@pytest.mark.parametrize("method", ["auto", "gram", "svd"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 33), (200, 7), (7, 200)])
def test_mask_equals_svd_and_stable_sort(method, shape):
    weight = with_spectrum(*shape, [0.8**i for i in range(min(shape))], seed=sum(shape))
    for rank, k in ((1, 17), (5, 1), (5, 150), (min(shape), 60), (3, weight.numel())):
        expected = stable_top(truncated(weight, rank).abs(), k)
        assert torch.equal(principal_indices(weight, rank, k, method=method), expected)


def test_rank_changes_the_mask():
    """A check of the truth itself: low rank, full rank and magnitude choose different entries."""
    weight = with_spectrum(40, 60, [0.95**i for i in range(40)])
    masks = [principal_indices(weight, rank, 100) for rank in (2, 20, 40)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert torch.equal(masks[2], stable_top(weight.abs(), 100))


@pytest.mark.parametrize("shape", [(1, 12), (12, 1)])
def test_ties_go_to_the_lower_position(shape):
    """The rank-1 approximation of a vector is exact, so equal magnitudes tie to the bit."""
    vector = torch.tensor([1.0, -2.0, 2.0, 0.5, 2.0, -1.0, 1.0, 2.0, -2.0, 0.0, 1.0, -0.5]).reshape(shape)
    for k, expected in ((1, [1]), (3, [1, 2, 4]), (6, [0, 1, 2, 4, 7, 8]), (8, [0, 1, 2, 4, 5, 6, 7, 8])):
        assert principal_indices(vector, 1, k).tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 47, 48])
def test_all_zero_and_all_equal(k):
    assert principal_indices(torch.zeros(6, 8), 2, k).tolist() == list(range(k))
    assert largest_indices(torch.full((6, 8), 0.25), k).tolist() == list(range(k))
    assert_index_list(principal_indices(torch.full((6, 8), 0.25), 2, k), k, 48)


def test_largest_indices_with_many_duplicates():
    generator = torch.Generator().manual_seed(3)
    magnitude = torch.randint(0, 5, (30, 40), generator=generator).float()
    for k in (1, 2, 250, 600, 1199, 1200):
        assert torch.equal(largest_indices(magnitude, k), stable_top(magnitude, k))


def test_duplicate_rows_capture_the_best_magnitude():
    weight = with_spectrum(10, 12, [0.5**i for i in range(10)]).repeat(2, 1)
    magnitude = truncated(weight, 3).abs().flatten()
    indices = principal_indices(weight, 3, 50)
    assert_principal(indices, weight, 3, 50)
    best = magnitude.sort(descending=True).values[:50].sum()
    assert magnitude[indices.long()].sum() >= best * (1 - 1e-6)


def test_rank_deficient():
    weight = with_spectrum(30, 20, [2.0, 1.0])
    assert torch.equal(principal_indices(weight, 8, 90), stable_top(truncated(weight, 2).abs(), 90))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    weight = with_spectrum(40, 30, [0.7**i for i in range(30)]).to(dtype)
    expected = stable_top(truncated(weight, 6).abs(), 100)
    assert torch.equal(principal_indices(weight, 6, 100), expected)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (300, 270)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_is_the_matrix_itself(shape, dtype):
    """The largest entries of W_r are those of W, and nothing is factored."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    factors = low_rank_factors(weight, min(shape))
    assert (factors.method, factors.passes, factors.basis) == ("full rank", 0, None)
    assert torch.equal(factors.left @ factors.right.T, weight.float())
    k = weight.numel() // 20
    assert torch.equal(principal_indices(weight, min(shape), k), stable_top(weight.float().abs(), k))
    masks = principal_masks([MaskRequest(weight, min(shape), k), MaskRequest(2 * weight, min(shape), k)])
    assert torch.equal(masks[0].indices, masks[1].indices) and masks[1].threshold == 2 * masks[0].threshold


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (32, 32)])
def test_transposed_weight_gives_the_transposed_mask(shape):
    m, n = shape
    weight = with_spectrum(m, n, [0.8**i for i in range(min(m, n))])
    for transposed in (weight.T, weight.T.contiguous()):
        position = principal_indices(transposed, 5, 120).long()
        back = (position % m * n + position // m).sort().values.int()
        assert torch.equal(back, principal_indices(weight, 5, 120))


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**90])
def test_scale_does_not_change_the_mask(scale):
    weight = with_spectrum(30, 50, [0.8**i for i in range(30)])
    assert torch.equal(principal_indices(weight * scale, 5, 120), principal_indices(weight, 5, 120))


def test_same_input_same_mask():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(principal_indices(weight, 9, 200), principal_indices(weight.clone(), 9, 200))


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        ({"k": 1}, 1),
        ({"k": 300}, 300),
        ({"density": 1.0}, 300),
        ({"density": 0.05}, 15),
        ({"density": 0.051}, 15),  # 15.3
        ({"density": 0.053}, 16),  # 15.9
        ({"density": 1e-9}, 1),  # at least one
        ({"budget_rank": 1}, 40),
        ({"budget_rank": 7}, 280),
        ({"budget_rank": 8}, 300),  # fewer than 320 exist
    ],
)
def test_how_many_entries(request_, count):
    weight = with_spectrum(10, 30, [0.5**i for i in range(10)])
    assert entry_count(weight.shape, **request_) == count
    assert_index_list(principal_indices(weight, 4, **request_), count, 300)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "give exactly one of k, density and budget_rank, got none"),
        ({"k": 3, "density": 0.1}, "give exactly one of k, density and budget_rank, got k and density"),
        ({"density": 0.1, "budget_rank": 2}, "give exactly one of .* got density and budget_rank"),
        ({"k": 0}, "k must be .* 1 to 24, got 0"),
        ({"k": 25}, "k must be .* 1 to 24, got 25"),
        ({"k": 2.5}, "k must be .* 1 to 24, got 2.5"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": -0.1}, r"density must be in \(0, 1\], got -0.1"),
        ({"density": 1.01}, r"density must be in \(0, 1\], got 1.01"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
        ({"budget_rank": 0}, "budget_rank must be .* got 0"),
        ({"budget_rank": 1.5}, "budget_rank must be .* got 1.5"),
    ],
)
def test_a_bad_count_is_refused(request_, message):
    with pytest.raises(ValueError, match=rf"^mlp\.up: {message}"):
        principal_indices(torch.ones(4, 6), 2, **request_, name="mlp.up")


@pytest.mark.parametrize(
    ("weight", "rank", "message"),
    [
        (torch.ones(4, 6), 5, "rank must be an integer from 1 to the smaller side, 4, got 5"),
        (torch.ones(4, 6), 0, "rank must be .* got 0"),
        (torch.ones(2, 3, 4), 1, r"a matrix is needed, got shape \(2, 3, 4\)"),
        (
            torch.ones(4, 6).index_fill(1, torch.tensor(2), torch.nan),
            2,
            "4 non-finite weights, the first at flat index 2",
        ),
        (torch.ones(1).expand(65536, 32768), 2, r"a matrix may have up to 2\^31-1 entries, got 65536 x 32768"),
        (torch.empty(65536, 32768, device="meta"), 2, r"a matrix may have up to 2\^31-1 entries, got 65536 x 32768"),
    ],
)
def test_a_bad_weight_is_refused(weight, rank, message):
    with pytest.raises(ValueError, match=rf"^mlp\.up: {message}"):
        principal_indices(weight, rank, density=0.5, name="mlp.up")


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'magic'; choose one of auto, gram, chebyshev, svd"):
        principal_indices(torch.ones(4, 6), 2, 3, method="magic")


def test_masks_of_a_batch_are_those_of_each_matrix(backend):
    """They are made together.

    Brackets are sampled, right or wrong, and one matrix has another k.
    """
    weights = [with_spectrum(60, 90, [0.9**i for i in range(60)], seed=seed) for seed in range(4)]
    requests = [MaskRequest(weight.to(backend.device), 6, k) for weight, k in zip(weights, (270, 270, 270, 500))]
    alone = principal_masks(requests, method="gram", memory_budget=0, backend=backend.name)
    near, far = alone[1].threshold, torch.tensor(1e9, device=backend.device)
    requests[1:3] = [replace(r, threshold=threshold) for r, threshold in zip(requests[1:3], (near, far))]
    sizes: list[int] = []
    together = principal_masks(
        requests, method="gram", memory_budget=2**30, backend=backend.name, on_batch_done=sizes.append
    )
    assert sizes == [4]
    for mask, one, request in zip(together, alone, requests):
        assert_index_list(mask.indices, request.k, 60 * 90)
        assert mask.threshold.shape == () and torch.allclose(mask.threshold, one.threshold, rtol=1e-4)
        assert torch.isin(mask.indices, one.indices).double().mean() > 0.99


@pytest.mark.parametrize("known", [(), (0, 1, 2, 3), (1, 3), (0,)])
def test_each_matrix_of_a_batch_gets_its_own_bracket(known, monkeypatch):
    """Around its last threshold, or sampled. Without any threshold the op samples them."""
    weights = [float(i + 1) * with_spectrum(60, 90, [0.9**i for i in range(60)], seed=i) for i in range(4)]
    requests = [MaskRequest(weight, 6, 270) for weight in weights]
    thresholds = [mask.threshold for mask in principal_masks(requests, method="gram")]
    requests = [replace(r, threshold=thresholds[i] if i in known else None) for i, r in enumerate(requests)]
    given = []
    select = ops.lowrank_topk

    def recorded(left, right, k, *, bracket, backend):
        given.append((left, right, bracket))
        return select(left, right, k, bracket=bracket, backend=backend)

    monkeypatch.setattr(ops, "lowrank_topk", recorded)
    principal_masks(requests, method="gram", memory_budget=2**30)
    ((lefts, rights, brackets),) = given
    if not known:
        assert brackets is None
        return
    for i, (left, right, bracket) in enumerate(zip(lefts, rights, brackets)):
        around, drawn = threshold_bracket.around(thresholds[i]), threshold_bracket.sampled(left, right, 270)
        assert torch.equal(bracket, around if i in known else drawn)


def test_random_indices():
    first = random_indices(1000, 70, 5, torch.device("cpu"))
    assert_index_list(first, 70, 1000)
    assert torch.equal(first, random_indices(1000, 70, 5, torch.device("cpu")))
    assert not torch.equal(first, random_indices(1000, 70, 6, torch.device("cpu")))
    assert random_indices(9, 9, 0, torch.device("cpu")).tolist() == list(range(9))
    hits = torch.zeros(50)
    for seed in range(400):
        hits[random_indices(50, 10, seed, torch.device("cpu")).long()] += 1
    assert hits.min() > 40 and hits.max() < 125  # 80 expected, standard deviation 8
