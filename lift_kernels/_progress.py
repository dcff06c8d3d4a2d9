"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class _Silent:
    """Stands in for a bar where tqdm is not installed."""

    def update(self, count: int = 1) -> None:
        """Show nothing."""


def progress_bar(total: int, description: str, unit: str, delay: float = 0.0) -> Any:
    """A context manager whose value has ``update(count)``; the bar appears after ``delay``
    seconds.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nullcontext(_Silent())
    return tqdm(total=total, desc=description, unit=unit, delay=delay, leave=False)


def with_progress(items: Iterable[T], description: str, shown: bool = True) -> Iterator[T] | Iterable[T]:
    """The items, counted by a bar while they are taken; without tqdm or ``shown`` nothing is
    drawn.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, unit="") if shown else items
