"""The generator of word problems.

Its answers are right, and training cannot have seen the held-out split.
"""

import re

import pytest

from lift_kernels.finetune import word_problems
from lift_kernels.finetune.metrics import extract_number
from lift_kernels.finetune.word_problems import ITEMS, KINDS, NAMES, TEMPLATES, fact, generate, split_of

COMPUTE = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__floordiv__}
FORMULA = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "++": lambda a, b, c: a + b + c,
    "+-": lambda a, b, c: a + b - c,
    "x+": lambda a, b, c: a * b + c,
    "x-": lambda a, b, c: a * b - c,
}


@pytest.fixture(scope="module", params=["train", "heldout"])
def split(request):
    return request.param, generate(600, request.param, seed=3)


def test_wordproblems_every_equation_and_answer_is_right(split):
    for problem in split[1]:
        equations = re.findall(r"(\d+) (.) (\d+) = (\d+)\.", problem.answer)
        assert [(int(a), op, int(b), int(r)) for a, op, b, r in equations] == list(problem.steps)
        for left, operator, right, result in problem.steps:
            assert COMPUTE[operator](left, right) == result > 0
            assert operator != "/" or left % right == 0
        assert problem.answer.endswith(f" The answer is {problem.steps[-1][3]}.")
        assert extract_number(problem.answer) == problem.steps[-1][3]


def test_wordproblems_answer_follows_from_the_question_alone(split):
    # The slots of the template are read back from the finished text. So a swapped operand would
    # show.
    for problem in split[1]:
        pattern = re.escape(problem.template)
        for slot in ("a", "b", "c"):
            pattern = pattern.replace(re.escape("{" + slot + "}"), rf"(?P<{slot}>\d+)")
        pattern = re.sub(r"\\\{(name|other|item)\\\}", r"\\w+", pattern)
        numbers = re.fullmatch(pattern, problem.question).groupdict()
        kind = "".join(step[1] for step in problem.steps)
        assert FORMULA[kind](*(int(numbers[slot]) for slot in sorted(numbers))) == problem.steps[-1][3]


def test_wordproblems_splits_share_no_phrasing_number_fact_name_or_item():
    train, heldout = generate(3000, "train", seed=0), generate(600, "heldout", seed=0)
    for property_ in (
        lambda p: {p.template},
        lambda p: {p.question},
        lambda p: {fact(*step) for step in p.steps},
        lambda p: {p.steps},
    ):
        assert not set().union(*map(property_, train)) & set().union(*map(property_, heldout))
    assert not set(NAMES["train"]) & set(NAMES["heldout"])
    assert not set(ITEMS["train"]) & set(ITEMS["heldout"])
    # The words around the slots differ too: no template is a copy with other slots.
    texts = {s: {re.sub(r"\{\w+\}", "", t) for ts in TEMPLATES[s].values() for t in ts} for s in TEMPLATES}
    assert not texts["train"] & texts["heldout"]


def test_wordproblems_fact_is_the_same_for_every_order_and_inversion():
    assert fact(5, "+", 7, 12) == fact(7, "+", 5, 12) == fact(12, "-", 5, 7) == fact(12, "-", 7, 5) == ("+", 5, 7)
    assert fact(3, "x", 4, 12) == fact(12, "/", 3, 4) == fact(12, "/", 4, 3) == ("x", 3, 4)
    assert split_of((5, "+", 7, 12)) == split_of((12, "-", 7, 5))


def test_wordproblems_covers_every_kind_and_phrasing_evenly(split):
    name, problems = split
    assert {p.template for p in problems} == {t for templates in TEMPLATES[name].values() for t in templates}
    counts = {kind: sum("".join(s[1] for s in p.steps) == kind for p in problems) for kind in KINDS}
    assert min(counts.values()) > 0.5 * len(problems) / len(KINDS)
    assert len({p.question for p in problems}) == len(problems)


def test_wordproblems_same_seed_same_problems_and_another_seed_others():
    assert generate(50, "train", seed=7) == generate(50, "train", seed=7) == generate(80, "train", seed=7)[:50]
    assert generate(50, "train", seed=7) != generate(50, "train", seed=8)
    first = generate(1, "heldout", seed=0)[0]  # the same on every machine
    assert (first.question, first.answer) == (
        "Each of 4 tables has 3 bottles on it. What is the number of bottles on all tables?",
        "4 x 3 = 12. The answer is 12.",
    )


def test_wordproblems_refuses_bad_arguments():
    assert generate(0, "train") == []
    with pytest.raises(ValueError, match="count is -1"):
        generate(-1, "train")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        generate(1, "test")


def test_wordproblems_templates_fit_their_kind():
    for templates in word_problems.TEMPLATES.values():
        assert tuple(templates) == KINDS
        for kind, phrasings in templates.items():
            for text in phrasings:
                slots = set(re.findall(r"\{(\w+)\}", text))
                assert slots - {"name", "other", "item"} == set("abc"[: len(kind) + 1]), text
                assert text.endswith("?")
