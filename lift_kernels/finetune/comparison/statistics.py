"""Paired comparison of two methods over seeds and samples, with intervals.

Both methods train with the same seeds and are evaluated on the same samples. Their difference of
seed s and sample i follows the two-way random-effects model without replication,

    d[s, i] = mu + a[s] + b[i] + e[s, i],

with variances A, B and E of the three effects. Of S seeds and N samples, the mean squares are

    MS_seeds   = N sum_s (mean of seed s - mean)^2 / (S - 1),     expected N A + E,
    MS_samples = S sum_i (mean of sample i - mean)^2 / (N - 1),   expected S B + E,
    MS_rest    = sum (what is left)^2 / ((S - 1)(N - 1)),         expected E.

The mean's variance A/S + B/N + E/(SN) is estimated by (MS_seeds + MS_samples - MS_rest)/(SN), but
never by less than MS_seeds/(SN) or MS_samples/(SN), what seeds or samples alone give. Degrees of
freedom follow Satterthwaite: the squared sum over the sum of (term^2 / its degrees of freedom).

Sources: D. C. Montgomery, Design and Analysis of Experiments, chapter on random factors;
F. E. Satterthwaite, An approximate distribution of estimates of variance components, Biometrics
Bulletin 2 (1946), 110-114.

In simulations with 200 samples, the 95 % intervals cover the truth in 92 to 96 % of designs with
three seeds, and 94 to 96 % with five. With two seeds they cover 88 to 97 %: least where seeds make
most of the variance.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from . import student

LEVEL = 0.95
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and samples, with its 95 % interval."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided p-value of a mean of zero; NaN of an interval without a t test."""
    error: float
    """Standard error of the mean."""
    df: float
    """Degrees of freedom of the standard error."""
    seeds: int
    samples: int
    seed_part: str
    """"measured" by several seeds, "pilot" if a pilot gave it, or "unknown"."""

    @property
    def finds(self) -> float:
        """The smallest true mean that a test with this standard error finds, with 80 % power."""
        return self.error * student.detectable(self.df)


@dataclass(frozen=True)
class SeedPart:
    """What the seed adds to a loss or a difference: a bound of its variance, from a pilot."""

    variance: float
    """Variance of the mean between seeds, in squared nats per token."""
    df: int
    """Seeds of the pilot less one."""


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares of seeds, samples and the rest.

    Args:
        d: differences or losses, (seeds, samples), at least two of each.
    """
    seeds, samples = d.shape
    mean, by_seed, by_sample = d.mean(), d.mean(1), d.mean(0)
    rest = d - by_seed[:, None] - by_sample + mean
    return (
        samples * float(((by_seed - mean) ** 2).sum()) / (seeds - 1),
        seeds * float(((by_sample - mean) ** 2).sum()) / (samples - 1),
        float((rest**2).sum()) / ((seeds - 1) * (samples - 1)),
    )


def _satterthwaite(*terms: tuple[float, float]) -> tuple[float, float]:
    """Sum and degrees of freedom of independent variances, each with its degrees of freedom."""
    total = sum(value for value, _ in terms)
    spread = sum(value**2 / df for value, df in terms)
    return total, total**2 / spread if spread > 0 else math.inf


def _variance_of_mean(d: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of (seeds, samples) and its degrees of freedom; see the module."""
    seeds, samples = d.shape
    if seeds == 1:
        return float(d.var(ddof=1)) / samples, samples - 1
    a, b, e = (value / d.size for value in mean_squares(d))
    both = _satterthwaite((a, seeds - 1), (b, samples - 1), (-e, (seeds - 1) * (samples - 1)))
    return max(both, (a, seeds - 1), (b, samples - 1), key=lambda term: term[0])


