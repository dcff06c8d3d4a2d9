"""`lowrank_topk`: exactly k sorted positions of the largest |L R^T|, on every backend.

The bracket does not change the result.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.spectra import whole_factors

from lift_kernels import ops
from lift_kernels.ops import dispatch, threshold_bracket
from lift_kernels.ops.reference import lowrank_topk_ref

SHAPES = [(1, 1, 1), (1, 300, 1), (300, 1, 2), (7, 5, 3), (64, 64, 16)]
SHAPES += [(65, 129, 5), (130, 70, 33), (50, 200, 20), (60, 70, 48), (40, 150, 64)]


def check(backend, left, right, k, bracket=None):
    """Check that positions and threshold equal those of the reference."""
    expected, threshold = lowrank_topk_ref(left, right, k)
    device = backend.device
    bracket = None if bracket is None else torch.tensor(bracket, dtype=torch.float32, device=device)
    indices, found = ops.lowrank_topk(left.to(device), right.to(device), k, bracket=bracket, backend=backend.name)
    assert indices.dtype == torch.int32 and torch.equal(indices.cpu(), expected)
    assert found.dtype == torch.float32 and found.shape == ()
    assert torch.equal(found.cpu(), threshold) or bool(found.isnan() & threshold.isnan())


@pytest.mark.parametrize("m, n, rank", SHAPES)
def test_lowrank_topk_of_whole_numbers(backend, m, n, rank):
    left, right = whole_factors(m, n, rank)
    for k in sorted({1, min(3, m * n), max(1, m * n // 20), max(1, m * n - 1), m * n}):
        check(backend, left, right, k)


@pytest.mark.parametrize(
    "low, high",
    [
        (0.0, float("inf")),
        (0.0, 0.0),
        (1e9, 2e9),
        (0.0, 1e-9),
        (5.0, 5.0),
        (9.0, 2.0),
        (float("nan"), float("nan")),
        (3.0, 12.0),
    ],
)
def test_lowrank_topk_with_any_bracket(backend, low, high):
    """It may hold the answer, miss it, be empty, reversed or NaN: the answer is the same."""
    left, right = whole_factors(70, 90, 4)
    for k in (1, 200, 6300):
        check(backend, left, right, k, (low, high))


@pytest.mark.parametrize("value", [0.0, -0.0, 0.25])
def test_lowrank_topk_where_all_are_equal(backend, value):
    """Ties everywhere go to the lowest positions."""
    left, right = torch.full((20, 2), value), torch.ones(33, 2)
    for k in (1, 64, 65, 660):
        check(backend, left, right, k)
        check(backend, left, right, k, (2 * value, 2 * value + 1))


@pytest.mark.parametrize("bracket", [None, (5.0, 6.0), (0.5, 2.0)])
def test_lowrank_topk_tells_neighbors_apart(backend, bracket):
    """Entries of the next larger number come first, whatever their positions."""
    left = torch.ones(70, 1)
    left[50:] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for k in (60, 61, 90):
        check(backend, left, torch.ones(3, 1), k, bracket)


def test_lowrank_topk_orders_nan_above_infinity(backend):
    left, right = whole_factors(40, 30, 2)
    left[3, 0], left[5, 1] = float("nan"), float("inf")
    right[:, 1] = right[:, 1].abs() + 1  # no inf * 0
    for k in (10, 30, 45, 60, 90):
        check(backend, left, right, k)


def test_lowrank_topk_of_one_dominating_entry(backend):
    """The magnitudes cover the whole range of fp32."""
    generator = torch.Generator().manual_seed(3)
    left = torch.exp2(torch.randint(-60, 60, (80, 1), generator=generator).float())
    right = torch.exp2(torch.randint(-60, 60, (50, 1), generator=generator).float())
    for k in (1, 2, 100, 2000, 4000):
        check(backend, left, right, k)


@pytest.mark.parametrize("m, n, rank", [(90, 130, 24), (200, 64, 64)])
def test_lowrank_topk_of_real_numbers(backend, m, n, rank):
    """Positions may differ from the reference only by rounding.

    Each entry that differs must lie within rounding of the threshold.
    """
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, rank, generator=generator) for size in (m, n))
    k = round(0.05 * m * n)
    indices, threshold = ops.lowrank_topk(left.to(backend.device), right.to(backend.device), k, backend=backend.name)
    indices = indices.cpu().long()
    assert len(indices) == k and bool((indices[1:] > indices[:-1]).all()) and 0 <= indices[0] and indices[-1] < m * n
    exact = (left.double() @ right.double().T).abs().flatten()
    limit = exact.sort(descending=True).values[k - 1]
    margin = 1e-5 * float(exact.max())
    chosen = torch.zeros(m * n, dtype=torch.bool)
    chosen[indices] = True
    assert bool((exact[chosen] >= limit - margin).all()) and bool((exact[~chosen] <= limit + margin).all())
    assert abs(float(threshold) - float(limit)) <= margin


def test_lowrank_topk_is_deterministic(backend):
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(size, 9, generator=generator).to(backend.device) for size in (150, 140))
    first = ops.lowrank_topk(left, right, 1000, backend=backend.name)
    threshold = first[1]
    for bracket in (None, threshold_bracket.around(threshold), torch.zeros(2, device=backend.device)):
        again = ops.lowrank_topk(left, right, 1000, bracket=bracket, backend=backend.name)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("rank, wide", [(16, False), (32, True), (48, False), (64, True)])
def test_all_passes_over_a_product_take_the_same_steps(backend, monkeypatch, rank, wide):
    """A bracket that misses makes passes of each kind."""
    if backend.name != "triton":
        return
    from lift_kernels.ops.triton import lowrank_topk as launcher

    given, asked = launcher.lowrank_options, []
    monkeypatch.setattr(launcher, "lowrank_options", lambda card, **case: asked.append(case) or given(card, **case))
    check(backend, *whole_factors(50, 60, rank), 100, bracket=[1e6, 2e6])
    assert {case["wide"] for case in asked} == {wide} and {case["histogram"] for case in asked} == {False, True}


@pytest.mark.parametrize("m, n", [(70, 90), (300, 1), (1, 65)])
def test_lowrank_topk_of_a_batch(backend, m, n):
    """Each matrix gives the result it has alone.

    Its bracket may be right, miss the answer, or not be given.
    """
    pairs = [tuple(whole_factors(m, n, 4, seed)) for seed in range(3)]
    left, right = (torch.stack(factors).to(backend.device) for factors in zip(*pairs))
    for k in (1, m * n // 7 + 1, m * n):
        alone = [lowrank_topk_ref(*pair, k) for pair in pairs]
        brackets_given = torch.stack(
            [threshold_bracket.around(alone[0][1]), torch.tensor([1e9, 2e9]), torch.tensor([0.0, float("inf")])]
        )
        for bracket in (None, brackets_given):
            given = None if bracket is None else bracket.to(backend.device)
            indices, thresholds = ops.lowrank_topk(left, right, k, bracket=given, backend=backend.name)
            assert indices.shape == (3, k) and thresholds.shape == (3,)
            assert torch.equal(indices.cpu(), torch.stack([found for found, _ in alone]))
            assert torch.equal(thresholds.cpu(), torch.stack([threshold for _, threshold in alone]))


@pytest.mark.gpu
def test_lowrank_topk_by_default_on_a_gpu():
    """The answer does not depend on which `bitmap_to_indices` runs there."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(3, size, 20, generator=generator).cuda() for size in (1100, 700))
    found = [ops.lowrank_topk(left, right, 38500, backend=backend) for backend in (None, "triton")]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_lowrank_topk_of_no_matrix(backend):
    left, right = torch.ones(0, 5, 2, device=backend.device), torch.ones(0, 7, 2, device=backend.device)
    for bracket in (None, torch.ones(0, 2, device=backend.device)):
        indices, thresholds = ops.lowrank_topk(left, right, 4, bracket=bracket, backend=backend.name)
        assert indices.shape == (0, 4) and indices.dtype == torch.int32 and thresholds.shape == (0,)


