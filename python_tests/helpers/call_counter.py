"""Counts the Python calls inside a package, and those that go from one module to another."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import lift_kernels

_INLINE = re.compile(r"(\.<locals>)?\.?<(listcomp|setcomp|dictcomp|genexpr|lambda)>")


class CallCounter:
    """Counts calls of functions that a package defines, in the calling thread.

    A crossing is a call whose nearest calling frame of the package is in another module, or that
    enters the package from outside. Frames in between, of torch for example, are passed over.
    Comprehensions, generator expressions and lambdas count as part of the function they stand in.
    A generator function counts whenever it runs on.

    Args:
        folder: of the package.

    Attributes:
        calls: number of calls.
        modules: files that were called, relative to the folder.
        edges: crossings by (module, function) of both sides. The caller outside is ``("", "")``.

    >>> with CallCounter() as counter:
    ...     optimizer.step()
    >>> print(counter.report())
    """

    def __init__(self, folder: Path = Path(lift_kernels.__file__).parent) -> None:
        self._root = str(folder.resolve())
        self._modules: dict[str, str | None] = {}  # by file name, as Python knows it
        self._before: Any = None
        self.calls = 0
        self.modules: set[str] = set()
        self.edges: Counter[tuple[str, str, str, str]] = Counter()

    @property
    def crossings(self) -> int:
        """Calls from one module to another, or from outside."""
        return sum(self.edges.values())

    def report(self) -> str:
        """The numbers, and every crossing with its count."""
        lines = [f"{self.calls} calls, {len(self.modules)} modules, {self.crossings} crossings"]
        for (module, function, other, called), count in self.edges.items():
            lines.append(f"{count:5}  {f'{module} {function}'.strip() or 'outside'} -> {other} {called}")
        return "\n".join(lines)

    def __enter__(self) -> CallCounter:
        self._before = sys.getprofile()
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(self._before)

    def _on_event(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        module = self._module(frame)
        if module is None or frame.f_code.co_name.startswith("<"):
            return
        self.calls += 1
        self.modules.add(module)
        caller = frame.f_back
        while caller is not None and self._module(caller) is None:
            caller = caller.f_back
        at, function = ("", "") if caller is None else (self._module(caller) or "", _function(caller))
        if at != module:
            self.edges[at, function, module, _function(frame)] += 1

    def _module(self, frame: FrameType) -> str | None:
        """The file of a frame relative to the package, or None for one outside."""
        name = frame.f_code.co_filename
        if name not in self._modules:
            file = Path(name).resolve()
            inside = file.is_relative_to(self._root)
            self._modules[name] = file.relative_to(self._root).as_posix() if inside else None
        return self._modules[name]


def _function(frame: FrameType) -> str:
    return _INLINE.sub("", frame.f_code.co_qualname) or "<module>"
