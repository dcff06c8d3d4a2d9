"""How the answers of a model are scored."""

from __future__ import annotations

import math
import re


def extract_number(text: str) -> float | None:
    """Return the final answer in a text, or None where it has no number.

    The final answer is the number that follows "####" or "answer is", else the last number.
    Thousands separators, decimals and signs are understood. Currency signs and markup in front of
    the number are skipped.
    """
    number = r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    marked = re.findall(rf"(?:####|answer\s*(?:is|:|=))[^\w\n+-]*?({number})", text, flags=re.IGNORECASE)
    found = marked or re.findall(number, text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(text: str, expected: str) -> bool:
    """Return whether both texts have the same final number (relative tolerance 1e-6)."""
    found, wanted = extract_number(text), extract_number(expected)
    return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's confidence interval of a proportion.

    Args:
        successes: number of successes.
        trials: number of trials.
        z: quantile of the normal distribution; the default gives 95 % confidence.

    Returns:
        Lower and upper bound; (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    p, q = successes / trials, z * z / trials
    center = (p + q / 2) / (1 + q)
    half = math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    return max(0.0, center - half), min(1.0, center + half)