def test_sampled_bracket_holds_the_threshold():
    """This holds for dense and sparse selections, and the bracket is always the same."""
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(300, 6, generator=generator) * torch.randn(300, 1, generator=generator).mul_(0.45).exp_()
    right = torch.randn(400, 6, generator=generator)
    for k in (1, 100, 6000, 60000, 119999, 120000):
        low, high = threshold_bracket.sampled(left, right, k).tolist()
        threshold = float(lowrank_topk_ref(left, right, k)[1])
        assert low <= threshold < high
        assert torch.equal(threshold_bracket.sampled(left, right, k), threshold_bracket.sampled(left, right, k))
    low, high = threshold_bracket.sampled(left, right, 6000).tolist()
    inside = ((left @ right.T).abs() >= low) & ((left @ right.T).abs() < high)
    assert inside.sum() < 0.6 * 6000, "a bracket that holds nearly everything saves nothing"


def test_lowrank_topk_makes_no_dense_matrix():
    """A process that selects needs little more memory than one that holds only the factors.

    The difference of their peaks is about m * n bits, far below m * n floats.
    """
    if dispatch.interpreting():
        pytest.fail("this test belongs to the plain run")
    program = (
        "import resource, sys, torch; from lift_kernels import ops; torch.set_num_threads(2);"
        "left, right = torch.randn(6000, 8), torch.randn(8000, 8); ops.lowrank_topk(left[:64], right[:64], 64);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "k = 48_000 if sys.argv[1] == 'thin' else 2_400_000;"
        "ops.lowrank_topk(left, right, k);"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - 4 * k)"
    )
    for density in ("thin", "5 %"):
        output = subprocess.run(
            [sys.executable, "-c", program, density], capture_output=True, text=True, check=True
        ).stdout
        extra = int(output)
        bitmap, dense = 6000 * 8000 // 8, 6000 * 8000 * 4
        assert extra < bitmap + 24 * 2**20, f"{extra / 2**20:.1f} MiB beside the result"
        assert extra < dense / 5


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": 0}, ValueError, "k must be from 1 to 12, got 0"),
        ({"k": 13}, ValueError, "k must be from 1 to 12, got 13"),
        (
            {"left": torch.ones(3, 2).double()},
            ValueError,
            "left must be a contiguous float32 matrix or a batch of them, got torch.float64",
        ),
        ({"left": torch.ones(2, 3).T}, ValueError, "left must be a contiguous float32 matrix"),
        ({"right": torch.ones(4, 3)}, ValueError, "the same rank of at least 1"),
        ({"right": torch.ones(1, 4, 2)}, ValueError, r"the same batch size and .*, got \(3, 2\) and \(1, 4, 2\)"),
        (
            {"left": torch.ones(2, 3, 2), "right": torch.ones(2, 4, 2), "bracket": torch.ones(2)},
            ValueError,
            r"bracket must be contiguous float32 \(2, 2\)",
        ),
        ({"left": torch.ones(3, 0), "right": torch.ones(4, 0)}, ValueError, "the same rank of at least 1"),
        ({"bracket": torch.ones(3)}, ValueError, r"bracket must be contiguous float32 \(2,\)"),
        (
            {"left": torch.ones(1, 1).expand(70000, 1).contiguous(), "right": torch.ones(70000, 1)},
            ValueError,
            "the product may have up to 2\\^31-1 entries, got 70000 x 70000",
        ),
    ],
)
def test_lowrank_topk_bad_input(backend, change, error, message):
    arguments = {"left": torch.ones(3, 2), "right": torch.ones(4, 2), "k": 5} | change
    with pytest.raises(error, match=message):
        ops.lowrank_topk(**arguments, backend=backend.name)
