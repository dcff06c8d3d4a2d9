"""How a model is evaluated: answer loss, greedy answers, their numbers and intervals."""

import pytest
import torch
from helpers.word_problem_examples import asked, encoded
from transformers import AutoModelForCausalLM

from lift_kernels.finetune import decoding, evaluation, metrics, prompts, word_problems


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
