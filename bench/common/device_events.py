"""What `bench.common.fake_cuda` records: waits for the device, and launches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

import lift_kernels

PACKAGE = str(Path(lift_kernels.__file__).parent)


class Event(NamedTuple):
    """A wait or a launch.

    Attributes:
        what: the op, the kernel or the function.
        frames: files of the package that it came from, innermost first, as ``"optim/refresh.py"``.
    """

    what: str
    frames: tuple[str, ...]


class Call(NamedTuple):
    """What a launch works on.

    Attributes:
        op: of torch, a kernel of Triton, or the name of a function of a library.
        args, kwargs: its arguments. Those of a kernel are all in ``kwargs``.
        out: its results, or None.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any = None


class Recording:
    """Waits and launches in the order in which they came."""

    def __init__(self) -> None:
        self.waits: list[Event] = []
        self.launches: list[Event] = []

    def waited(self, event: Event) -> None:
        """Take note of a wait."""
        self.waits.append(event)

    def launched(self, event: Event, call: Call) -> None:
        """Take note of a launch. This class does not look at ``call``."""
        self.launches.append(event)

    def inside(self, folder: str) -> Recording:
        """Those that came through a file of this folder or name of the package."""
        return self._where(lambda event: any(frame.startswith(folder) for frame in event.frames))

    def outside(self, folder: str) -> Recording:
        """The others."""
        return self._where(lambda event: not any(frame.startswith(folder) for frame in event.frames))

    def report(self) -> str:
        """The numbers, and where the events came from."""
        lines = [f"{len(self.waits)} waits, {len(self.launches)} launches"]
        for label, events in (("wait", self.waits), ("launch", self.launches)):
            for event, count in Counter(events).items():
                lines.append(f"{count:5} {label:6} {event.what} from {' < '.join(event.frames) or 'outside'}")
        return "\n".join(lines)

    def _where(self, condition: Callable[[Event], bool]) -> Recording:
        found = Recording()
        found.waits = [event for event in self.waits if condition(event)]
        found.launches = [event for event in self.launches if condition(event)]
        return found


def package_frames() -> tuple[str, ...]:
    """Files of the package whose code runs now, innermost first."""
    files: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and (file := name[len(PACKAGE) + 1 :]) not in files[-1:]:
            files.append(file)
        frame = frame.f_back
    return tuple(files)


def refuse_cpu_tensors(kernel: str, arguments: object) -> None:
    """Raise ValueError for a CPU tensor among the arguments of a launch, or in a tuple of them."""
    for leaf in tree_leaves(arguments):
        tensor = getattr(leaf, "base", leaf)  # of a tensor descriptor
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            raise ValueError(f"{kernel} is launched with a CPU tensor of shape {tuple(tensor.shape)}, {tensor.dtype}")
