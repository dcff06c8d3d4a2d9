"""Progress bars, shown where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class _Silent:
    """Takes the place of a bar where tqdm is not installed."""

    def update(self, count: int = 1) -> None:
        """Do nothing."""


def progress_bar(total: int, description: str, unit: str, delay: float = 0.0, shown: bool = True) -> Any:
    """Return a context manager whose value has ``update(count)``.

    Args:
        total: number of items.
        description: text in front of the bar.
        unit: name of an item.
        delay: seconds before the bar appears.
        shown: False for no bar.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nullcontext(_Silent())
    return tqdm(total=total, desc=description, unit=unit, delay=delay, leave=False, disable=not shown)


def with_progress(items: Iterable[T], description: str, shown: bool = True) -> Iterator[T] | Iterable[T]:
    """Return the items, counted by a bar while they are taken.

    Without tqdm, and unless ``shown``, no bar appears.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, unit="") if shown else items
