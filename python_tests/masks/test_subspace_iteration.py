"""Chebyshev-filtered subspace iteration: accurate masks from cold and warm starts.

Matrices are alone or in batches.
"""

from __future__ import annotations

import pytest
import torch
from helpers.spectra import slow_spectrum

from lift_kernels import principal_indices
from lift_kernels.masks import chebyshev, costs, lowrank
from lift_kernels.masks.chebyshev import orthonormalized
from lift_kernels.masks.lowrank import batched_factors, low_rank_factors
from lift_kernels.masks.principal import MaskRequest, principal_masks
from lift_kernels.masks.selection import largest_indices


def exact_mask(weight, rank, k):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    magnitude = (u[:, :rank] * s[:rank] @ vh[:rank]).abs()
    return largest_indices(magnitude, k), magnitude


def quality(indices, weight, rank):
    """The overlap with the exact mask, and the captured share of the best sum of |W_r|."""
    k = len(indices)
    best, magnitude = exact_mask(weight, rank, k)
    flat = magnitude.flatten()
    captured = float(flat[indices.long()].sum() / flat[best.long()].sum())
    return float(torch.isin(indices, best).double().mean()), captured


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (160, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cold_start_is_faithful_where_spectra_are_slow(shape, dtype):
    weight = slow_spectrum(*shape).to(dtype)
    indices = principal_indices(weight, 8, density=0.05, method="chebyshev")
    overlap, captured = quality(indices, weight.float(), 8)
    assert overlap >= 0.95 and captured >= 0.998


def test_the_usual_randomized_svd_would_not_be():
    """The published variant, q = 2r with two iterations, misses the bound of the test above."""
    weight = slow_spectrum(200, 120)
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(weight, q=16, niter=2)
    indices = largest_indices((u[:, :8] * s[:8] @ v[:, :8].T).abs(), 1200)
    assert quality(indices, weight, 8)[0] < 0.8


def test_a_smaller_tolerance_is_more_faithful():
    weight = slow_spectrum(300, 200)
    factors = [low_rank_factors(weight, 8, method="chebyshev", tolerance=t) for t in (1e-2, 1e-5)]
    assert factors[0].passes < factors[1].passes and all(f.converged for f in factors)
    masks = [largest_indices((f.left @ f.right.T).abs(), 3000) for f in factors]
    assert quality(masks[0], weight, 8)[0] < quality(masks[1], weight, 8)[0] > 0.99


def test_products_in_tf32_cost_no_fidelity(monkeypatch):
    """This imitates a GPU: factors of the products lose 13 bits.

    The last product with the matrix is formed in fp32.
    """

    def shortened(x):
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    weight = slow_spectrum(300, 200)
    for tf32 in (False, True):
        if tf32:
            monkeypatch.setattr(chebyshev, "product", lambda a, b: shortened(a) @ shortened(b))
        factors = low_rank_factors(weight, 8, method="chebyshev")
        mask = largest_indices((weight @ factors.right @ factors.right.T).abs(), 3000)
        overlap, captured = quality(mask, weight, 8)
        assert factors.converged and overlap >= 0.985 and captured >= 0.9999


@pytest.fixture
def multiplied_in_bf16(monkeypatch):
    """bf16 matrices are multiplied as on a GPU, without fp32 copies."""
    monkeypatch.setattr(lowrank, "factored_dtype", lambda weight: weight.dtype)


def mask_quality(factors, weight, rank=8):
    mask = largest_indices((factors.left @ factors.right.T).abs(), round(0.05 * weight.numel()))
    return quality(mask, weight.float(), rank)


@pytest.mark.usefixtures("multiplied_in_bf16")
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0**-40])
def test_products_in_bf16_cost_no_fidelity(shape, count, scale):
    weights = [(slow_spectrum(*shape, seed=seed) * scale).bfloat16() for seed in range(count)]
    cold = batched_factors(weights, 8, method="chebyshev")
    warm = batched_factors(weights, 8, method="chebyshev", warm_starts=[f.basis for f in cold])
    for weight, first, second in zip(weights, cold, warm):
        assert (second.method, second.passes) == ("warm", 3) and first.left.dtype == torch.float32
        for factors in (first, second):
            overlap, captured = mask_quality(factors, weight)
            assert factors.converged and overlap >= 0.985 and captured >= 0.9999


