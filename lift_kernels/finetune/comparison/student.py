"""Student's t distribution: tail, quantile and power, without scipy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist

_NORMAL = NormalDist()
_SMALLEST = 1e-300
_POINTS = 400  # of the integral over the standard error; the power is then exact to 1e-4


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method (DLMF 8.17.22)."""

    def safe(value: float) -> float:
        return value if abs(value) > _SMALLEST else _SMALLEST

    c, d = 1.0, 1 / safe(1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d, c = 1 / safe(1 + step * d), safe(1 + step / c)
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), for 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast
        return math.exp(log) * _fraction(a, b, x) / a
    return 1 - math.exp(log) * _fraction(b, a, 1 - x) / b


def two_sided_p(t: float, df: float) -> float:
    """Return the probability that a t variable with ``df`` > 0 is at least ``|t|`` from 0."""
    if math.isinf(t):
        return 0.0
    if math.isinf(df):
        return 2 * _NORMAL.cdf(-abs(t))
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


@functools.lru_cache(maxsize=4096)
def quantile(p: float, df: float) -> float:
    """Return the quantile of the t distribution.

    Args:
        p: probability in (0, 1).
        df: degrees of freedom, > 0; they need not be whole, and infinity means the normal one.
    """
    if p < 0.5:
        return -quantile(1 - p, df)
    if math.isinf(df):
        return _NORMAL.inv_cdf(p)
    high = 1.0
    while two_sided_p(high, df) > 2 * (1 - p):
        high *= 2
    return bisect(lambda t: two_sided_p(t, df) > 2 * (1 - p), 0.0, high)


def power(shift: float, df: float, level: float = 0.05) -> float:
    """Return the power of the two-sided t test.

    Args:
        shift: true difference in standard errors (the noncentrality).
        df: degrees of freedom of the standard error.
        level: the probability of a false alarm.
    """
    if math.isinf(df):
        bound = quantile(1 - level / 2, df)
        return _NORMAL.cdf(shift - bound) + _NORMAL.cdf(-shift - bound)
    bound, width = quantile(1 - level / 2, df), 8 / math.sqrt(2 * df)
    low, high = max(0.0, 1 - width), 1 + width
    top = -df / 2  # the log of the density near its mode, taken off against underflow
    total = weight = 0.0
    for i in range(_POINTS):  # s: the estimated standard error over the true one
        s = low + (i + 0.5) * (high - low) / _POINTS
        density = math.exp((df - 1) * math.log(s) - df * s * s / 2 - top)
        total += density * (_NORMAL.cdf(shift - bound * s) + _NORMAL.cdf(-shift - bound * s))
        weight += density
    return total / weight


@functools.lru_cache(maxsize=4096)
def detectable(df: float, wanted: float = 0.8) -> float:
    """Return the difference, in standard errors, that a t test at 5 % finds with this power."""
    high = 1.0
    while power(high, df) < wanted:
        high *= 2
    return bisect(lambda shift: power(shift, df) < wanted, 0.0, high)


def bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """Return the number between ``low`` and ``high`` up to which ``below`` is true."""
    while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-12 * high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2
