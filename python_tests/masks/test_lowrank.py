"""Low-rank factors: the best rank-r approximation by either method, at any scale.

Errors name the weight.
"""

from __future__ import annotations

import pytest
import torch
from helpers.spectra import truncated, with_spectrum
from torch.testing import assert_close

from lift_kernels.masks.lowrank import METHODS, low_rank_factors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (24, 24), (1, 9), (9, 1)])
def test_factors_are_the_truncated_svd(method, shape):
    m, n = shape
    weight = with_spectrum(m, n, [2.0 * 0.7**i for i in range(min(m, n))])
    for rank in {1, min(3, m, n), min(m, n)}:
        left, right, *_ = low_rank_factors(weight, rank, method=method, tolerance=1e-12)
        assert (left.shape, right.shape, left.dtype, right.dtype) == (
            (m, rank),
            (n, rank),
            torch.float32,
            torch.float32,
        )
        # The Ritz energy is flat at its maximum. In fp32 it stalls while the vectors still have an
        # error of about 1e-5.
        atol = (1e-5 if method == "chebyshev" else 2e-6) * 2.0
        assert_close((left @ right.T).double(), truncated(weight, rank), rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_beyond_the_true_rank_gives_the_matrix_back(method):
    weight = with_spectrum(40, 25, [3.0, 1.0])
    left, right, *_ = low_rank_factors(weight, 10, method=method, tolerance=1e-12)
    assert_close(left @ right.T, weight, rtol=0, atol=2e-6 * 3.0)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zero(method):
    left, right, *_ = low_rank_factors(torch.zeros(6, 8), 3, method=method, tolerance=1e-12)
    assert torch.equal(left @ right.T, torch.zeros(6, 8))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-60, 2.0**70, 2.0**120])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method, scale):
    """Squares of such entries leave the range of fp32; the approximation must not."""
    weight = with_spectrum(20, 30, [1.0, 0.5, 0.25, 0.1, 0.05])
    left, right, *_ = low_rank_factors(weight * scale, 2, method=method, tolerance=1e-12)
    assert_close((left @ right.T) / scale, truncated(weight, 2).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_computed_in_fp32(dtype):
    weight = with_spectrum(20, 30, [1.0, 0.5, 0.25]).to(dtype)
    factors = low_rank_factors(weight, 2)[:2]
    for actual, expected in zip(factors, low_rank_factors(weight.float(), 2)[:2]):
        assert torch.equal(actual, expected)


def test_the_weight_is_not_changed_and_needs_no_gradient():
    weight = torch.nn.Parameter(with_spectrum(20, 30, [1.0, 0.5, 0.25]))
    before, version = weight.detach().clone(), weight._version
    assert not any(factor.requires_grad for factor in low_rank_factors(weight, 2)[:2])
    assert torch.equal(weight, before) and weight._version == version


@pytest.mark.parametrize("rank", [0, -1, 5, 2.0, None])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=rf"layer\.weight: rank must be an integer .* smaller side, 4, got {rank}"):
        low_rank_factors(torch.ones(4, 6), rank, name="layer.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(value):
    weight = torch.ones(4, 6)
    weight[1, 2] = weight[3, 0] = value
    with pytest.raises(ValueError, match=r"layer\.weight: 2 non-finite weights, the first at flat index 8"):
        low_rank_factors(weight, 2, name="layer.weight")


def test_an_unknown_method_and_a_vector_are_refused():
    with pytest.raises(ValueError, match="unknown method 'magic'; choose one of auto, gram, chebyshev, svd"):
        low_rank_factors(torch.ones(4, 6), 2, method="magic")
    with pytest.raises(ValueError, match=r"layer\.bias: a matrix is needed, got shape \(4,\)"):
        low_rank_factors(torch.ones(4), 1, name="layer.bias")