@pytest.mark.usefixtures("multiplied_in_bf16")
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_exact_factors_of_bf16_matrices_need_no_fp32_copy(shape, monkeypatch):
    """A Gram matrix of bf16 products has the digits of one in fp32."""
    weight = slow_spectrum(*shape).bfloat16()
    tall = weight[None] if shape[0] > shape[1] else weight.T[None]
    long, short, _ = lowrank._gram(tall, weight.shape, 8)
    exact = low_rank_factors(weight, 8, method="svd")
    left, right = (long[0], short[0]) if shape[0] > shape[1] else (short[0], long[0])
    torch.testing.assert_close(left @ right.T, exact.left @ exact.right.T, atol=1e-5, rtol=0.0)


def test_cpus_multiply_in_fp32():
    assert lowrank.factored_dtype(torch.ones(2, 2).bfloat16()) == torch.float32


def test_a_warm_start_takes_three_passes_after_a_small_change():
    weight = slow_spectrum(200, 120)
    cold = low_rank_factors(weight, 8, method="chebyshev", tolerance=1e-5)
    mask = largest_indices((cold.left @ cold.right.T).abs(), 1200)
    moved = weight.clone()
    moved.view(-1)[mask.long()] += 1e-3 * weight.std() * torch.randn(1200, generator=torch.Generator().manual_seed(1))
    warm = low_rank_factors(moved, 8, method="chebyshev", warm_start=cold.basis)
    assert (warm.method, warm.passes, warm.converged) == ("warm", 3, True)
    assert cold.basis.dtype == torch.bfloat16 and cold.basis.shape == (120, 16)
    overlap, captured = quality(largest_indices((warm.left @ warm.right.T).abs(), 1200), moved, 8)
    assert overlap >= 0.99 and captured >= 0.9999


def test_a_useless_warm_start_is_followed_by_a_cold_one():
    weight = slow_spectrum(300, 200)
    stale = torch.linalg.qr(torch.randn(200, 16, generator=torch.Generator().manual_seed(1))).Q.bfloat16()
    factors = low_rank_factors(weight, 8, method="chebyshev", warm_start=stale)
    cold = low_rank_factors(weight, 8, method="chebyshev")
    assert factors.method == "cold after warm" and factors.converged
    assert torch.equal(factors.left, cold.left) and torch.equal(factors.right, cold.right)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_basis_that_is_not_finite_spoils_nothing(value):
    weight = slow_spectrum(300, 200)
    cold = low_rank_factors(weight, 8, method="chebyshev")
    exact = low_rank_factors(weight, 8, method="svd")
    one = cold.basis.clone()
    one[3, 5] = value
    for broken in (one, torch.full_like(one, value)):
        factors = low_rank_factors(weight, 8, method="chebyshev", warm_start=broken)
        gap = factors.left @ factors.right.T - exact.left @ exact.right.T
        assert factors.converged and factors.basis.isfinite().all()
        assert float(gap.norm()) <= 0.02 * float((exact.left @ exact.right.T).norm())


def test_a_warm_start_solves_one_eigenproblem(monkeypatch):
    """Rayleigh quotients of the basis take the place of the first Ritz values."""
    weight = slow_spectrum(300, 200)
    cold = low_rank_factors(weight, 24, method="chebyshev")
    solved = []
    solve = chebyshev.symmetric_eigen
    monkeypatch.setattr(chebyshev, "symmetric_eigen", lambda gram: solved.append(gram.shape) or solve(gram))
    warm = low_rank_factors(weight, 24, method="chebyshev", warm_start=cold.basis)
    assert (warm.method, warm.passes, solved) == ("warm", 3, [(1, 36, 36)])


def test_cutting_digits_off_stops_no_warm_start_early(monkeypatch):
    """As TF32 does on some GPUs. All energies have the same error, the Rayleigh quotients' too."""

    def cut(x):
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    def product(a, b):
        return cut(a) @ cut(b)

    def lengths(image):
        return product(image.mT, image).diagonal(dim1=1, dim2=2)

    weight = slow_spectrum(300, 200)
    basis = low_rank_factors(weight, 24, method="chebyshev").basis
    moved = weight + 0.008 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    passes = [low_rank_factors(w, 24, method="chebyshev", warm_start=basis).passes for w in (weight, moved)]
    monkeypatch.setattr(chebyshev, "product", product)
    monkeypatch.setattr(chebyshev, "squared_lengths", lengths)
    assert passes == [3, 5]
    assert [low_rank_factors(w, 24, method="chebyshev", warm_start=basis).passes for w in (weight, moved)] == [3, 5]


