"""Which metric fits the answers of some data, and what each counts as right."""

import pytest

from lift_kernels.errors import UserError
from lift_kernels.finetune.metrics import MOST_CHOICES, SHORT, choose_metric, same_text
from lift_kernels.finetune.prompts import Sample


def samples(*answers: str) -> list[Sample]:
    return [Sample("?", f" {a}", "?", a, f"data.jsonl, line {i}") for i, a in enumerate(answers, 1)]


MANY = [f"colour {'abcdefghijk'[i]}" for i in range(MOST_CHOICES + 1)]


@pytest.mark.parametrize(
    ("answers", "name", "why"),
    [
        (["3 + 4 = 7. The answer is 7.", "12 apples"], "number", "for every answer ends in a number"),
        (["yes", "no", "no", "yes"], "choice", "for there are 2 different answers, each repeated"),
        (["yes", " yes\n", "no", "no"], "choice", "for there are 2 different answers, each repeated"),
        (["yes", "no", "yes"], "exact", f"for every answer is a line of at most {SHORT} tokens"),
        (["yes", "yes"], "exact", f"for every answer is a line of at most {SHORT} tokens"),
        (MANY * 2, "exact", f"for every answer is a line of at most {SHORT} tokens"),
        (["Paris", "in 1945"], "exact", f"for every answer is a line of at most {SHORT} tokens"),
        (["x" * SHORT, "y"], "exact", f"for every answer is a line of at most {SHORT} tokens"),
        (["x" * (SHORT + 1), "y"], "none", f"for some answers have more than one line or more than {SHORT} tokens"),
        (["one\ntwo", "y"], "none", f"for some answers have more than one line or more than {SHORT} tokens"),
        (["yes", ""], "none", "for not every sample has an answer"),
        (["", ""], "none", "for not every sample has an answer"),
    ],
)
def test_the_first_metric_that_fits_is_chosen_and_says_why(tokenizer, answers, name, why):
    metric = choose_metric(samples(*answers), None, tokenizer)
    assert metric.name == name
    assert metric.why == why + ("" if name == "none" else "; --metric none skips it")


def test_texts_that_merely_mention_a_number_have_no_number_as_answer(tokenizer):
    long = "In 1945 " + "the war ended and people went home " * 3
    assert choose_metric(samples(long, long + "too"), None, tokenizer).name == "none"
    assert choose_metric(samples(long + "#### 4", long + "so 7 of them"), None, tokenizer).name == "number"


def test_a_metric_that_is_asked_for_is_taken_where_it_fits(tokenizer):
    for name, answers in (
        ("exact", ["7", "8"]),
        ("exact", ["two\nlines", "x" * 99]),
        ("choice", ["7", "8"]),
        ("none", ["7", ""]),
        ("number", ["7 of all the many apples that he has got in his house", "8"]),
    ):
        metric = choose_metric(samples(*answers), name, tokenizer)
        assert (metric.name, metric.why) == (name, "as asked for")
        assert metric.choices == (("7", "8") if name == "choice" else ())


@pytest.mark.parametrize(
    ("asked", "answers", "said"),
    [
        ("number", ["7", "seven"], "data.jsonl, line 2: the answer 'seven' holds no number for metric number; use "),
        ("number", ["7", ""], "data.jsonl, line 2: there is no answer for metric number to score; use --metric none"),
        ("exact", ["", "7"], "data.jsonl, line 1: there is no answer for metric exact to score; use --metric none"),
        ("choice", [" "], "data.jsonl, line 1: there is no answer for metric choice to score; use --metric none"),
        (
            "choice",
            MANY,
            "data.jsonl, line 11: the answer 'colour k' is the 11th different one, and metric choice compares at most "
            "10; use --metric exact or none",
        ),
        (
            "choice",
            ["yes", "yes"],
            "data.jsonl, line 1: all held-out answers are 'yes', and metric choice needs different ones; hold out more",
        ),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_with_the_place(tokenizer, asked, answers, said):
    with pytest.raises(UserError) as error:
        choose_metric(samples(*answers), asked, tokenizer)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert "--metric" in str(error.value)


def test_exact_ignores_case_white_space_and_a_final_full_stop(tokenizer):
    for text in ("New York", "new  york.", " NEW\nYORK ", "New York ."):
        assert same_text(text, "New York."), text
    for text in ("New York!", "NewYork", "York", "New York..", ""):
        assert not same_text(text, "New York."), text
    exact = choose_metric(samples("Paris", "Rome"), "exact", tokenizer)
    assert exact.right("paris.", "Paris") and not exact.right("Paris, of course", "Paris")
    number = choose_metric(samples("1,000", "2"), "number", tokenizer)
    assert number.right("so it is 1000 in all", "1,000") and not number.right("none", "2")


def test_descriptions_name_what_is_compared(tokenizer):
    choice = choose_metric(samples("yes", "no", "yes", "no"), None, tokenizer)
    assert (
        choice.description
        == "of the held-out answers no | yes, the expected one has the highest probability as a whole text"
    )
    long = choose_metric(samples("a\nb", "c" * 99), "choice", tokenizer)
    assert long.description.startswith(f"of the held-out answers a b | {'c' * 40}, the expected one")
    assert choose_metric(samples("a", "b"), "none", tokenizer).description.startswith("no answers are scored")
