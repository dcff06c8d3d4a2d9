"""Student's t distribution against tables of its quantiles and simulated power."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lift_kernels.finetune.comparison import student


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.706204736),
        (0.975, 2, 4.302652730),
        (0.975, 3, 3.182446305),
        (0.975, 5, 2.570581836),
        (0.975, 10, 2.228138852),
        (0.975, 30, 2.042272456),
        (0.975, 120, 1.979930405),
        (0.975, math.inf, 1.959963985),
        (0.995, 1, 63.656741163),
        (0.995, 10, 3.169272673),
        (0.95, 4, 2.131846786),
        (0.90, 1, 3.077683537),
        (0.75, 2, 0.816496581),
        (0.5, 7, 0.0),
        (0.025, 10, -2.228138852),
    ],
)
def test_quantiles_are_those_of_the_table(p, df, expected):
    assert student.quantile(p, df) == pytest.approx(expected, abs=1e-6)


def test_one_degree_of_freedom_is_the_cauchy_distribution():
    for p in (0.6, 0.8, 0.99, 0.9999):
        assert student.quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)


def test_degrees_of_freedom_need_not_be_whole():
    values = [student.quantile(0.975, df) for df in (1.0, 1.3, 1.7, 2.0, 2.5, 3.0)]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    for df in (0.7, 1.3, 2.5, 17.2):
        assert student.two_sided_p(student.quantile(0.975, df), df) == pytest.approx(0.05, abs=1e-10)


def test_many_degrees_of_freedom_approach_the_normal_distribution():
    assert student.quantile(0.975, 1e6) == pytest.approx(1.959963985 + 2.3723e-6, abs=1e-8)


@pytest.mark.parametrize("a", [0.5, 1.5, 40.0])
def test_the_incomplete_beta_function_is_symmetric(a):
    assert student.incomplete_beta(a, 0.5, 0.3) == pytest.approx(1 - student.incomplete_beta(0.5, a, 0.7), abs=1e-14)
    assert student.incomplete_beta(a, 1, 0.3) == pytest.approx(0.3**a, rel=1e-12)


@pytest.mark.parametrize("df", [1, 2, 5, 60])
def test_the_detectable_difference_has_eighty_percent_power(df):
    rng = np.random.default_rng(df)
    t = rng.normal(student.detectable(df), 1, 400_000) / np.sqrt(rng.chisquare(df, 400_000) / df)
    assert np.mean(abs(t) > student.quantile(0.975, df)) == pytest.approx(0.8, abs=0.003)


def test_the_power_without_a_difference_is_the_level():
    for df in (1, 2.5, 30, math.inf):
        assert student.power(0.0, df) == pytest.approx(0.05, abs=1e-4)


def test_the_detectable_difference_of_a_normal_test_is_the_sum_of_two_quantiles():
    assert student.detectable(math.inf) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    assert student.detectable(1e5) == pytest.approx(2.801585, abs=1e-4)
