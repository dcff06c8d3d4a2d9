"""Neutral text: prose that the training data is not about.

A rise of its loss shows how much the model forgot in fine-tuning.
"""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .prompts import IGNORE, Example, opening

TOKENS = 20_480  # most tokens of the built-in text: 80 pieces
PIECE = 256  # tokens of a piece
_LEAST = 150  # characters of a paragraph; shorter ones are often headings and captions

PARAGRAPHS = (
    "The river rises in the hills north of the town and flows slowly through wide meadows before it reaches the sea. "
    "In spring, when the snow melts, it often floods the fields along its banks. Farmers have learned to live with "
    "the water: they build their houses on small mounds and keep boats in their barns. In summer the same fields are "
    "dry, and cows graze where fish were swimming a few weeks earlier.",
    "Bread is one of the oldest prepared foods. The dough is made from flour, water, salt and yeast, and it has to "
    "rest in a warm place so that it can rise. While the yeast feeds on the sugars in the flour, it releases gas, "
    "which is trapped in the dough and makes it soft. A hot oven then turns the outside into a brown crust while the "
    "inside stays moist.",
    "The museum opened its new wing last week with an exhibition about the history of photography. Visitors can see "
    "early cameras made of wood and brass, portraits of people who had to sit still for minutes, and the first "
    "pictures taken from the air. The curator said that she wanted to show how a difficult craft became something "
    "that everybody does without thinking about it.",
    "A computer program is a list of instructions that a machine can follow. Programmers write it in a language that "
    "people can read, and a compiler translates it into the simple operations of the processor. Most of the work, "
    "however, is not writing but reading: before changing a program one has to understand what it does, why it does "
    "it that way, and who depends on it.",
)


def neutral_pieces(tokenizer, files: Sequence[str] = (), limit: int | None = None) -> tuple[str, list[Example]]:
    """Return the neutral text in pieces, each an example in which all tokens but the first count.

    The built-in text is PARAGRAPHS and the prose of Python's language reference, up to TOKENS
    tokens. It is the same for one version of Python. Files follow it, whole.

    Args:
        tokenizer: tokenizer of the model.
        files: text files in UTF-8.
        limit: the most tokens that the model takes, or None.

    Returns:
        What the text is, and the pieces. They have PIECE tokens, or as many as the model takes; the
        last one of a file may have fewer.

    Raises:
        UserError: for a file that cannot be read, is not UTF-8 or holds no text.
    """
    reference = list(_reference())
    size = min(PIECE, limit or PIECE)
    sources = [f"{len(PARAGRAPHS)} paragraphs"]
    if reference:
        sources.append(f"the prose of Python {platform.python_version()}'s language reference")
    else:
        sources[0] += " alone, for this Python has no pydoc_data with the language reference"
    pieces = _pieces(tokenizer, "\n\n".join([*PARAGRAPHS, *reference]), size)
    if reference:  # whole pieces need no padding
        pieces = [piece for piece in pieces[: max(1, TOKENS // size)] if len(piece["input_ids"]) == size] or pieces
    for name in files:
        found = _pieces(tokenizer, _read(name), size)
        if not found:
            raise UserError(f"{name} holds less than two tokens of text; give --neutral a file with some paragraphs")
        pieces += found
    return ", ".join([*sources, *files]), pieces


def _pieces(tokenizer, text: str, size: int) -> list[Example]:
    """Cut a text into examples of ``size`` tokens and perhaps a shorter one."""
    start = opening(tokenizer)
    # A long text is what the tokenizer would warn of.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = size - len(start)
    rows = [start + ids[i : i + step] for i in range(0, len(ids), step)]
    return [{"input_ids": row, "labels": [IGNORE, *row[1:]]} for row in rows if len(row) > 1]


def _reference() -> Iterator[str]:
    """Yield paragraphs of prose from the language reference, each once; none where it is missing.

    Prose starts in the first column with a capital letter and ends with a full stop. Code, grammar
    and lists do not.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    seen = set()
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            prose = re.match("[A-Z]", paragraph) and text.endswith(".") and not re.search(r"\[|::", text)
            if prose and len(text) >= _LEAST and text not in seen:
                seen.add(text)
                yield text


def _read(name: str) -> str:
    """Return the text of a file."""
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; check --neutral") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8 for --neutral"
        ) from error
    if not text.strip():
        raise UserError(f"{name} holds no text; give --neutral a file with some paragraphs")
    return text.strip()
