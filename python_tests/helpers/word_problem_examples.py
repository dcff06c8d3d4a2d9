"""Word problems as samples."""

from __future__ import annotations

from lift_kernels.finetune.prompts import Example, encode, worked_example


def encoded(tokenizer, problem) -> Example:
    """The token ids of a question and its answer, labelled on the answer."""
    return encode(tokenizer, worked_example(problem.question, problem.answer))


def asked(tokenizer, question: str) -> list[int]:
    """The token ids of the prompt of a question."""
    return tokenizer(worked_example(question, "").prompt, add_special_tokens=False)["input_ids"]
