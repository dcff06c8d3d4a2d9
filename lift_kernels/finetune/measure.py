"""What a run measures before and after training: losses, answers and exact match.

Every rank measures its share of the problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from . import evaluation, prompts
from .decoding import greedy_answers
from .parallel import Ranks
from .prompts import Example
from .word_problems import Problem

EVAL_BATCH = 32
GENERATION_BATCH = 100  # decoding is bound by reading the weights, so a large batch costs little more than a small one

Measurement: TypeAlias = tuple[dict[str, Any], list[str]]
"""Losses and exact match by report key, and the answers that the model gave."""


def measure(
    model,
    tokenizer,
    problems: Sequence[Problem],
    encoded: Sequence[Example],
    prefix: list[int],
    ranks: Ranks,
    when: str,
) -> Measurement:
    """Measure losses (nats per token) and exact match; their keys end in ``when``.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        problems: held-out problems.
        encoded: their encodings.
        prefix: token ids of the worked examples in front of each question.
        ranks: the ranks that share the problems; all get the whole result.
        when: before or after.
    """
    longest = max(sum(label != prompts.IGNORE for label in e["labels"]) for e in encoded)

    def mean_loss(examples: Sequence[Example], what: str) -> float:
        own = ranks.own(examples)
        parts = ranks.gather(evaluation.summed_loss(model, tokenizer, own, EVAL_BATCH, f"{what} loss {when}"))
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    loss = mean_loss([prompts.join(tokenizer, [example]) for example in encoded], "held-out")
    neutral = mean_loss(evaluation.neutral_examples(tokenizer), "neutral")
    questions = ranks.own([problem.question for problem in problems])
    answers = ranks.merge(
        greedy_answers(model, tokenizer, questions, prefix, longest + 8, GENERATION_BATCH, f"answers {when}")
    )
    correct = sum(evaluation.same_number(a, p.answer) for a, p in zip(answers, problems, strict=True))
    low, high = evaluation.wilson_interval(correct, len(problems))
    figures = {
        f"heldout_loss.{when}": loss,
        f"neutral_loss.{when}": neutral,
        f"exact_match.{when}": correct / len(problems),
        f"exact_match.{when}_low": low,
        f"exact_match.{when}_high": high,
    }
    return figures, answers
