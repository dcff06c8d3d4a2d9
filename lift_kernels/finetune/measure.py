"""What a run measures before and after training: losses, answers and exact match.

Every rank measures its share of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import evaluation, metrics
from .data import RunData
from .decoding import greedy_answers
from .parallel import Ranks
from .prompts import IGNORE, Example

EVAL_BATCH = 32
GENERATION_BATCH = 100  # decoding is bound by reading the weights, so a large batch costs little more than a small one


@dataclass(frozen=True)
class Measurement:
    """What was measured at one time.

    Attributes:
        figures: losses and scores by report key.
        answers: the model's answer to each held-out sample; [] without a metric.
        target: mean loss of each held-out sample, nats per token.
        neutral: mean loss of each piece of neutral text, nats per token.
    """

    figures: dict[str, Any]
    answers: list[str]
    target: list[float]
    neutral: list[float]

    def saved(self) -> dict[str, Any]:
        """Return the JSON form; ``Measurement(**saved)`` is the same again."""
        return asdict(self)


def losses_of(model, tokenizer, examples: Sequence[Example], ranks: Ranks, title: str) -> list[tuple[float, int]]:
    """Return summed loss (nats) and labelled tokens of each example, measured by all ranks."""
    own = evaluation.sample_losses(model, tokenizer, ranks.own(examples), EVAL_BATCH, title)
    return ranks.merge(own)


def measure(model, tokenizer, data: RunData, neutral: Sequence[Example], ranks: Ranks, when: str) -> Measurement:
    """Measure losses (nats per token) and exact match; their keys end in ``when``.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        data: data of the run.
        neutral: pieces of neutral text.
        ranks: the ranks that share the samples; all get the whole result.
        when: before or after.
    """
    longest = max(sum(label != IGNORE for label in e["labels"]) for e in data.encoded)
    target = losses_of(model, tokenizer, data.encoded, ranks, f"held-out loss {when}")
    other = losses_of(model, tokenizer, neutral, ranks, f"neutral loss {when}")
    asked = ranks.own(data.asked)
    answers = ranks.merge(
        greedy_answers(model, tokenizer, asked, data.prefix, longest + 8, GENERATION_BATCH, f"answers {when}")
    )
    correct = sum(metrics.same_number(a, s.answer) for a, s in zip(answers, data.heldout, strict=True))
    low, high = metrics.wilson_interval(correct, len(data.heldout))
    figures = {
        f"heldout_loss.{when}": _mean(target),
        f"neutral_loss.{when}": _mean(other),
        f"exact_match.{when}": correct / len(data.heldout),
        f"exact_match.{when}_low": low,
        f"exact_match.{when}_high": high,
    }
    return Measurement(figures, answers, [_mean([x]) for x in target], [_mean([x]) for x in other])


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """Return the mean loss per token."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)