def test_a_warm_start_may_be_wider_or_narrower_than_a_kept_basis():
    """As in states that were saved when bases had 2 r columns. The next basis has 1.5 r at most."""
    weight = slow_spectrum(300, 200)
    exact = low_rank_factors(weight, 24, method="svd")
    vectors = torch.linalg.svd(weight, full_matrices=False).Vh.T.flip(1).bfloat16()  # in ascending order
    for columns in (48, 36, 24):
        warm = low_rank_factors(weight, 24, method="chebyshev", warm_start=vectors[:, -columns:])
        gap = warm.left @ warm.right.T - exact.left @ exact.right.T
        assert (warm.method, warm.basis.shape) == ("warm", (200, min(columns, 36)))
        assert float(gap.norm()) <= 0.01 * float((exact.left @ exact.right.T).norm())


def test_a_basis_of_equal_columns_does_not_pass_for_a_converged_one():
    """Their Rayleigh quotients would all be the largest, and their sum above the Ritz energy."""
    weight = slow_spectrum(300, 200)
    top = torch.linalg.svd(weight, full_matrices=False).Vh[:1].T.bfloat16()
    factors = low_rank_factors(weight, 8, method="chebyshev", warm_start=top.repeat(1, 16))
    exact = low_rank_factors(weight, 8, method="svd")
    gap = factors.left @ factors.right.T - exact.left @ exact.right.T
    assert factors.converged and float(gap.norm()) <= 0.02 * float((exact.left @ exact.right.T).norm())


def test_an_iteration_that_cannot_settle_says_so(monkeypatch):
    monkeypatch.setattr(lowrank, "MAX_DEGREES", 1)
    factors = low_rank_factors(slow_spectrum(200, 120), 8, method="chebyshev", tolerance=1e-9)
    assert not factors.converged and factors.left.isfinite().all()


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_a_batch_gives_what_each_matrix_gives_alone(shape):
    weights = [slow_spectrum(*shape, seed=seed) for seed in range(4)] + [torch.zeros(shape), torch.ones(shape)]
    bases = [low_rank_factors(weights[0], 5, method="chebyshev").basis, None] * 3
    together = batched_factors(weights, 5, method="chebyshev", warm_starts=bases, tolerance=1e-6)
    for weight, basis, factors in zip(weights, bases, together):
        alone = low_rank_factors(weight, 5, method="chebyshev", warm_start=basis, tolerance=1e-6)
        exact = low_rank_factors(weight, 5, method="svd")
        assert factors.converged and alone.converged
        for found in (factors, alone):  # a batch continues until its last matrix has converged, so they are not equal
            gap = found.left @ found.right.T - exact.left @ exact.right.T
            assert float(gap.norm()) <= 0.02 * float((exact.left @ exact.right.T).norm())


def test_masks_of_many_shapes_keep_their_order():
    shapes = [(40, 60), (60, 40), (40, 60), (30, 30), (40, 60)]
    requests = [MaskRequest(slow_spectrum(*s, seed=i), 4, 50 + i, f"w{i}") for i, s in enumerate(shapes)]
    counted = []
    budget = 2 * costs.factoring_bytes((40, 60), 4, 4)
    masks = principal_masks(requests, memory_budget=budget, on_batch_done=counted.append)
    assert sorted(counted) == [1, 1, 1, 2] and sum(counted) == len(requests)
    for request, mask in zip(requests, masks):
        assert torch.equal(mask.indices, principal_indices(request.weight, 4, request.k)) and mask.seconds > 0


