"""Word problems of three and four steps, told sentence by sentence.

An opening gives two numbers and thereby the first step. Each further step is a sentence of the same
story, and a question about the last result comes at the end. The splits share no sentence.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .word_problems_parts import ITEMS, NAMES, Equation, Problem, Split, equation, fact, split_of, worked_answer

KINDS = tuple("".join(order) for steps in (3, 4) for order in itertools.permutations("+-x/", steps))
"""The operators of a problem, from left to right: "+-x" is ((a + b) - c) x d."""
LARGEST = 1000  # no number is larger


@dataclass(frozen=True)
class Story:
    """Sentences that fit together, by operator. All are in the past tense.

    Attributes:
        openings: sentences with the numbers ``{a}`` and ``{b}`` of the first step.
        sentences: sentences with the number ``{n}`` of a later step.
        endings: questions about the last result.
    """

    openings: Mapping[str, Sequence[str]]
    sentences: Mapping[str, Sequence[str]]
    endings: Sequence[str]


STORIES: dict[Split, list[Story]] = {
    "train": [
        Story(
            openings={
                "+": [
                    "{name} had {a} {item} at home and {b} at school.",
                    "{name} collected {a} {item} in spring and {b} in summer.",
                ],
                "-": ["{name} had {a} {item} and lost {b} of them.", "{name} got {a} {item}, but {b} were broken."],
                "x": ["{name} had {b} boxes with {a} {item} in each.", "On each of {b} days {name} got {a} {item}."],
                "/": [
                    "{name} was one of {b} children who shared {a} {item} equally.",
                    "{a} {item} were put in {b} equal piles, and {name} got one pile.",
                ],
            },
            sentences={
                "+": [
                    "{other} gave {name} {n} more.",
                    "Then {name} bought another {n}.",
                    "Later {name} found {n} more in the attic.",
                ],
                "-": [
                    "{name} gave {n} of them to {other}.",
                    "After that {n} were lost on a trip.",
                    "{other} took {n} from {name}.",
                ],
                "x": [
                    "A year later {name} had {n} times as many.",
                    "Then {name} traded every one of them for {n} others.",
                    "After a lucky game {name} owned {n} times that number.",
                ],
                "/": [
                    "{name} kept one in every {n} {item}.",
                    "{name} packed them all in {n} equal bags and kept one bag.",
                    "{name} swapped every {n} {item} for a better one.",
                ],
            },
            endings=[
                "How many {item} did {name} have in the end?",
                "How many {item} did {name} own then?",
                "How many {item} was {name} left with?",
            ],
        ),
        Story(
            openings={
                "+": [
                    "A shop had {a} {item} in the window and {b} in the back.",
                    "A shop got {a} {item} from one maker and {b} from another.",
                ],
                "-": ["A shop ordered {a} {item}, but {b} never came.", "A shop had {a} {item} and sold {b} by noon."],
                "x": [
                    "A shop received {b} crates of {a} {item} each.",
                    "A shop filled {b} shelves with {a} {item} each.",
                ],
                "/": [
                    "{b} shops shared {a} {item} equally, and one shop was {name}'s.",
                    "A shop got one of {b} equal parts of {a} {item}.",
                ],
            },
            sentences={
                "+": [
                    "A truck brought {n} more to the shop.",
                    "{other} ordered {n} others for the shop.",
                    "Customers returned {n} to the shop.",
                ],
                "-": [
                    "The shop sold {n} on Monday.",
                    "At night thieves took {n}.",
                    "Then {n} got damaged and were thrown away.",
                ],
                "x": [
                    "A delivery made the stock {n} times as large.",
                    "The shop raised its stock to {n} times that number.",
                    "A new owner made the stock {n} times as big.",
                ],
                "/": [
                    "After a sale just one in every {n} {item} was left.",
                    "The owner split the stock in {n} equal parts and kept one.",
                    "The shop sent all but one in every {n} {item} back.",
                ],
            },
            endings=["How many {item} did the shop have then?", "How many {item} remained in the shop?"],
        ),
        Story(
            openings={
                "+": [
                    "A school got {a} {item} from {name}'s class and {b} from {other}'s class.",
                    "A school had {a} {item} in the hall and {b} in the gym.",
                ],
                "-": [
                    "A school bought {a} {item} and gave {b} to the teachers.",
                    "Of {a} {item} at a school, {b} were too old to keep.",
                ],
                "x": [
                    "Each of {b} classes brought {a} {item} to the school.",
                    "A school had {b} rooms with {a} {item} in each room.",
                ],
                "/": [
                    "A school got one of {b} equal parts of {a} {item}.",
                    "A school was one of {b} schools that divided {a} {item} equally.",
                ],
            },
            sentences={
                "+": [
                    "The parents added {n} to those of the school.",
                    "A neighbor brought {n} more to the school.",
                    "The school bought another {n}.",
                ],
                "-": [
                    "The first grade used up {n} of them.",
                    "The pupils took {n} home from the school.",
                    "A dog ruined {n} of them.",
                ],
                "x": [
                    "A donor brought the school to {n} times that number.",
                    "Soon the school's number was {n} times as large.",
                    "By May the school had {n} times as many.",
                ],
                "/": [
                    "The school gave all but one in every {n} {item} away.",
                    "The school put all in {n} equal heaps and kept one.",
                    "Only one in every {n} {item} passed a check and stayed.",
                ],
            },
            endings=["How many {item} did the school have at last?", "How many {item} were then at the school?"],
        ),
    ],
    "heldout": [
        Story(
            openings={
                "+": ["A museum stored {a} {item} upstairs and {b} downstairs."],
                "-": ["A museum owned {a} {item}, of which {b} were stolen."],
                "x": ["A museum displayed {b} cases that held {a} {item} apiece."],
                "/": ["{a} {item} were split fairly between {b} museums, and {name} ran one museum."],
            },
            sentences={
                "+": ["Visitors donated {n} extra ones.", "{name} dug up a further {n} for the museum."],
                "-": ["The museum returned {n} to their owners.", "In a fire {n} burned."],
                "x": [
                    "Two years on, the museum owned {n} times this quantity.",
                    "{other}'s gift made the collection {n} times its former size.",
                ],
                "/": [
                    "The museum sold all except one out of {n} {item}.",
                    "A flood spared just one out of {n} {item}.",
                ],
            },
            endings=["What was the museum's final number of {item}?"],
        ),
        Story(
            openings={
                "+": ["{name} carried {a} {item} in a cart and {b} in a sack."],
                "-": ["{name} set out with {a} {item}, and {b} fell off the cart."],
                "x": ["{name} loaded {b} carts with {a} {item} apiece."],
                "/": ["{b} traders split {a} {item} fairly, and {name} was one trader."],
            },
            sentences={
                "+": ["At the market {name} acquired {n} additional ones.", "{other} threw in {n} for free."],
                "-": ["Robbers seized {n}.", "{name} paid a toll of {n}."],
                "x": [
                    "{name} made a deal and received {n} for each one.",
                    "{other} handed {name} {n} in exchange for every single one.",
                ],
                "/": [
                    "Border guards let through one out of {n} {item}.",
                    "{name} turned each {n} {item} into a bigger one.",
                ],
            },
            endings=["What number of {item} did {name} bring back?"],
        ),
    ],
}


def _operands(left: int, operator: str) -> Sequence[int]:
    """Return the second operands of a step whose result is a number from 2 to LARGEST."""
    if operator == "x":
        return range(3, min(9, LARGEST // left) + 1)
    if operator == "/":
        return [n for n in range(2, 10) if left % n == 0 and left // n > 1]
    return range(11, min(200, LARGEST - left if operator == "+" else left - 2) + 1)


def _draw(kind: str, split: Split, rng: random.Random) -> tuple[list[int], list[Equation]] | None:
    """Draw the operands of a problem and compute its steps; None where this led nowhere."""
    left = rng.randint(12, 300)
    operands: list[int] = [left]
    steps: list[Equation] = []
    for operator in kind:
        choices = _operands(left, operator)
        tried = (equation(left, operator, rng.choice(choices)) for _ in range(8 if choices else 0))
        facts = {fact(*step) for step in steps}  # none twice, such as in x 3 and / 3
        step = next((e for e in tried if split_of(e) == split and fact(*e) not in facts), None)
        if step is None:
            return None
        operands.append(step[2])
        steps.append(step)
        left = step[3]
    return operands, steps


def _template(story: Story, kind: str, rng: random.Random) -> str:
    """Return the text of a problem, with a letter in braces in place of each number."""
    sentences = [rng.choice(story.openings[kind[0]])]
    for operator, letter in zip(kind[1:], "cde", strict=False):
        sentences.append(rng.choice(story.sentences[operator]).replace("{n}", "{" + letter + "}"))
    return " ".join([*sentences, rng.choice(story.endings)])


def stream(split: Split, seed: int) -> Iterator[Problem]:
    """Yield hard problems of a split without end; one may repeat."""
    rng = random.Random(f"hard-{split}-{seed}")
    while True:
        for kind in rng.sample(KINDS, len(KINDS)):  # every kind equally often
            while (drawn := _draw(kind, split, rng)) is None:
                pass
            operands, steps = drawn
            template = _template(rng.choice(STORIES[split]), kind, rng)
            name, other = rng.sample(NAMES[split], 2)
            numbers = dict(zip("abcde", operands, strict=False))
            question = template.format(name=name, other=other, item=rng.choice(ITEMS[split]), **numbers)
            yield Problem(question, worked_answer(steps), template, tuple(steps))