def estimate(d: np.ndarray, pilot: SeedPart | None = None) -> Estimate:
    """Return the mean of losses or paired differences with its 95 % interval.

    With one seed the interval is that of the samples. It says nothing of other seeds, unless a
    pilot bounds their part, which is then added. In simulations such intervals cover 88 to 98 %
    with a pilot of two seeds, where samples alone cover as little as 29 %.

    Args:
        d: (seeds, samples), of at least two samples.
        pilot: the seed part of such losses or differences; only used with one seed.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    seeds, samples = d.shape
    if samples < 2:
        raise ValueError("an interval needs at least two samples")
    variance, df = _variance_of_mean(d)
    part = "measured" if seeds > 1 else "unknown"
    if seeds == 1 and pilot is not None:
        variance, df = _satterthwaite((variance, df), (pilot.variance, pilot.df))
        part = "pilot"
    mean, error = float(d.mean()), math.sqrt(variance)
    half = error * student.quantile((1 + LEVEL) / 2, df)
    p = student.two_sided_p(mean / error, df) if error > 0 else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, p, error, df, seeds, samples, part)


def seed_part(d: np.ndarray) -> SeedPart:
    """Return the seed part of a method's loss, or of the difference of two methods, from a pilot.

    The variance of the means of each seed, MS_seeds/V of V samples, has the expectation A + E/V. So
    it bounds the seed part A from above, on average.

    Args:
        d: losses of runs that differ in their seed alone, or paired differences of two methods'
            runs, (seeds, V), at least two of each.
    """
    seeds, samples = d.shape
    if seeds < 2 or samples < 2:
        raise ValueError("a pilot needs at least two seeds and two samples")
    return SeedPart(mean_squares(d)[0] / samples, seeds - 1)


@dataclass(frozen=True)
class Design:
    """The smallest difference between two methods that a design finds, before it is run."""

    nats: float
    """In nats per token, with 80 % power at 5 %, two-sided, for one comparison."""
    share: float
    """As a share of what training gained on the validation part; NaN if it gained nothing."""
    seeds: int
    samples: int


def smallest_difference(pilot: np.ndarray, gained: float, seeds: int, samples: int) -> Design:
    """Return the smallest difference of two methods that the design finds with 80 % power.

    All methods are taken to differ between seeds and samples as the two of the pilot do. A is
    bounded as in `seed_part`, E is MS_rest, and B is (MS_samples - E)/S of the pilot's S seeds, or
    0. They give the mean squares that the comparison can expect, and so the standard error and the
    degrees of freedom of its t tests. With one seed these are the pilot's. A pilot with two seeds
    tells A only roughly.

    Args:
        pilot: paired differences of two methods' validation losses, (seeds of the pilot, V).
        gained: what training gained on the validation part, in nats per token.
        seeds: seeds of each method in the comparison.
        samples: test samples, at least two.
    """
    part = seed_part(pilot)
    _, by_sample, rest = mean_squares(pilot)
    own = max(0.0, by_sample - rest) / len(pilot)
    if seeds == 1:
        variance, df = _satterthwaite((part.variance, part.df), ((own + rest) / samples, samples - 1))
    else:
        e, a, b = rest / (seeds * samples), part.variance / seeds, own / samples
        variance, df = _satterthwaite((a + e, seeds - 1), (b + e, samples - 1), (-e, (seeds - 1) * (samples - 1)))
    nats = math.sqrt(variance) * student.detectable(df)
    return Design(nats, nats / gained if gained > 0 else math.nan, seeds, samples)


def holm(p: Mapping[Name, float]) -> dict[Name, float]:
    """Return Holm's adjusted p-values of several comparisons.

    They keep the chance of any false alarm below 5 % where those below 0.05 are called (S. Holm,
    Scandinavian Journal of Statistics 6 (1979), 65-70).
    """
    adjusted, highest = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def accuracy(correct: np.ndarray) -> Estimate:
    """Return the accuracy of a method with its interval.

    With several seeds it is that of `estimate`, cut at 0 and 1. With one seed, or where no answer
    differs from another, it is Wilson's.

    Args:
        correct: 0 or 1, (seeds, questions), at least two questions.
    """
    seeds, samples = correct.shape
    if seeds > 1 and correct.min() != correct.max():
        found = estimate(correct)
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))
    mean = float(correct[0].mean())
    low, high = _wilson(mean, samples)
    return _without_test(mean, low, high, correct)


def accuracy_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Return the accuracy of the first method minus that of the second, paired, with its interval.

    With several seeds it is that of `estimate`. With one seed, or where all differences are equal,
    it is method 10 of R. G. Newcombe, Improved confidence intervals for the difference between
    binomial proportions based on paired data, Statistics in Medicine 17 (1998), 2635-2650. That
    interval holds for few questions too, and says nothing of other seeds.

    Args:
        first: 0 or 1, (seeds, questions).
        second: the same, of the same seeds and questions.
    """
    d = first.astype(float) - second
    if len(d) > 1 and d.min() != d.max():
        return estimate(d)
    return _without_test(float(d[0].mean()), *_newcombe(first[0], second[0]), d)


def _without_test(mean: float, low: float, high: float, values: np.ndarray) -> Estimate:
    seeds, samples = values.shape
    error = (high - low) / (2 * student.quantile((1 + LEVEL) / 2, math.inf))
    part = "measured" if seeds > 1 else "unknown"
    return Estimate(mean, low, high, math.nan, error, math.inf, seeds, samples, part)


def _wilson(share: float, samples: int) -> tuple[float, float]:
    from ..metrics import wilson_interval

    return wilson_interval(round(share * samples), samples)


def _newcombe(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    n = len(first)
    only_first, only_second = int((first > second).sum()), int((first < second).sum())
    both = int(first.sum()) - only_first
    neither = n - both - only_first - only_second
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (l1, u1), (l2, u2) = _wilson(p1, n), _wilson(p2, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0

    def width(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p1 - p2 - width(p1 - l1, u2 - p2), p1 - p2 + width(u1 - p1, p2 - l2)
