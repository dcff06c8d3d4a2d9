"""Intervals, p-values and designs of a comparison, against simulations and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lift_kernels.finetune.comparison import statistics, student

RUNS = 400


def draw(rng, seeds, samples, a, b, e):
    """Differences whose effects of seed, sample and rest have these standard deviations."""
    return a * rng.normal(size=(seeds, 1)) + b * rng.normal(size=(1, samples)) + e * rng.normal(size=(seeds, samples))


@pytest.mark.parametrize(
    ("seeds", "a", "b", "e"),
    [
        (3, 1.0, 1.0, 1.0),  # seeds dominate
        (3, 0.001, 1.0, 1.0),  # samples dominate
        (3, 0.0, 0.0, 1.0),  # neither
        (3, 0.1, 1.0, 1.0),  # mixed
        (5, 0.14, 1.0, 0.3),
        (1, 0.0, 1.0, 1.0),  # one seed, and seeds that do not matter
    ],
)
def test_intervals_cover_the_truth(seeds, a, b, e):
    rng = np.random.default_rng(20)
    found = [statistics.estimate(0.3 + draw(rng, seeds, 200, a, b, e)) for _ in range(RUNS)]
    assert 0.92 <= np.mean([x.low <= 0.3 <= x.high for x in found]) <= 0.985


@pytest.mark.parametrize("a", [0.0, 0.05, 0.1, 0.2])
def test_one_seed_with_a_pilot_covers_the_truth_where_samples_alone_do_not(a):
    rng = np.random.default_rng(21)
    bounded, alone = [], []
    for _ in range(RUNS):
        pilot = statistics.seed_part(draw(rng, 3, 100, math.sqrt(2) * a, 2.0, math.sqrt(2)))
        d = 0.3 + draw(rng, 1, 200, math.sqrt(2) * a, 1.0, math.sqrt(2))
        found = statistics.estimate(d, pilot), statistics.estimate(d)
        assert [x.seed_part for x in found] == ["pilot", "unknown"]
        for covered, x in zip((bounded, alone), found):
            covered.append(x.low <= 0.3 <= x.high)
    assert np.mean(bounded) >= 0.92
    assert a < 0.1 or np.mean(alone) < 0.85


def test_a_pilot_adds_its_variance():
    found = statistics.estimate(np.array([[1.0, 2.0, 3.0, 4.0]]), statistics.SeedPart(variance=0.5, df=1))
    seeds, samples = 0.5, 5 / 3 / 4
    assert found.error == pytest.approx(math.sqrt(seeds + samples))
    assert found.df == pytest.approx((seeds + samples) ** 2 / (seeds**2 / 1 + samples**2 / 3))


def test_a_worked_example_by_hand():
    """Three seeds, two samples: the mean squares are 2, 6 and 2."""
    d = np.array([[0.0, 2.0], [2.0, 2.0], [1.0, 5.0]])
    seeds, samples, rest = statistics.mean_squares(d)
    assert (seeds, samples, rest) == pytest.approx((2 * (1 + 0 + 1) / 2, 3 * (1 + 1) / 1, (1 + 1 + 1 + 1 + 0 + 0) / 2))
    found = statistics.estimate(d)
    assert (found.mean, found.error) == pytest.approx((2.0, math.sqrt((2 + 6 - 2) / 6)))
    assert found.df == pytest.approx(6**2 / (2**2 / 2 + 6**2 / 1 + 2**2 / 2))
    assert found.high - found.low == pytest.approx(2 * student.quantile(0.975, found.df))
    assert found.p == pytest.approx(student.two_sided_p(2.0, found.df))


def test_the_standard_error_is_never_below_that_of_seeds_or_samples_alone():
    rng = np.random.default_rng(22)
    for _ in range(50):
        d = draw(rng, 3, 20, 0.05, 0.05, 1.0)
        seeds, samples, _ = statistics.mean_squares(d)
        alone = [d.mean(1).std(ddof=1) / math.sqrt(3), d.mean(0).std(ddof=1) / math.sqrt(20)]
        assert alone == pytest.approx([math.sqrt(seeds / 60), math.sqrt(samples / 60)])
        assert statistics.estimate(d).error >= max(alone) * (1 - 1e-12)


def test_one_seed_gives_the_paired_t_test():
    found = statistics.estimate(np.array([[1.0, 2.0, 3.0, 4.0]]))
    assert (found.mean, found.df, found.seed_part) == (2.5, 3, "unknown")
    assert found.error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert (found.low, found.high) == pytest.approx((2.5 - 2.0542603, 2.5 + 2.0542603), abs=1e-6)
    assert found.p == pytest.approx(0.0304662, abs=1e-6)


def test_equal_losses_have_no_difference_and_a_constant_difference_is_certain():
    same, shifted = statistics.estimate(np.zeros((3, 5))), statistics.estimate(np.ones((3, 5)))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (shifted.mean, shifted.low, shifted.high, shifted.p) == (1, 1, 1, 0)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least two samples"):
        statistics.estimate(np.ones((3, 1)))
    with pytest.raises(ValueError, match="at least two seeds"):
        statistics.seed_part(np.ones((1, 9)))


def test_two_seeds_of_a_pilot_by_their_differences():
    losses = np.array([[1.0, 2.0, 4.0], [1.5, 2.0, 5.5]])
    d = losses[0] - losses[1]
    part = statistics.seed_part(losses)
    assert (part.variance, part.df) == pytest.approx((d.mean() ** 2 / 2, 1))


def test_the_pilot_bounds_the_seed_part_on_average():
    rng = np.random.default_rng(23)
    parts = [statistics.seed_part(draw(rng, 2, 50, 0.3, 1.0, 1.0)) for _ in range(4000)]
    assert np.mean([part.variance for part in parts]) == pytest.approx(0.09 + 1 / 50, rel=0.06)


@pytest.mark.parametrize(("seeds", "a"), [(1, 0.05), (3, 0.3), (3, 0.02), (5, 0.1)])
def test_the_power_at_the_smallest_difference_is_near_eighty_percent(seeds, a):
    """The pilot has many seeds and samples, so that it knows the variances."""
    rng = np.random.default_rng(24)
    pilot = draw(rng, 500, 4000, a, 0.4, 0.6)
    design, part = statistics.smallest_difference(pilot, 2.0, seeds, 200), statistics.seed_part(pilot)
    differences = [design.nats + draw(rng, seeds, 200, a, 0.4, 0.6) for _ in range(RUNS)]
    assert np.mean([statistics.estimate(d, part).p < 0.05 for d in differences]) == pytest.approx(0.8, abs=0.06)


def test_what_all_differences_of_a_seed_share_and_what_each_sample_has_of_its_own():
    """Two seeds by hand, of 0.3 and -0.1, two samples, of 0 and 2, and no rest."""
    pilot = np.array([[0.3, 2.3], [-0.1, 1.9]])
    found = statistics.smallest_difference(pilot, 0.5, seeds=4, samples=50)
    a, b = 0.08 / 4, 2.0 / 50
    df = (a + b) ** 2 / (a**2 / 3 + b**2 / 49)
    assert found.nats == pytest.approx(math.sqrt(a + b) * student.detectable(df))
    assert found.share == pytest.approx(found.nats / 0.5)


def test_more_seeds_and_samples_find_smaller_differences():
    rng = np.random.default_rng(25)
    pilot = draw(rng, 2, 100, 0.05, 0.5, 0.5)
    designs = [
        statistics.smallest_difference(pilot, 0.9, *n) for n in ((2, 100), (3, 100), (5, 100), (5, 400), (1, 100))
    ]
    *nats, one_seed = (design.nats for design in designs)
    assert nats == sorted(nats, reverse=True) and nats[0] > 2 * nats[-1] and one_seed > nats[1]
    assert designs[2].share == pytest.approx(nats[2] / 0.9)
    assert math.isnan(statistics.smallest_difference(pilot, -0.1, 3, 100).share)


def test_a_measured_error_finds_the_difference_of_its_power():
    found = statistics.estimate(np.array([[1.0, 2.0, 3.0, 4.0]]))
    assert student.power(found.finds / found.error, 3) == pytest.approx(0.8, abs=1e-6)


def test_holm_by_hand():
    adjusted = statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert statistics.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({}) == {}


def pairs(both, first, second, neither):
    counts = (both, first, second, neither)
    return np.repeat([1, 1, 0, 0], counts)[None], np.repeat([1, 0, 1, 0], counts)[None]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 1, 7, 12), (-0.507, -0.026)),  # Bentur 2009, in Fagerland, Lydersen and Laake 2017
        ((14, 5, 0, 22), (0.011, 0.226)),
    ],
)
def test_paired_accuracy_of_one_seed_is_newcombes_interval(counts, expected):
    found = statistics.accuracy_difference(*pairs(*counts))
    assert (found.low, found.high) == pytest.approx(expected, abs=6e-4)
    assert found.mean == pytest.approx((counts[1] - counts[2]) / sum(counts)) and found.seed_part == "unknown"


@pytest.mark.parametrize("questions", [40, 200])
def test_newcombes_interval_covers_the_truth(questions):
    rng = np.random.default_rng(26)
    covered = []
    for _ in range(RUNS):
        counts = rng.multinomial(questions, [0.5, 0.15, 0.05, 0.3])
        found = statistics.accuracy_difference(*pairs(*counts))
        covered.append(found.low <= 0.1 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.985


def test_accuracy_of_several_seeds_is_that_of_the_two_way_estimate():
    rng = np.random.default_rng(27)
    first, second = rng.integers(0, 2, (2, 3, 50))
    assert statistics.accuracy_difference(first, second) == statistics.estimate((first - second).astype(float))
    assert statistics.accuracy(first) == statistics.estimate(first)


def test_accuracy_is_never_above_one_or_below_zero():
    correct = np.ones((3, 20), dtype=int)
    correct[0, 0] = 0
    assert statistics.accuracy(correct).high == 1 and statistics.accuracy(1 - correct).low == 0


def test_accuracy_without_any_difference_still_has_an_interval():
    none = np.zeros((3, 20), dtype=int)
    assert statistics.accuracy(none).high == pytest.approx(0.16113, abs=1e-4)
    found = statistics.accuracy_difference(none, none)
    assert found.mean == 0 and found.low == -found.high < -0.1
    assert statistics.accuracy(none[:1] + 1).low == pytest.approx(1 - 0.16113, abs=1e-4)
