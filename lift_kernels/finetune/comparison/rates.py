"""Which learning rate to try next: from a start outward until the best rate lies inside.

Rates lie on a grid of two steps a decade: 1e-3, 3e-3, 1e-2. They are exact decimal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from ...errors import UserError


def _scaled(rate: float, up: bool) -> float:
    """The next rate of the grid. A step is 3, or 10/3 where the digits are a multiple of 3."""
    number = Decimal(repr(rate))
    by_three = int("".join(map(str, number.normalize().as_tuple().digits))) % 3 == 0
    if up:
        return float(number * 10 / 3 if by_three else number * 3)
    return float(number / 3 if by_three else number * 3 / 10)


def higher(rate: float) -> float:
    """Return the next higher rate: 3e-3 after 1e-3, 1e-2 after 3e-3."""
    return _scaled(rate, up=True)


def lower(rate: float) -> float:
    """Return the next lower rate: 1e-3 after 3e-3, 3e-4 after 1e-3."""
    return _scaled(rate, up=False)


def _finite(tried: Mapping[float, float]) -> dict[float, float]:
    return {rate: math.inf if math.isnan(loss) else loss for rate, loss in tried.items()}


def best_rate(tried: Mapping[float, float]) -> float:
    """Return the rate with the lowest loss; among equal ones, the one that was tried first.

    Args:
        tried: loss by rate, in the order of the tries; inf or NaN where training diverged.

    Raises:
        UserError: if nothing was tried or every rate diverged.
    """
    losses = _finite(tried)
    if not losses or math.isinf(min(losses.values())):
        names = ", ".join(f"{rate:g}" for rate in tried) or "none was tried"
        raise UserError(f"no learning rate gave a finite loss ({names}); start from a lower rate")
    return min(losses, key=losses.__getitem__)


def _wanted(tried: Mapping[float, float]) -> float | None:
    """The rate that a search without limit tries next, or None when it is done."""
    losses = _finite(tried)
    if math.isinf(min(losses.values())):
        return lower(min(losses))
    best = best_rate(losses)
    up, down = higher(best), lower(best)
    if not any(best < rate <= up for rate in losses):
        return up
    return None if any(down <= rate < best for rate in losses) else down


def next_rate(tried: Mapping[float, float], start: float, limit: int) -> float | None:
    """Return the learning rate to try next, or None when the search is done.

    The search begins with ``start`` and its neighbours. It goes on past the edge until the best
    rate has a worse, or no better, neighbour one step above and below. `unfinished` tells whether
    the limit ended it before.

    Args:
        tried: loss by rate, in the order of the tries; inf or NaN where training diverged.
        start: the first rate, > 0.
        limit: the largest number of rates to try.
    """
    if not tried:
        return start
    return _wanted(tried) if len(tried) < limit else None


def unfinished(tried: Mapping[float, float]) -> str | None:
    """Return why the best rate may lie outside of those tried, or None when it does not.

    Args:
        tried: loss by rate, in the order of the tries; not empty.
    """
    rate = _wanted(tried)
    if rate is None:
        return None
    if math.isinf(min(_finite(tried).values())):
        return f"all {len(tried)} rates diverged, down to {min(tried):g}"
    best = best_rate(tried)
    side = "highest" if rate > best else "lowest"
    if best in (min(tried), max(tried)):
        return f"the best rate, {best:g}, is the {side} that was tried"
    return f"{rate:g}, next to the best rate {best:g}, was not tried"
