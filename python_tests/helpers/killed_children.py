"""Work in forked children that run to their end or are killed with SIGKILL.

A process that forks them must start no OpenMP thread before its last fork.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Fork a child that does the work in silence, and return its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        code = 0
    finally:
        os._exit(code)


def to_the_end(process: int) -> float:
    """Wait for a child and return the seconds."""
    began = time.perf_counter()
    _, status = os.waitpid(process, 0)
    assert status == 0, "a child failed; do the same work by hand to see why"
    return time.perf_counter() - began


def killed_after(process: int, seconds: float) -> bool:
    """Kill a child after so many seconds; return whether it was still going."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # an ended child keeps its id until waitpid, so this hits no other process
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)
