"""The search for a learning rate on curves whose best rate is known."""

from __future__ import annotations

import math

import pytest

from lift_kernels.errors import UserError
from lift_kernels.finetune.comparison import rates


def search(curve, start, limit=20):
    tried = {}
    while (rate := rates.next_rate(tried, start, limit)) is not None:
        assert rate not in tried
        tried[rate] = curve(rate)
    return tried


def valley(best):
    return lambda rate: abs(math.log10(rate / best))


def test_rates_are_exact_decimal_numbers_a_third_or_a_tenth_apart():
    upward = [1e-4]
    for _ in range(5):
        upward.append(rates.higher(upward[-1]))
    assert upward == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    downward = [3e-2]
    for _ in range(5):
        downward.append(rates.lower(downward[-1]))
    assert downward == upward[::-1]
    assert [rates.higher(2e-5), rates.higher(6e-5), rates.lower(2e-4), rates.lower(2e-5)] == [6e-5, 2e-4, 6e-5, 6e-6]
    assert [rates.higher(5e-4), rates.higher(1.5e-3), rates.lower(5e-3)] == [1.5e-3, 5e-3, 1.5e-3]


def test_a_best_start_needs_its_two_neighbours_alone():
    tried = search(valley(1e-3), 1e-3)
    assert list(tried) == [1e-3, 3e-3, 3e-4]
    assert rates.best_rate(tried) == 1e-3 and rates.unfinished(tried) is None


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (3e-2, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (3e-5, [1e-3, 3e-3, 3e-4, 1e-4, 3e-5, 1e-5]),
        (3e-3, [1e-3, 3e-3, 1e-2]),
    ],
)
def test_the_search_goes_past_the_edge_until_the_best_rate_is_inside(best, expected):
    tried = search(valley(best), 1e-3)
    assert list(tried) == expected
    assert rates.best_rate(tried) == best and rates.unfinished(tried) is None


def test_a_diverged_rate_is_a_worse_neighbour():
    tried = search(lambda rate: math.inf if rate > 1e-3 else -rate, 1e-3)
    assert list(tried) == [1e-3, 3e-3, 3e-4]
    assert rates.best_rate(tried) == 1e-3


def test_a_search_whose_start_diverges_goes_down():
    tried = search(lambda rate: math.nan if rate > 1e-4 else abs(math.log10(rate / 3e-5)), 1e-2)
    assert list(tried) == [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5]
    assert rates.best_rate(tried) == 3e-5 and rates.unfinished(tried) is None


def test_a_flat_curve_ends_at_the_start():
    tried = search(lambda rate: 1.0, 1e-3)
    assert list(tried) == [1e-3, 3e-3, 3e-4]
    assert rates.best_rate(tried) == 1e-3 and rates.unfinished(tried) is None


def test_a_limit_ends_the_search_and_that_is_said():
    tried = search(valley(1.0), 1e-3, limit=4)
    assert list(tried) == [1e-3, 3e-3, 1e-2, 3e-2]
    assert rates.unfinished(tried) == "the best rate, 0.03, is the highest that was tried"
    tried = search(valley(1e-9), 1e-3, limit=4)
    assert rates.unfinished(tried) == "the best rate, 0.0001, is the lowest that was tried"
    tried = search(lambda rate: math.inf, 1e-3, limit=3)
    assert list(tried) == [1e-3, 3e-4, 1e-4]
    assert rates.unfinished(tried) == "all 3 rates diverged, down to 0.0001"
    with pytest.raises(UserError, match=r"^no learning rate gave a finite loss \(0.001, 0.0003, 0.0001\); start"):
        rates.best_rate(tried)


def test_a_search_goes_on_from_rates_that_another_start_left():
    tried = {2e-3: 1.0, 2e-4: 0.5, 2e-5: 1.0}
    assert rates.next_rate(tried, 1e-3, 9) == 6e-4
    tried[6e-4] = 0.7
    assert rates.unfinished(tried) == "6e-05, next to the best rate 0.0002, was not tried"
    tried[1e-4] = 0.6
    assert rates.next_rate(tried, 1e-3, 9) is None
