"""Levels of instruction sets: which of them this CPU has, and which one the compiled code uses.

All functions need the loaded library; `dispatch` calls them.
"""

from __future__ import annotations

import functools
import os

import torch

VARIABLE = "LIFT_CPU_LEVEL"
"""Environment variable that names the level for the whole process.

It is read once, when the library is loaded: at the first op or the first call of `backends`.
"""
_X86 = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
_NEEDED = "SSE4.2 and POPCNT (x86-64-v2)"


def levels() -> tuple[str, ...]:
    """Return the levels that this CPU has, the lowest first.

    On x86 these are ``x86-64-v2`` (SSE4.2), ``x86-64-v3`` (AVX2, FMA) and ``x86-64-v4`` (AVX-512).
    Elsewhere there is one. The tuple is empty on a CPU that is older than the lowest level.
    """
    native = torch.ops.lift_kernels_native
    return tuple(native.cpu_level_name(number) for number in range(native.cpu_level_count()))


@functools.cache
def asked() -> str:
    """Return what LIFT_CPU_LEVEL said at the first call, when the library was loaded."""
    return os.environ.get(VARIABLE, "")


def take() -> None:
    """Have all CPU ops use the level that was asked for, or the highest. Needs a level."""
    name = _full_name(asked())
    torch.ops.lift_kernels_native.use_cpu_level(levels().index(name) if name else len(levels()) - 1)


def problem() -> str:
    """Return why the compiled code cannot run on this CPU as asked, or an empty string."""
    if not levels():
        return f"this CPU has no {_NEEDED}, which the compiled code needs"
    return wrong_choice()


def wrong_choice() -> str:
    """Return what is wrong with the level that was asked for, or an empty string.

    On a CPU without any level no choice would be right, so none is wrong.
    """
    name = _full_name(asked())
    if not name or not levels() or name in levels():
        return ""
    what = "a level that this CPU lacks" if name in _X86 and levels()[0] in _X86 else "no level of this CPU"
    return f"{VARIABLE}={asked()} names {what}; choose one of {', '.join(levels())}, or leave it unset for the highest"


def used() -> str:
    """Return the level in use. Needs a level."""
    return levels()[torch.ops.lift_kernels_native.cpu_level()]


def description() -> str:
    """Return the level in use, and whether LIFT_CPU_LEVEL was changed too late."""
    now = os.environ.get(VARIABLE, "")
    if _full_name(now) == _full_name(asked()):
        return used()
    change = f"{VARIABLE}={now}" if now else f"the removal of {VARIABLE}"
    return f"{used()}; {change} came too late, after the library was loaded: set it before the process starts"


def _full_name(name: str) -> str:
    """The name of a level, of which the part before the version may be left out on x86."""
    return f"x86-64-{name}" if f"x86-64-{name}" in _X86 else name
