"""The forms that a row of data may have, and the texts that are made of it.

================  =====================================  ===========================================
columns           prompt                                 completion
================  =====================================  ===========================================
messages          the turns before the last one, by the  the last turn, which is the assistant's
                  chat template of the tokenizer
prompt,           the prompt as it is; a list of         the completion as it is; a list of messages
completion        messages goes through the template     goes through the template
question, answer  "Question: {question}", a new line     a space and the answer
                  and "Answer:"
instruction,      "Instruction: {instruction}", a line   a space and the output
input, output     "Input: {input}" if there is one, a
                  new line and "Output:"
text              nothing                                the text as it is
================  =====================================  ===========================================

The column ``tools`` of chats goes to the template: a list of descriptions, or its JSON. Other
columns are ignored. A row that has several forms has the first of them. Numbers are taken as
their shortest text: 7, 7.5.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from ..errors import UserError
from . import prompts
from .prompts import Sample
from .sources import Row, read_rows, refuse_first

MESSAGES, COMPLETION, QUESTION, INSTRUCTION, TEXT = "messages", "completion", "question", "instruction", "text"
FORMS = {
    MESSAGES: ("messages",),
    COMPLETION: ("prompt", "completion"),
    QUESTION: ("question", "answer"),
    INSTRUCTION: ("instruction", "output"),
    TEXT: ("text",),
}
"""The columns that a row of each form has to have."""
COLUMNS = {"input", "tools", *(column for columns in FORMS.values() for column in columns)}
ROLES = ("system", "developer", "user", "assistant", "tool")


class _BadRow(Exception):
    """What is wrong with a row; it is said with the place of the row."""


def read_samples(names: Sequence[str], split: str, tokenizer: Any) -> tuple[str, list[Sample]]:
    """Read files, folders and hub ids; see `sources.read_rows`.

    Args:
        names: what to read.
        split: the split that is read of what has several.
        tokenizer: tokenizer of the model; its chat template renders chats.

    Returns:
        The form of the rows, a key of FORMS, and the samples in the order of the rows.

    Raises:
        UserError: for what cannot be read, rows of different forms, and rows that cannot be used;
            with the place of the first one.
    """
    rows = read_rows(names, split, COLUMNS)
    form = _common_form(rows)
    make = _maker(form, tokenizer)
    samples, bad = [], []
    for row in rows:
        try:
            samples.append(make(row.values, row.where))
        except _BadRow as error:
            bad.append((row.where, str(error)))
        except RecursionError:
            bad.append((row.where, "is nested too deeply; flatten it"))
    refuse_first(bad)
    return form, samples


def _common_form(rows: Sequence[Row]) -> str:
    bad, form = [], ""
    for row in rows:
        try:
            found = _form_of(row.values)
        except _BadRow as error:
            bad.append((row.where, str(error)))
            continue
        form = form or found
        if found != form:
            bad.append((row.where, f"has {_said(found)}, and rows before have {_said(form)}; give one form in a run"))
    refuse_first(bad)
    return form


def _said(form: str) -> str:
    return " and ".join(FORMS[form])


def _form_of(values: Any) -> str:
    if not isinstance(values, dict):
        raise _BadRow(f"a row has to be an object with columns such as {_said(QUESTION)}")
    for form, columns in FORMS.items():
        if all(column in values for column in columns):
            return form
    for columns in FORMS.values():
        for column in columns:
            if column in values:
                missing = next(c for c in columns if c not in values)
                raise _BadRow(f"has the column {column} and lacks {missing}; add it")
    known = "; ".join(map(_said, FORMS))
    found = ", ".join(map(str, values))[:200] or "none at all"
    raise _BadRow(f"has no known column ({found}); use one of: {known}")


def _maker(form: str, tokenizer: Any) -> Callable[[dict, str], Sample]:
    """Return the function that makes a sample of a row of this form and its place."""
    makers: dict[str, Callable[[dict, str], Sample]] = {
        MESSAGES: partial(_from_messages, tokenizer),
        COMPLETION: partial(_from_completion, tokenizer),
        QUESTION: _from_question,
        INSTRUCTION: _from_instruction,
        TEXT: _from_text,
    }
    return makers[form]


def _from_question(values: dict, where: str) -> Sample:
    return prompts.single_example(_text(values, "question"), _text(values, "answer"), where)


def _from_instruction(values: dict, where: str) -> Sample:
    instruction, output = _text(values, "instruction").strip(), _text(values, "output")
    parts = [f"Instruction: {instruction}"]
    asked = instruction
    given = values.get("input")
    if given is not None and not (isinstance(given, str) and not given.strip()):
        given = _text(values, "input").strip()
        parts.append(f"Input: {given}")
        asked = f"{instruction}\n{given}"
    return Sample("\n".join([*parts, "Output:"]), f" {output.strip()}", asked, output, where)


def _from_text(values: dict, where: str) -> Sample:
    return Sample("", _text(values, "text"), where=where)


def _from_completion(tokenizer: Any, values: dict, where: str) -> Sample:
    if isinstance(values["prompt"], list) or isinstance(values["completion"], list):
        return _rendered(tokenizer, _turns(values, "prompt"), _turns(values, "completion"), _tools(values), where)
    prompt, completion = _text(values, "prompt"), _text(values, "completion")
    return Sample(prompt, completion, prompt, completion.strip(), where)


def _from_messages(tokenizer: Any, values: dict, where: str) -> Sample:
    turns = _turns(values, "messages")
    return _rendered(tokenizer, turns[:-1], turns[-1:], _tools(values), where)


def _text(values: dict, column: str) -> str:
    """Return the text of a column, which is no blank one."""
    value = values[column]
    if value is None or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        raise _BadRow(f"{column} is missing; fill it in, or leave out the row")
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if not isinstance(value, str):
        kind = "true or false" if isinstance(value, bool) else f"a {type(value).__name__}"
        raise _BadRow(f"{column} is {kind}; write it as text")
    if not value.strip():
        raise _BadRow(f"{column} is empty; fill it in, or leave out the row")
    return _checked(value, column)


def _checked(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"{what} has half of a surrogate pair, which is no character; remove it") from error
    return text


def _turns(values: dict, column: str) -> list[dict]:
    """Return the messages of a column, without keys that hold nothing."""
    value = values[column]
    if not (isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)):
        raise _BadRow(f"{column} is no list of messages; give objects with role and content, as JSON or Parquet")
    for turn in value:
        if turn.get("role") not in ROLES:
            raise _BadRow(f"{column} has the role {repr(turn.get('role'))[:40]}; use one of {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise _BadRow(f"{column} has a turn whose content is no text; write it as one string")
        _checked(turn["content"], column)
    return _without_none(value)


def _without_none(value: Any) -> Any:
    """Return a value without the keys that hold nothing, which Parquet adds where rows differ."""
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _tools(values: dict) -> list[dict] | None:
    """Return the tools that a chat may call; None where it has none."""
    tools = values.get("tools")
    try:
        tools = json.loads(tools.strip() or "null") if isinstance(tools, str) else _without_none(tools)
    except ValueError as error:
        raise _BadRow(f"tools is no JSON ({error}); write a list of objects, or its JSON") from error
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _BadRow("tools is no list of objects; describe each tool by one")
    return tools


def _rendered(tokenizer: Any, given: list[dict], learned: list[dict], tools: list[dict] | None, where: str) -> Sample:
    """Return a chat as a sample, by the tokenizer's chat template."""
    roles = [turn["role"] for turn in given + learned]
    if "assistant" not in roles:
        raise _BadRow("the chat has no assistant turn to learn; add one")
    if roles[-1] != "assistant":
        raise _BadRow(f"the chat ends with the role {roles[-1]}; end it with the assistant turn to learn")
    if not given or given[-1]["role"] not in ("user", "tool"):
        raise _BadRow("no user turn stands before the assistant turn to learn; add one")
    if not learned[-1]["content"].strip():
        raise _BadRow("the last assistant turn is empty; fill it in, or leave out the row")
    render = _renderer(tokenizer)
    try:
        text = render({"prompt": given, "completion": learned}, tokenizer, tools)
        before = [
            tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=b)
            for b in (False, True)
        ]
        lost = tools and before[0] == tokenizer.apply_chat_template(given, tokenize=False)
    except Exception as error:  # the code of a template may raise anything
        raise _BadRow(
            f"the tokenizer's chat template refuses the chat: {' '.join(str(error).split())[:200]}"
        ) from error
    _checked(text["prompt"] + text["completion"], "the chat")
    if not text["completion"].strip():
        raise _BadRow("the tokenizer's chat template leaves out the last assistant turn; give another model")
    if lost:
        raise _BadRow(
            "the tokenizer's chat template leaves out the tools; remove the column tools, or give another model"
        )
    # The texts of the earlier turns, with and without the beginning of an answer, begin alike.
    if not text["prompt"].startswith(os.path.commonprefix(before)):
        raise _BadRow(
            "the tokenizer's chat template changes earlier turns when an answer follows, so they would be learned; "
            "leave out system turns, or give prompt and completion as texts"
        )
    asked = next(turn["content"] for turn in reversed(given) if turn["role"] in ("user", "tool"))
    return Sample(text["prompt"], text["completion"], asked, learned[-1]["content"], where, whole=True)


def _renderer(tokenizer: Any) -> Callable[..., dict[str, str]]:
    """Return TRL's function that renders a chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the data holds chats, and the model's tokenizer has no chat template; give a model that was trained on "
            "chats, or rows of prompt and completion"
        )
    try:
        from trl import apply_chat_template
    except ImportError as error:
        raise UserError("chats need the package trl; run `pip install trl`") from error
    return apply_chat_template
