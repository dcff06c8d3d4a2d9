"""Hard word problems: three and four steps that are right, and splits that share nothing."""

import itertools
import re
import zlib

import pytest

from lift_kernels.finetune.word_problems import ITEMS, NAMES, TEMPLATES, fact, generate, split_of
from lift_kernels.finetune.word_problems_hard import KINDS, LARGEST, STORIES

COMPUTE = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__floordiv__}


@pytest.fixture(scope="module", params=["train", "heldout"])
def split(request):
    return request.param, generate(2400, request.param, seed=3, level="hard")


def sentences(name):
    """The sentences of a split, with blanks in place of the slots."""
    for story in STORIES[name]:
        for text in itertools.chain(*story.openings.values(), *story.sentences.values(), story.endings):
            yield re.sub(r"\{\w+\}", "_", text)


def test_every_equation_and_answer_is_right(split):
    for problem in split[1]:
        equations = re.findall(r"(\d+) (.) (\d+) = (\d+)\.", problem.answer)
        assert [(int(a), op, int(b), int(r)) for a, op, b, r in equations] == list(problem.steps)
        for left, operator, right, result in problem.steps:
            assert COMPUTE[operator](left, right) == result and 1 < result <= LARGEST
            assert operator != "/" or left % right == 0
        assert all(step[0] == before[3] for before, step in itertools.pairwise(problem.steps))
        assert problem.answer.endswith(f" = {problem.steps[-1][3]}. The answer is {problem.steps[-1][3]}.")


def test_answer_follows_from_the_question_alone(split):
    for problem in split[1]:
        pattern = re.sub(r"\\\{([a-e])\\\}", r"(?P<\1>\\d+)", re.escape(problem.template))
        pattern = re.sub(r"\\\{(name|other|item)\\\}", r"\\w+", pattern)
        slots = re.fullmatch(pattern, problem.question).groupdict()
        first, *others = (int(slots[slot]) for slot in sorted(slots))
        kind = "".join(step[1] for step in problem.steps)
        assert len(others) == len(kind)
        for operator, number in zip(kind, others, strict=True):
            first = COMPUTE[operator](first, number)
        assert first == problem.steps[-1][3]


def test_facts_belong_to_their_split_and_none_is_used_twice_in_a_problem(split):
    for problem in split[1]:
        assert {split_of(step) for step in problem.steps} == {split[0]}
        assert len({fact(*step) for step in problem.steps}) == len(problem.steps)


def test_splits_share_no_phrasing_number_fact_name_or_item_whatever_the_levels():
    train, heldout = (
        [p for level in ("plain", "hard") for p in generate(count, name, level=level)]
        for name, count in (("train", 3000), ("heldout", 1000))
    )
    for property_ in (lambda p: {p.template}, lambda p: {p.question}, lambda p: {fact(*step) for step in p.steps}):
        assert not set().union(*map(property_, train)) & set().union(*map(property_, heldout))
    words = {name: set(NAMES[name] + ITEMS[name]) for name in ("train", "heldout")}
    assert not words["train"] & words["heldout"]
    for problems, others in ((train, words["heldout"]), (heldout, words["train"])):
        assert not any(others & set(re.findall(r"\w+", p.question)) for p in problems)
    plain = {n: {re.sub(r"\{\w+\}", "_", t) for ts in TEMPLATES[n].values() for t in ts} for n in TEMPLATES}
    texts = {name: set(sentences(name)) | plain[name] for name in ("train", "heldout")}
    assert not texts["train"] & texts["heldout"]


def test_every_kind_comes_equally_often_and_every_sentence_is_used(split):
    name, problems = split
    counts = {kind: sum("".join(s[1] for s in p.steps) == kind for p in problems) for kind in KINDS}
    assert set(counts.values()) == {2400 // len(KINDS)} and len(KINDS) == 48
    used = {part for p in problems for part in re.split(r"(?<=[.?]) ", re.sub(r"\{\w+\}", "_", p.template))}
    assert used == set(sentences(name))
    assert len({p.question for p in problems}) == len(problems)


def test_problems_are_short_and_numbers_are_large(split):
    words = [len(f"{p.question} {p.answer}".split()) for p in split[1]]
    assert sum(words) / len(words) < 64 and max(words) <= 75
    results = [p.steps[-1][3] for p in split[1]]
    assert 150 < sum(results) / len(results) and max(results) > 900


def test_same_seed_same_problems_and_another_seed_others():
    def hard(count, seed):
        return generate(count, "train", seed=seed, level="hard")

    assert hard(50, 7) == hard(50, 7) == hard(80, 7)[:50] != hard(50, 8)
    first = generate(1, "heldout", seed=0, level="hard")[0]  # the same on every machine
    assert (first.question, first.answer) == (
        "Elena loaded 4 carts with 202 candies apiece. At the market Elena acquired 22 additional ones. "
        "Border guards let through one out of 5 candies. What number of candies did Elena bring back?",
        "202 x 4 = 808. 808 + 22 = 830. 830 / 5 = 166. The answer is 166.",
    )


def test_slots_of_the_sentences_fit_their_place():
    for story in itertools.chain(*STORIES.values()):
        assert set(story.openings) == set(story.sentences) == set("+-x/")
        for place, texts, numbers in (
            ("opening", itertools.chain(*story.openings.values()), {"a", "b"}),
            ("sentence", itertools.chain(*story.sentences.values()), {"n"}),
            ("ending", story.endings, set()),
        ):
            for text in texts:
                slots = set(re.findall(r"\{(\w+)\}", text))
                assert slots - {"name", "other", "item"} == numbers, (place, text)
                assert text.endswith("?" if place == "ending" else ".")
                assert "{item}" in text or place == "sentence", text


def test_an_unknown_level_is_refused():
    assert generate(0, "train", level="hard") == []
    with pytest.raises(ValueError, match="unknown level 'easy'; use one of plain, hard"):
        generate(1, "train", level="easy")


def test_plain_problems_are_those_of_before_there_were_levels():
    checksums = [
        zlib.crc32("".join(p.question + p.answer for p in generate(500, name)).encode())
        for name in ("train", "heldout")
    ]
    assert checksums == [161905479, 406257999]
    assert generate(20, "train", 4) == generate(20, "train", 4, "plain")