def test_the_generator_decides_and_the_default_repeats():
    weight = slow_spectrum(200, 120)

    def left(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return low_rank_factors(weight, 8, method="chebyshev", generator=generator, tolerance=1e-2).left

    assert torch.equal(left(), left()) and torch.equal(left(7), left(7)) and not torch.equal(left(7), left(8))


HARD = {
    "zero": torch.zeros(40, 60),
    "constant": torch.full((40, 60), 0.5),
    "rank one": torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 61)),
    "one entry": torch.zeros(40, 60).index_put_((torch.tensor(3), torch.tensor(7)), torch.tensor(2.0)),
    "identity": torch.eye(60)[:40],
    "huge and tiny": torch.diag(torch.logspace(-30, 30, 60))[:40],
    "a row": torch.arange(1.0, 61)[None],
    "a column": torch.arange(1.0, 61)[:, None],
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("method", lowrank.METHODS)
@pytest.mark.parametrize("rank", [1, 5, None])
def test_hard_matrices_give_full_lists(name, method, rank):
    """Deficient, tied or of extreme range, each gives exactly k entries and never hangs."""
    weight = HARD[name]
    rank = min(weight.shape) if rank is None else min(rank, *weight.shape)
    for k in {1, 17, weight.numel()}:
        indices = principal_indices(weight, rank, k, method=method)
        assert indices.dtype == torch.int32 and len(indices) == k
        assert bool((indices[1:] > indices[:-1]).all()) and 0 <= indices[0] and indices[-1] < weight.numel()


@pytest.mark.parametrize("method", lowrank.METHODS)
def test_hard_matrices_with_a_known_answer(method):
    assert principal_indices(HARD["zero"], 3, 70, method=method).tolist() == list(range(70))
    assert principal_indices(HARD["one entry"], 3, 1, method=method).tolist() == [187]
    product = HARD["rank one"]
    assert set(principal_indices(product, 1, 3, method=method).tolist()) == set(largest_indices(product, 3).tolist())


@pytest.mark.parametrize("shape", [(50, 3), (40, 8, 5), (7, 40)])
def test_a_basis_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"up_proj: a warm start for shape \(60, 40\) and rank 5 is a floating \(40, l >= 5\)"
    ):
        low_rank_factors(torch.ones(60, 40), 5, warm_start=torch.ones(shape), name="up_proj")


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-3, float("nan")])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1"):
        low_rank_factors(torch.ones(6, 4), 2, tolerance=tolerance)


def test_orthonormalized_blocks_and_the_fallback():
    generator = torch.Generator().manual_seed(0)
    graded = torch.randn(3, 50, 8, generator=generator) * torch.logspace(-12, 12, 8)
    q, other = orthonormalized(graded.clone(), graded.clone())
    assert (q.mT @ q - torch.eye(8)).abs().max() <= 1e-5 and torch.allclose(q, other, atol=1e-6)
    deficient = torch.ones(1, 50, 8)
    q, other = orthonormalized(deficient.clone(), deficient.clone())
    assert other is None and (q.mT @ q - torch.eye(8)).abs().max() <= 1e-5
    assert torch.allclose(q @ (q.mT @ deficient), deficient, atol=1e-5)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_the_basis_of_an_exact_mask_spans_the_top_subspace(shape):
    """It is on the shorter side, as wide as an iterated block, and rounded to bf16."""
    weight = slow_spectrum(*shape)
    basis = low_rank_factors(weight, 8, method="gram").basis
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    top = vh[:16].T if shape[0] > shape[1] else u[:, :16]
    assert basis.dtype == torch.bfloat16 and basis.shape == (300, 16)
    cosines = torch.linalg.svdvals(top.T @ basis.double())
    assert 0.99 <= cosines.min() and cosines.max() <= 1.01
    beyond = basis.double() - top @ (top.T @ basis.double())
    assert beyond.norm(dim=0).max() <= 2.0**-8  # 2^-9 from rounding to bf16, the rest for fp32 eigenvectors


def test_a_refresh_after_an_exact_mask_stays_warm():
    """`auto` takes the exact method first, then iterates from its basis in the fewest passes."""
    weight = slow_spectrum(300, 300)
    [first] = principal_masks([MaskRequest(weight, 40, 4500)])
    moved = weight.clone()
    moved.view(-1)[first.indices.long()] += (
        1e-3 * weight.std() * torch.randn(4500, generator=torch.Generator().manual_seed(1))
    )
    [second] = principal_masks([MaskRequest(moved, 40, 4500, basis=first.basis, threshold=first.threshold)])
    assert (first.method, second.method, second.passes, second.converged) == ("gram", "warm", 3, True)
    assert first.basis.shape == second.basis.shape == (300, 60)
    overlap, captured = quality(second.indices, moved, 40)
    assert overlap >= 0.99 and captured >= 0.9999
