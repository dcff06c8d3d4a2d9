"""What a run measures before and after training: losses, answers and their score.

Every rank measures its share of the samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import evaluation
from .data import RunData
from .decoding import choice_losses, end_tokens, greedy_answers
from .intervals import paired_change
from .metrics import Metric, choose_metric, wilson_interval
from .parallel import Ranks
from .prompts import Example, Sample

EVAL_BATCH = 32
GENERATION_BATCH = 100  # decoding is bound by reading the weights, so a large batch costs little more than a small one


@dataclass(frozen=True)
class Measurement:
    """What was measured at one time.

    Attributes:
        figures: losses and scores by report key.
        answers: the model's answer to each held-out sample; [] for metric none.
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
    """Measure losses (nats per token) and the score of the answers; their keys end in ``when``.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        data: data of the run.
        neutral: pieces of neutral text.
        ranks: the ranks that share the samples; all get the whole result.
        when: before or after.
    """
    target = losses_of(model, tokenizer, data.encoded, ranks, f"held-out loss {when}")
    other = losses_of(model, tokenizer, neutral, ranks, f"neutral loss {when}")
    metric = choose_metric(data.heldout, data.metric, tokenizer)
    answers = _answers(model, tokenizer, data, metric, ranks, f"answers {when}")
    score: dict[str, float | None] = dict.fromkeys(("", "_low", "_high"))
    if answers:
        right = sum(metric.right(a, s.answer) for a, s in zip(answers, data.heldout, strict=True))
        score = dict(zip(score, (right / len(answers), *wilson_interval(right, len(answers))), strict=True))
    figures = {
        f"heldout_loss.{when}": _mean(target),
        f"neutral_loss.{when}": _mean(other),
        **{f"exact_match.{when}{bound}": value for bound, value in score.items()},
    }
    return Measurement(figures, answers, [_mean([x]) for x in target], [_mean([x]) for x in other])


def described(data: RunData, loss: str, neutral: tuple[str, list[Example]], tokenizer) -> dict[str, Any]:
    """Return what the figures are about, by report key.

    Args:
        data: data of the run.
        loss: one of `config.LOSSES`.
        neutral: what the neutral text is, and its pieces.
        tokenizer: tokenizer of the model.
    """
    metric = choose_metric(data.heldout, data.metric, tokenizer)
    answers = loss == "answers" and any(sample.answer for sample in data.heldout)
    return {
        "heldout_loss.unit": f"nats per {'answer token' if answers else 'token'}",
        "heldout.samples": len(data.heldout),
        "exact_match.problems": None if metric.name == "none" else len(data.heldout),
        "metric": metric.name,
        "metric.description": metric.description,
        "neutral.description": neutral[0],
        "neutral.pieces": len(neutral[1]),
        "neutral.tokens": sum(len(piece["input_ids"]) for piece in neutral[1]),
    }


def answer_rows(heldout: Sequence[Sample], before: Measurement, after: Measurement) -> list[dict[str, Any]]:
    """Return what each held-out sample got before and after training; no answers are None."""
    nothing: list[None] = [None] * len(heldout)
    columns = (before.answers or nothing, after.answers or nothing, before.target, after.target)
    names = ("question", "expected", "before", "after", "loss_before", "loss_after", "where")
    rows = zip(heldout, *columns, strict=True)
    return [dict(zip(names, (p.question or p.prompt, p.answer, *row, p.where), strict=True)) for p, *row in rows]


def fingerprint(data: RunData, neutral: Sequence[Example]) -> str:
    """Return a fingerprint of all texts that a run is measured on."""
    return hashlib.sha256(json.dumps([data.encoded, data.asked, data.prefix, neutral]).encode()).hexdigest()


def read_saved(path: Path, texts: str) -> dict[str, Any] | None:
    """Read what an interrupted run measured before training.

    Args:
        path: file of `Measurement.saved` and the `fingerprint` of the texts.
        texts: fingerprint of the present texts.

    Returns:
        Arguments of `Measurement`, or None without the file.

    Raises:
        UserError: when the run was measured on other texts.
    """
    if not path.exists():
        return None
    earlier = json.loads(path.read_text())
    if earlier.pop("texts", None) != texts:
        raise UserError(
            f"the held-out or the neutral texts are not those of the interrupted run in {path.parent}; restore the "
            "files of --data and --neutral and the version of Python, or start a new run"
        )
    return earlier


def changes(before: Measurement, after: Measurement) -> dict[str, float | None]:
    """Return what training changed, by report key, with 95 % intervals over samples and pieces."""
    figures: dict[str, float | None] = {}
    for name in ("target", "neutral"):
        change = paired_change(getattr(before, name), getattr(after, name))
        key = "heldout_loss" if name == "target" else "neutral_loss"
        figures |= dict(zip((f"{key}.change", f"{key}.change_low", f"{key}.change_high"), change, strict=True))
    return figures


def _answers(model, tokenizer, data: RunData, metric: Metric, ranks: Ranks, title: str) -> list[str]:
    """Return the model's answer to each held-out sample; none without a metric."""
    if metric.name == "none":
        return []
    whole, asked = completions(data), ranks.own(data.asked)
    if metric.name == "choice":
        # Of answers that were cut to fit, the longest counts.
        known = sorted(zip(whole, data.heldout, strict=True), key=lambda pair: len(pair[0]))
        of_answer = {sample.answer.strip(): ids for ids, sample in known}
        ids = [of_answer[choice] for choice in metric.choices]
        losses = ranks.merge(choice_losses(model, tokenizer, asked, data.prefix, ids, title))
        return [metric.choices[row.index(min(row))] for row in losses]
    longest = max(map(len, whole)) + 8
    ends = None if data.lines else end_tokens(model, tokenizer, whole)
    return ranks.merge(greedy_answers(model, tokenizer, asked, data.prefix, longest, GENERATION_BATCH, title, ends))


def completions(data: RunData) -> list[list[int]]:
    """Return the token ids that follow each held-out prompt in its whole text."""
    found = []
    for example, asked in zip(data.encoded, data.asked, strict=True):
        ids = example["input_ids"]
        start = len(asked) if ids[: len(asked)] == asked else len(asked) + 1  # an opening token, which asked may lack
        found.append(ids[start:])
    return found


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """Return the mean loss per token."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)
