"""Plans: what ranks are about to do together, compared before the first of them does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

_WEIGHTS = (
    "give every rank the same weights before masks are made: seed the ranks alike, or broadcast rank 0's weights, as "
    "DistributedDataParallel does when it is constructed"
)
_ENTRIES = (
    "their masks were made from different weights, options or seeds, or before there was a group: give pack_gradients "
    "process_group= too, and every rank the same weights before it"
)
_OTHERWISE = "give every rank the same model and options, and the same calls in the same order"


@dataclass(frozen=True)
class Plan:
    """What one rank is about to do.

    Attributes:
        what: `MASKS`, `LOADED` or `TRAINS`.
        options: by name.
        matrices: name of each matrix, and what it is on this rank, by field: its shape and so on.
        problem: why this rank cannot do it, or empty.
    """

    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    matrices: Sequence[tuple[str, Mapping[str, Any]]] = ()
    problem: str = ""

    MASKS: ClassVar[str] = "makes masks"
    LOADED: ClassVar[str] = "has loaded a state"
    TRAINS: ClassVar[str] = "trains entries"

    def __str__(self) -> str:
        """What it is about, such as "makes masks of NAME and 2 more"."""
        more = f" and {len(self.matrices) - 1} more" if len(self.matrices) > 1 else ""
        return f"{self.what} of {self.matrices[0][0]}{more}" if self.matrices else self.what

    def text(self) -> str:
        """The plan as text. Equal plans have equal texts."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def of_text(cls, text: str) -> Plan:
        """The plan that `text` has written."""
        return cls(**json.loads(text))


def difference(low: int, one: Plan, high: int, other: Plan) -> str:
    """How the plans of two ranks differ, and what to do about it; empty where they do not."""
    if one.what != other.what:
        return f"rank {low} {one.what} while rank {high} {other.what}; {_OTHERWISE}"
    for name in sorted(one.options.keys() | other.options.keys()):
        values = one.options.get(name), other.options.get(name)
        if values[0] != values[1]:
            return f"{name} is {values[0]!r} on rank {low} and {values[1]!r} on rank {high}; {_OTHERWISE}"
    names = [[name for name, _ in plan.matrices] for plan in (one, other)]
    for rank, own, absent, others in ((low, names[0], high, names[1]), (high, names[1], low, names[0])):
        extra = [name for name in own if name not in set(others)]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            return f"only rank {rank} {one.what} of {extra[0]}{more}, not rank {absent}; {_OTHERWISE}"
    if names[0] != names[1]:
        place = next(i for i, pair in enumerate(zip(*names)) if pair[0] != pair[1])
        return (
            f"matrix {place} is {names[0][place]} on rank {low} and {names[1][place]} on rank {high}: they come in "
            f"another order; {_OTHERWISE}"
        )
    for what in dict.fromkeys(what for _, fields in one.matrices for what in fields):
        found = [
            (name, of_one.get(what), of_other.get(what))
            for (name, of_one), (_, of_other) in zip(one.matrices, other.matrices)
            if of_one.get(what) != of_other.get(what)
        ]
        if found:
            name, here, there = found[0]
            more = f" and of {len(found) - 1} more matrices" if len(found) > 1 else ""
            if what == "entries":
                return f"ranks {low} and {high} would train different entries of {name}{more}; {_ENTRIES}"
            if what == "weights":
                return f"ranks {low} and {high} hold different weights of {name}{more}; {_WEIGHTS}"
            return f"{what} of {name}{more} is {here} on rank {low} and {there} on rank {high}; {_OTHERWISE}"
    return ""
