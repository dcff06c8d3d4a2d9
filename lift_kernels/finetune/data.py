"""Question/answer problems of a run: generated or read from a file, split, and encoded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from . import evaluation, prompts, word_problems
from .config import Settings
from .prompts import Example
from .word_problems import Problem

SHOTS = 4  # worked examples in an evaluation prompt; also the most problems in a training sequence


def read_problems(path: str | Path) -> list[Problem]:
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
    problems: dict[str, Problem] = {}
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
        if evaluation.extract_number(answer) is None:
            raise UserError(f"{path}, line {number}: the answer contains no number to compare with")
        problems.setdefault(" ".join(question.split()), Problem(question, answer))
    return list(problems.values())


def choose_problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem], str]:
    """Generate or read the problems of a run and split them.

    Returns:
        Training problems, held-out problems, few-shot examples and a description of the data. No
        problem is in two of the lists.

    Raises:
        UserError: for a file that cannot be used or holds too few problems.
    """
    if settings.data is None:
        heldout = word_problems.generate(settings.eval_problems, "heldout", settings.seed)
        train = word_problems.generate(settings.steps * settings.batch_size + SHOTS, "train", settings.seed)
        origin = "generated word problems"
    else:
        train = read_problems(settings.data)
        random.Random(settings.seed).shuffle(train)
        count = min(settings.eval_problems, len(train) // 5)
        if count == 0 or len(train) < count + SHOTS + settings.batch_size:
            least = 5 + SHOTS + settings.batch_size
            raise UserError(f"{settings.data} holds {len(train)} different problems; give at least {least}")
        heldout, train = train[:count], train[count:]
        origin = settings.data
    shots, train = train[:SHOTS], train[SHOTS:]
    return train, heldout, shots, f"{origin}: {len(train)} for training, {len(heldout)} held out"


def encode_short(
    tokenizer, problems: Sequence[Problem], max_length: int, part: str
) -> tuple[list[Problem], list[Example]]:
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
