"""Arithmetic word problems with worked answers, for fine-tuning and evaluation.

`generate` makes problems of two levels: plain ones of one or two steps, whose phrasings stand here,
and hard ones of three or four, of `word_problems_hard`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, get_args

from . import word_problems_hard
from .word_problems_parts import ITEMS, NAMES, Equation, Problem, Split, equation, fact, split_of, worked_answer

__all__ = [
    "ITEMS",
    "KINDS",
    "LEVELS",
    "NAMES",
    "TEMPLATES",
    "Level",
    "Problem",
    "Split",
    "fact",
    "generate",
    "split_of",
]

Level = Literal["plain", "hard"]
LEVELS: tuple[Level, ...] = get_args(Level)

# Operators are applied from left to right: "+-" is (a + b) - c. A problem asks for the last result.
TEMPLATES: dict[Split, dict[str, list[str]]] = {
    "train": {
        "+": [
            "{name} has {a} {item}. {other} gives {name} {b} more. How many {item} does {name} have now?",
            "There are {a} {item} in one box and {b} {item} in another. How many {item} are there in all?",
            "{name} found {a} {item} on Monday and {b} on Tuesday. How many {item} did {name} find?",
            "A shop sold {a} {item} in the morning and {b} in the evening. How many {item} did it sell?",
            "{name} has {a} {item} and {other} has {b}. How many {item} do they have together?",
            "{name} had {a} {item} and bought {b} more. How many {item} does {name} have?",
            "{a} {item} are in the bag. {name} puts {b} more into it. How many {item} does the bag hold?",
            "{name} made {a} {item} and {other} made {b}. What is the sum of their {item}?",
            "Yesterday {name} got {a} {item}. Today {other} brought another {b}. How many {item} is that altogether?",
        ],
        "-": [
            "{name} had {a} {item} and lost {b}. How many {item} are left?",
            "There were {a} {item} on the table. {name} took {b} of them. How many {item} remain?",
            "{name} has {a} {item} and gives {b} to {other}. How many {item} does {name} keep?",
            "A shop had {a} {item} and sold {b}. How many {item} does it still have?",
            "{name} has {a} {item}. {other} has {b}. How many more {item} does {name} have than {other}?",
            "{name} needs {a} {item} and has {b}. How many more {item} does {name} need?",
            "From a box of {a} {item}, {name} removed {b}. How many {item} stayed in the box?",
            "Of {a} {item}, {b} are old. How many {item} are new?",
            "{name} ate {b} of the {a} {item} in the bowl. How many {item} were not eaten?",
            "{b} of {name}'s {a} {item} fell down. How many {item} did not fall?",
        ],
        "x": [
            "{name} has {a} boxes with {b} {item} in each. How many {item} does {name} have?",
            "There are {a} bags. Each bag holds {b} {item}. How many {item} are there?",
            "{name} buys {b} {item} every day for {a} days. How many {item} does {name} buy?",
            "{a} children have {b} {item} each. How many {item} do they have together?",
            "{name} puts {item} in {a} rows of {b}. How many {item} are there?",
            "On each of {a} plates lie {b} {item}. What is the number of {item} on the plates?",
            "Every week {name} gets {b} {item}. How many {item} does {name} get in {a} weeks?",
            "{name} fills {a} jars and puts {b} {item} in every jar. How many {item} are in the jars?",
            "One pack holds {b} {item}. How many {item} are in {a} packs?",
        ],
        "/": [
            "{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?",
            "{a} {item} are packed in boxes of {b}. How many boxes are needed?",
            "{name} puts {a} {item} in {b} equal piles. How many {item} are in each pile?",
            "{a} {item} are split evenly between {b} children. How many {item} does each child get?",
            "{name} divides {a} {item} into {b} equal groups. How many {item} are in one group?",
            "{b} children share {a} {item}. How many {item} are there for each child?",
            "{name} has {a} {item} and puts {b} in every bag. How many bags does {name} fill?",
            "A teacher hands out {a} {item} fairly to {b} pupils. How many {item} does one pupil get?",
        ],
        "++": [
            "{name} has {a} {item}, {other} has {b} and a friend has {c}. How many {item} do they have in total?",
            "{name} found {a} {item} on Monday, {b} on Tuesday and {c} on Friday. How many {item} is that?",
            "A box holds {a} {item}. {name} adds {b} and then {c} more. How many {item} are in the box?",
            "First {a} {item} arrive, then {b} and finally {c}. What is the total number of {item}?",
            "{name} made {a} {item}, {other} made {b}, and a neighbor made {c}. How many {item} were made?",
            "On the table are {a} {item}, on the chair {b} and on the floor {c}. How many {item} are in the room?",
        ],
        "+-": [
            "{name} had {a} {item}, bought {b} more and gave away {c}. How many {item} does {name} have now?",
            "{name} has {a} {item} and {other} has {b}. Together they sell {c}. How many {item} are left?",
            "There were {a} {item} in a box. {name} put in {b} and took out {c}. How many {item} are in the box?",
            "{name} got {a} {item} and {other} got {b}, but {c} were lost. How many {item} did they still have?",
            "To {a} {item} {name} added {b}. Later {c} broke. How many {item} stayed whole?",
            "A bus has {a} {item} on it. It loads {b} more and unloads {c}. How many {item} are on the bus?",
        ],
        "x+": [
            "{name} has {a} bags of {b} {item} and {c} more {item}. How many {item} does {name} have?",
            "There are {a} boxes with {b} {item} each. {name} adds {c} {item}. How many {item} are there?",
            "{name} buys {b} {item} a day for {a} days and gets {c} more from {other}. How many {item} is that?",
            "In {a} rows stand {b} {item} each, and {c} {item} stand apart. How many {item} are there?",
            "{name} made {a} sets of {b} {item}. Then {other} made {c} more. What is the total number of {item}?",
            "Each of {a} children brings {b} {item}, and the teacher brings {c}. How many {item} are brought?",
        ],
        "x-": [
            "{name} has {a} boxes with {b} {item} each and gives away {c}. How many {item} are left?",
            "{name} filled {a} bags with {b} {item} each. {other} took {c} of them. How many {item} remain?",
            "A shop got {a} packs of {b} {item} and sold {c} {item}. How many {item} does it have left?",
            "{name} bought {a} packs of {b} {item}, but {c} of them broke. How many {item} were whole?",
            "There are {a} plates with {b} {item} each. The guests eat {c} {item}. How many {item} stay?",
            "{a} children picked {b} {item} each and used {c} of them. How many {item} were not used?",
        ],
    },
    "heldout": {
        "+": [
            "In the drawer are {a} {item}. After {name} puts in another {b}, how many {item} does it hold?",
            "{name} collected {a} {item} and {other} collected {b}. What is the total number of {item}?",
        ],
        "-": [
            "{name} used {b} of the {a} {item} in the kitchen. How many {item} were not used?",
            "Out of {a} {item}, {b} broke. How many {item} are whole?",
        ],
        "x": [
            "Each of {a} tables has {b} {item} on it. What is the number of {item} on all tables?",
            "{name} carries {b} {item} on every trip and makes {a} trips. How many {item} are carried?",
        ],
        "/": [
            "{b} people divide {a} {item} fairly. How many {item} go to each person?",
            "{name} arranges {a} {item} in {b} equal rows. How many {item} are in a row?",
        ],
        "++": ["A truck loads {a} {item}, later {b} and at last {c}. What is the total number of {item} loaded?"],
        "+-": ["{name} picked {a} {item}, {other} picked {b}, and they ate {c}. How many {item} did they still have?"],
        "x+": ["On {a} shelves stand {b} {item} each, and {c} {item} lie on the floor. How many {item} are there?"],
        "x-": ["{name} made {a} sets of {b} {item}, but {c} {item} were bad. How many good {item} did {name} make?"],
    },
}
KINDS = tuple(TEMPLATES["train"])


def _draw(kind: str, rng: random.Random) -> tuple[list[int], list[Equation]]:
    """Draw the operands of a problem and compute its steps."""
    operands: list[int] = []
    steps: list[Equation] = []
    for operator in kind:
        left = steps[-1][3] if steps else rng.randint(2, 18 if operator == "-" else 9)
        right = rng.randint(2, 9)
        if operator == "/":
            left *= right
        operands += [right] if steps else [left, right]
        steps.append(equation(left, operator, right))
    return operands, steps


def _stream(split: Split, seed: int) -> Iterator[Problem]:
    """Yield plain problems of a split without end; some repeat."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        for kind in rng.sample(KINDS, len(KINDS)):  # every kind equally often
            while True:
                operands, steps = _draw(kind, rng)
                if all(step[3] > 0 and split_of(step) == split for step in steps):
                    break
            template = rng.choice(TEMPLATES[split][kind])
            name, other = rng.sample(NAMES[split], 2)
            numbers = dict(zip("abc", operands, strict=False))
            question = template.format(name=name, other=other, item=rng.choice(ITEMS[split]), **numbers)
            yield Problem(question, worked_answer(steps), template, tuple(steps))


def generate(count: int, split: Split, seed: int = 0, level: Level = "plain") -> list[Problem]:
    """Return different problems of a split; the same arguments give the same problems.

    Args:
        count: number of problems.
        split: "train" or "heldout".
        seed: seed of the random choices.
        level: "plain" for one or two steps with numbers up to 90, "hard" for three or four with
            numbers up to 1000.

    Raises:
        ValueError: for a negative count, an unknown split or an unknown level.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(get_args(Split))}")
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; use one of {', '.join(LEVELS)}")
    stream = _stream(split, seed) if level == "plain" else word_problems_hard.stream(split, seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = next(stream)
        problems.setdefault(problem.question, problem)
    return list(problems.values())
