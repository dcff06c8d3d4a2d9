"""How a model is evaluated: losses, greedy answers, choices, numbers and intervals."""

import pytest
import torch
from helpers.data_rows import make_chat_tokenizer
from helpers.word_problem_examples import asked, encoded
from transformers import AutoModelForCausalLM, GenerationConfig

from lift_kernels.finetune import decoding, evaluation, forward, intervals, measure, metrics, prompts, word_problems


def test_evaluation_answer_loss_is_the_mean_over_answer_tokens_whatever_the_padding(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    examples = [encoded(tokenizer, p) for p in word_problems.generate(5, "train")]
    assert len({len(e["input_ids"]) for e in examples}) > 1
    total, count = evaluation.answer_loss(model, prompts.collate(examples, tokenizer.pad_token_id))
    expected = 0.0
    for e in examples:
        logits = model(input_ids=torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1)
        expected -= sum(logits[i - 1, t].item() for i, t in enumerate(e["labels"]) if t != prompts.IGNORE)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == sum(t != prompts.IGNORE for e in examples for t in e["labels"])


def test_evaluation_greedy_answers_with_a_shared_prefix_equal_generate(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    shots = [encoded(tokenizer, p) for p in word_problems.generate(2, "train")]
    prefix = prompts.join(tokenizer, shots)["input_ids"]
    questions = [p.question for p in word_problems.generate(5, "heldout")]
    answers = decoding.greedy_answers(
        model, tokenizer, [asked(tokenizer, q) for q in questions], prefix, 12, 2, "answers"
    )
    for question, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([prefix + tokenizer(prompts.prompt(question))["input_ids"]])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
    assert len(set(answers)) > 1


QUESTIONS = ["Who?", "Where in the world is it?", "When, then?", "Why is that so?", "How?"]


def alone(tokenizer, question: str) -> list[int]:
    return prompts.encode_prompt(tokenizer, prompts.single_example(question, "x"), alone=True)


def test_answers_of_their_own_end_with_a_stop_token_and_keep_their_lines(tiny, tokenizer):
    """Without worked examples, the answers are those of generate, up to what ends a text."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    newline = tokenizer("\n")["input_ids"][0]
    model.lm_head.weight.data[newline] *= 3  # so that answers have lines
    asked = [alone(tokenizer, question) for question in QUESTIONS]
    plain = [
        model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist() for ids in asked
    ]
    second = plain[0][len(plain[0]) // 2]
    ends = [tokenizer.eos_token_id, second]
    answers = decoding.greedy_answers(model, tokenizer, asked, [], 24, 2, "answers", ends)
    for row, answer in zip(plain, answers, strict=True):
        cut = next((i for i, token in enumerate(row) if token in ends), len(row))
        assert answer == tokenizer.decode(row[:cut], skip_special_tokens=True).strip()
    assert any("\n" in answer for answer in answers)
    shared = decoding.greedy_answers(model, tokenizer, [ids[4:] for ids in asked], asked[0][:4], 24, 2, "answers", ends)
    assert shared == answers, "a common beginning as prefix changes nothing"


def test_an_answer_ends_with_what_tokenizer_model_or_chat_template_end_it_with(tiny):
    tokenizer = make_chat_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tiny)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert decoding.end_tokens(model, tokenizer) == [eos]
    model.generation_config = GenerationConfig(eos_token_id=[eos, 7, 9])
    assert decoding.end_tokens(model, tokenizer) == [eos, 7, 9]
    word, newline = (tokenizer(text)["input_ids"] for text in ("word", "\n"))
    model.generation_config = GenerationConfig(eos_token_id=7)
    assert decoding.end_tokens(model, tokenizer, [[*word, pad, *newline], word]) == [eos, pad, 7]
    assert decoding.end_tokens(model, tokenizer, [[pad, *word, *newline]]) == [eos, 7], "a token inside ends nothing"


@pytest.mark.parametrize("prefix", [[], [70, 71, 72, 73]], ids=["alone", "prefix"])
@pytest.mark.parametrize("cached", [True, False])
def test_losses_of_choices_are_those_of_whole_texts(tiny, tokenizer, monkeypatch, prefix, cached):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    if not cached:
        monkeypatch.setattr(decoding, "_cache_prefix", lambda *arguments: None)
    choices = [tokenizer(text)["input_ids"] + [0] for text in (" yes", " no", " it may well be")]
    asked = [alone(tokenizer, question) for question in QUESTIONS]
    found = decoding.choice_losses(model, tokenizer, asked, prefix, choices, "answers")
    for ids, row in zip(asked, found, strict=True):
        for choice, loss in zip(choices, row, strict=True):
            text = prefix + ids + choice
            logits = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
            start = len(text) - len(choice)
            expected = -sum(logits[start + i - 1, token].item() for i, token in enumerate(choice))
            assert loss == pytest.approx(expected, rel=1e-5)
    assert {row.index(min(row)) for row in found} != {0} and len({tuple(row) for row in found}) == len(found)
    key = decoding._cache_prefix(model, forward.form_of(model), [5, 6], 4)
    assert (key is not None) == cached


def test_batches_hold_similar_lengths_and_few_labelled_tokens(monkeypatch):
    monkeypatch.setattr(evaluation, "LABELLED", 40)
    sizes = [(30, 10), (10, 10), (12, 2), (5, 5), (400, 3), (90, 90), (11, 11)]  # tokens, labelled tokens
    examples = [{"input_ids": [7] * n, "labels": [prompts.IGNORE] * (n - k) + [7] * k} for n, k in sizes]
    assert list(evaluation.batches(examples, 3)) == [[3, 1, 6], [2, 0], [5], [4]]
    assert list(evaluation.batches(examples, 99)) == [[3, 1, 6], [2, 0], [5], [4]]
    assert list(evaluation.batches([examples[3]] * 9, 99)) == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]
    assert list(evaluation.batches([], 4)) == []


def test_the_change_of_paired_samples_has_an_interval_of_students_t():
    """By hand: changes -1, -2, -3, -2; mean -2, deviation sqrt(2/3), t(0.975, 3) = 3.182446."""
    mean, low, high = intervals.paired_change([4.0, 4.0, 5.0, 3.0], [3.0, 2.0, 2.0, 1.0])
    half = 3.182446 * (2 / 3) ** 0.5 / 2
    assert (mean, low, high) == pytest.approx((-2.0, -2.0 - half, -2.0 + half), abs=1e-6)
    assert intervals.paired_change([1.0], [3.5]) == (2.5, None, None)
    assert intervals.paired_change([1.0, 2.0], [1.5, 2.5]) == (0.5, 0.5, 0.5)


def test_changes_are_means_over_samples_and_pieces():
    before = measure.Measurement({}, [], [1.0, 2.0], [3.0, 3.0, 3.0])
    after = measure.Measurement({}, [], [0.5, 0.5], [3.1, 3.2, 3.3])
    found = measure.changes(before, after)
    assert list(found) == [
        f"{key}.change{bound}" for key in ("heldout_loss", "neutral_loss") for bound in ("", "_low", "_high")
    ]
    assert found["heldout_loss.change"] == pytest.approx(-1.0)
    assert found["heldout_loss.change_high"] == pytest.approx(-1.0 + 12.7062 * 0.5, abs=1e-3)  # t(0.975, 1)
    assert found["neutral_loss.change"] == pytest.approx(0.2)
    assert found["neutral_loss.change_low"] == pytest.approx(0.2 - 4.302653 * 0.1 / 3**0.5, abs=1e-6)  # t(0.975, 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 7 = 12. The answer is 12.", 12),
        ("The answer is: **$1,234.50**", 1234.5),
        ("so 3 x 4 = 12\n#### 12", 12),
        ("#### -1,000", -1000),
        ("answer = 7 apples, not 8", 7),
        ("The Answer is 3. Or the answer is 4.", 4),
        ("he has 3 cards and then 15", 15),
        ("about 0.5 litres", 0.5),
        ("12,34", 34),
        ("8-3=5", 5),
        ("none at all", None),
        ("", None),
    ],
)
def test_evaluation_extract_number(text, number):
    assert metrics.extract_number(text) == number


def test_evaluation_wilson_interval_known_values():
    assert metrics.wilson_interval(10, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert metrics.wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert metrics.wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
