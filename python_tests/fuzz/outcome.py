"""What comes of a combination: it trains right, or it is refused well."""

from __future__ import annotations

import re

from .combination import Combination, simpler
from .refusal import Refused, check_words
from .run import Run
from .spoils import SPOILS
from .trained import assert_same, snapshot


def outcome(c: Combination) -> str:
    """Train as the combination says, and compare with an undisturbed run. Raises AssertionError."""
    try:
        run = Run(c).run()
    except Refused as refused:
        check_words(str(refused), c.spoil)
        return f"refused: {refused}"
    if c.spoil and not SPOILS[c.spoil].may_work:
        raise AssertionError(f"{c.spoil}: nothing was refused")
    again = Run(c, checked=False, interrupted=False).run()
    for one in (run, again):
        one.optimizer.state_dict()  # counts skipped steps off
    assert_same(
        snapshot(again.model, again.optimizer),
        snapshot(run.model, run.optimizer),
        "undisturbed and resumed runs: ",
        ("grad ", "required ", "id "),
    )
    return "trained"


def failure(c: Combination) -> str:
    """How a combination fails, in a few words; empty if it does not."""
    try:
        outcome(c)
    except Exception as error:
        return re.sub(r"blocks\.\d+|[\d.]+", "#", f"{type(error).__name__}: {error}")[:70]
    return ""


def shrunk(c: Combination) -> Combination:
    """The simplest combination that fails alike, by leaving out one thing at a time."""
    found = failure(c)
    while True:
        for other in simpler(c):
            if failure(other) == found:
                c = other
                break
        else:
            return c
