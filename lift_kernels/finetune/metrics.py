"""How the answers of a model are scored, and which score fits the data."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .prompts import Sample

SHORT = 32  # most tokens of an answer for which "exact" is chosen without being asked for
MOST_CHOICES = 10
_LAST_WORDS = 4  # that may follow a number which still is the final figure of an answer

_NUMBER = r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_MARKED = rf"(?:####|answer\s*(?:is|:|=))[^\w\n+-]*?({_NUMBER})"


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        name: one of `config.METRICS`.
        description: what counts as right.
        why: why it is taken, in words that follow its name.
        choices: the answers that metric choice compares, sorted.
    """

    name: str
    description: str
    why: str
    choices: tuple[str, ...] = ()

    def right(self, answer: str, expected: str) -> bool:
        """Return whether an answer of the model is the expected one."""
        if self.name == "choice":  # which may differ by capitals alone
            return answer.strip() == expected.strip()
        return same_number(answer, expected) if self.name == "number" else same_text(answer, expected)


def choose_metric(samples: Sequence[Sample], asked: str | None, tokenizer) -> Metric:
    """Return the metric that was asked for, or the first that fits: number, choice, exact, none.

    Args:
        samples: the held-out samples.
        asked: one of `config.METRICS`, or None.
        tokenizer: tokenizer of the model; it tells whether answers are short.

    Raises:
        UserError: when the metric that was asked for does not fit the samples.
    """
    if asked is not None:
        _check(samples, asked)
        return _metric(samples, asked, "as asked for")
    name, why = _fitting(samples, tokenizer)
    skip = "" if name == "none" else "; --metric none skips it"
    return _metric(samples, name, f"for {why}{skip}")


def _metric(samples: Sequence[Sample], name: str, why: str) -> Metric:
    choices = tuple(sorted({s.answer.strip() for s in samples})) if name == "choice" else ()
    shown = " | ".join(" ".join(choice.split())[:40] for choice in choices)
    description = {
        "number": "the last number of an answer, or the one after #### or 'answer is', is the expected one",
        "exact": "an answer is the expected text, but for capitals, white space and a final full stop",
        "choice": f"of the held-out answers {shown}, the expected one has the highest probability as a whole text",
        "none": "no answers are scored, so the losses alone tell what was learned",
    }
    return Metric(name, description[name], why, choices)


def _fitting(samples: Sequence[Sample], tokenizer) -> tuple[str, str]:
    """Return the first metric that fits, and why."""
    answers = [sample.answer.strip() for sample in samples]
    if not all(answers):
        return "none", "not every sample has an answer"
    if all(_ends_in_number(answer) for answer in answers):
        return "number", "every answer ends in a number"
    counts = Counter(answers)
    if 2 <= len(counts) <= MOST_CHOICES and min(counts.values()) >= 2:
        return "choice", f"there are {len(counts)} different answers, each repeated"
    longest = max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
    if longest <= SHORT and not any("\n" in answer for answer in answers):
        return "exact", f"every answer is a line of at most {SHORT} tokens"
    return "none", f"some answers have more than one line or more than {SHORT} tokens"


def _check(samples: Sequence[Sample], asked: str) -> None:
    """Refuse a metric that does not fit the samples."""
    if asked == "none":
        return
    for sample in samples:
        if not sample.answer.strip():
            raise UserError(f"{_place(sample)}there is no answer for metric {asked} to score; use --metric none")
        if asked == "number" and extract_number(sample.answer) is None:
            raise UserError(
                f"{_place(sample)}the answer {sample.answer.strip()[:40]!r} holds no number for metric number; use "
                "--metric exact or none"
            )
    if asked == "choice":
        _check_choices(samples)


def _check_choices(samples: Sequence[Sample]) -> None:
    seen: set[str] = set()
    for sample in samples:
        seen.add(sample.answer.strip())
        if len(seen) > MOST_CHOICES:
            raise UserError(
                f"{_place(sample)}the answer {sample.answer.strip()[:40]!r} is the {len(seen)}th different one, and "
                f"metric choice compares at most {MOST_CHOICES}; use --metric exact or none"
            )
    if len(seen) < 2:
        raise UserError(
            f"{_place(samples[0])}all held-out answers are {samples[0].answer.strip()[:40]!r}, and metric choice needs "
            "different ones; hold out more samples, or use --metric exact or none"
        )


def _place(sample: Sample) -> str:
    return f"{sample.where}: " if sample.where else ""


def _ends_in_number(text: str) -> bool:
    """Return whether the final answer of a text is a number, marked as such or near the end."""
    if re.search(_MARKED, text, flags=re.IGNORECASE):
        return True
    rest = re.split(_NUMBER, text)
    return len(rest) > 1 and len(rest[-1].split()) <= _LAST_WORDS


def extract_number(text: str) -> float | None:
    """Return the final answer in a text, or None where it has no number.

    The final answer is the number that follows "####" or "answer is", else the last number.
    Thousands separators, decimals and signs are understood. Currency signs and markup in front of
    the number are skipped.
    """
    found = re.findall(_MARKED, text, flags=re.IGNORECASE) or re.findall(_NUMBER, text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(text: str, expected: str) -> bool:
    """Return whether both texts have the same final number.

    Whole numbers have to be equal, others up to a relative tolerance of 1e-6.
    """
    found, wanted = extract_number(text), extract_number(expected)
    if found is None or wanted is None:
        return False
    if found.is_integer() and wanted.is_integer():
        return found == wanted
    return math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)


def same_text(text: str, expected: str) -> bool:
    """Return whether texts are the same but for case, white space and a final full stop."""
    return _normal(text) == _normal(expected)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's confidence interval of a proportion.

    Args:
        successes: number of successes.
        trials: number of trials.
        z: quantile of the normal distribution; the default gives 95 % confidence.

    Returns:
        Lower and upper bound; (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    p, q = successes / trials, z * z / trials
    center = (p + q / 2) / (1 + q)
    half = math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    return max(0.0, center - half), min(1.0, center + half)
