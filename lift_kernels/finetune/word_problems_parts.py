"""What word problems of every level share: names, items, facts and the form of an answer.

The training and the held-out split share no phrasing, no name, no item and no arithmetic fact. A
fact is an equation up to order and inversion. 5 + 7 = 12, 7 + 5 = 12 and 12 - 5 = 7 are one fact,
which belongs to one split only.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]
Equation = tuple[int, str, int, int]
"""(left, operator, right, result); the operator is one of ``+ - x /``."""

# One fact in HELDOUT_SHARE is reserved for the held-out split.
HELDOUT_SHARE = 4


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer.

    Attributes:
        question: text of the question.
        answer: text of the answer, which contains the result.
        template: text that the question was made from; empty for a problem from a file.
        steps: (left, operator, right, result) of every equation; empty for a problem from a file.
    """

    question: str
    answer: str
    template: str = ""
    steps: tuple[Equation, ...] = ()


NAMES: dict[Split, list[str]] = {
    "train": "Anna Ben Carla Daniel Emma Felix Grace Henry Ines Jack Kate Liam Maria Noah Olga Paul Rosa Sam Tom "
    "Vera".split(),
    "heldout": "Alice Bruno Chloe David Elena Frank Hana Ivan Julia Leo".split(),
}
ITEMS: dict[Split, list[str]] = {
    "train": "apples books pencils stickers marbles cards shells coins eggs cookies balloons flowers stamps oranges "
    "toys buttons".split(),
    "heldout": "stones candies pears bottles keys ribbons postcards tickets".split(),
}


def fact(left: int, operator: str, right: int, result: int) -> tuple[str, int, int]:
    """Return the arithmetic fact behind an equation, the same for all orders and inversions."""
    x, y = (left, right) if operator in "+x" else (right, result)
    return "+" if operator in "+-" else "x", min(x, y), max(x, y)


def split_of(equation: Equation) -> Split:
    """Return the split that an equation belongs to, with all its orders and inversions."""
    return "heldout" if zlib.crc32(repr(fact(*equation)).encode()) % HELDOUT_SHARE == 0 else "train"


def equation(left: int, operator: str, right: int) -> Equation:
    """Return an equation with its result."""
    result = {"+": left + right, "-": left - right, "x": left * right, "/": left // right}[operator]
    return left, operator, right, result


def worked_answer(steps: Sequence[Equation]) -> str:
    """Return the equations of an answer as text, with the last result at its end."""
    work = [f"{left} {operator} {right} = {result}." for left, operator, right, result in steps]
    return " ".join([*work, f"The answer is {steps[-1][3]}."])
