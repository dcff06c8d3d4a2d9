"""The data of a run: generated or read from files, split, encoded and joined into sequences."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import metrics, prompts, word_problems
from .config import STEPS, Settings
from .prompts import Example, Sample

SHOTS = 4  # worked examples in an evaluation prompt; also the most problems in a training sequence


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is measured on.

    Attributes:
        sequences: training sequences.
        rows: how many of them make a batch, that is a step.
        heldout: held-out samples.
        encoded: their whole texts, one by one, labelled as in training.
        asked: token ids of their prompts.
        prefix: token ids of the worked examples in front of each prompt; [] without any.
        lines: whether an answer ends with its line, as after worked examples.
        metric: how answers are scored, one of METRICS.
        longest: tokens of the longest sample.
        together: the most samples in a text that the model reads.
        description: a line about the data.
    """

    sequences: list[Example]
    rows: int
    heldout: list[Sample]
    encoded: list[Example]
    asked: list[list[int]]
    prefix: list[int]
    lines: bool
    metric: str
    longest: int
    together: int
    description: str


def prepare_data(settings: Settings, tokenizer) -> RunData:
    """Read or generate the samples of a run, split and encode them.

    Args:
        settings: options of the run.
        tokenizer: tokenizer of the model.

    Raises:
        UserError: for data that cannot be used.
    """
    problems, heldout, shots, description = choose_problems(settings)
    _, examples = encode_short(tokenizer, problems, settings.max_length, "training")
    heldout, encoded = encode_short(tokenizer, heldout, settings.max_length, "held-out")
    _, shown = encode_short(tokenizer, shots, settings.max_length, "few-shot")
    sequences, rows = training_sequences(tokenizer, examples, settings.batch_size)
    longest = max(len(e["input_ids"]) for e in [*examples, *encoded, *shown])
    return RunData(
        sequences=sequences,
        rows=rows,
        heldout=heldout,
        encoded=[prompts.join(tokenizer, [example]) for example in encoded],
        asked=[tokenizer(sample.prompt, add_special_tokens=False)["input_ids"] for sample in heldout],
        prefix=prompts.join(tokenizer, shown)["input_ids"],
        lines=True,
        metric="number",
        longest=longest,
        together=SHOTS + 1,
        description=description,
    )


def read_problems(path: str | Path) -> list[Sample]:
    """Read a JSONL file of objects with the strings "question" and "answer".

    Lines end in LF or CRLF. The file may begin with a byte-order mark.

    Returns:
        The problems in the order of the file. A repeated question is kept once.

    Raises:
        UserError: for a file that cannot be read, or, with its number, for a line that is not such
            an object or whose answer has no number.
    """
    try:
        # Strings may hold U+2028 and others at which `str.splitlines` would split.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --data") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    problems: dict[str, Sample] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        question, answer = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if not (isinstance(question, str) and question.strip() and isinstance(answer, str) and answer.strip()):
            raise UserError(f'{path}, line {number}: needs an object with the strings "question" and "answer"')
        if metrics.extract_number(answer) is None:
            raise UserError(f"{path}, line {number}: the answer contains no number to compare with")
        problems.setdefault(
            " ".join(question.split()), prompts.worked_example(question, answer, f"{path}, line {number}")
        )
    return list(problems.values())


def choose_problems(settings: Settings) -> tuple[list[Sample], list[Sample], list[Sample], str]:
    """Generate or read the problems of a run and split them.

    Returns:
        Training problems, held-out problems, few-shot examples and a description of the data. No
        problem is in two of the lists.

    Raises:
        UserError: for a file that cannot be used or holds too few problems.
    """
    if not settings.data:
        heldout = _generated(settings.eval_problems, "heldout", settings)
        train = _generated((settings.steps or STEPS) * settings.batch_size + SHOTS, "train", settings)
        origin = "generated word problems"
    else:
        train = [sample for path in settings.data for sample in read_problems(path)]
        random.Random(settings.seed).shuffle(train)
        count = min(settings.eval_problems, len(train) // 5)
        if count == 0 or len(train) < count + SHOTS + settings.batch_size:
            least = 5 + SHOTS + settings.batch_size
            raise UserError(f"{', '.join(settings.data)} holds {len(train)} different problems; give at least {least}")
        heldout, train = train[:count], train[count:]
        origin = ", ".join(settings.data)
    shots, train = train[:SHOTS], train[SHOTS:]
    return train, heldout, shots, f"{origin}: {len(train)} for training, {len(heldout)} held out"


def _generated(count: int, split: word_problems.Split, settings: Settings) -> list[Sample]:
    found = word_problems.generate(count, split, settings.seed)
    return [prompts.worked_example(problem.question, problem.answer) for problem in found]


def encode_short(
    tokenizer, problems: Sequence[Sample], max_length: int, part: str
) -> tuple[list[Sample], list[Example]]:
    """Encode problems and leave out the long ones.

    Args:
        tokenizer: tokenizer of the model.
        problems: problems to encode.
        max_length: most tokens of question and answer.
        part: name of the problems for messages.

    Returns:
        The problems that are short enough, and their encodings.

    Raises:
        UserError: when no problem is short enough.
    """
    encoded = [prompts.encode(tokenizer, problem) for problem in problems]
    kept = [(p, e) for p, e in zip(problems, encoded, strict=True) if len(e["input_ids"]) <= max_length]
    if not kept:
        raise UserError(f"no {part} problem has at most {max_length} tokens; raise --max-length")
    if len(kept) < len(problems):
        print(f"{len(problems) - len(kept)} {part} problems have more than {max_length} tokens and are left out")
    return [p for p, _ in kept], [e for _, e in kept]


def training_sequences(tokenizer, examples: Sequence[Example], batch_size: int) -> tuple[list[Example], int]:
    """Join examples into training sequences of up to SHOTS problems.

    A model that is trained on single problems only is confused by the worked examples of a few-shot
    prompt.

    Args:
        tokenizer: tokenizer of the model.
        examples: encoded problems.
        batch_size: problems per step.

    Returns:
        The sequences, and how many of them make a batch.

    Raises:
        UserError: when the examples do not fill one batch.
    """
    if len(examples) < batch_size:
        raise UserError(f"{len(examples)} training problems do not fill a batch of {batch_size}; lower --batch-size")
    each = max(n for n in range(1, SHOTS + 1) if batch_size % n == 0)
    chunks = [examples[i : i + each] for i in range(0, len(examples) - each + 1, each)]
    return [prompts.join(tokenizer, chunk) for chunk in chunks], batch_size // each
