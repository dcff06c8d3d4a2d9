"""Rows of each form, and a tokenizer with a chat template."""

from __future__ import annotations

from functools import partial

from .tiny_llama import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_chat_tokenizer(opening: bool = False):
    """The byte-level tokenizer with a chat template, and an opening token before every text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    if opening:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "<pad>"
        tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
        processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def turns(*contents: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def rows_of(form: str, count: int = 30) -> list[dict]:
    """Rows whose prompts differ; "conversational" ones have messages as prompt and completion."""
    reply = partial(turns, first="assistant")
    make = {
        "messages": lambda i: {"messages": turns("Hi", "Hello.", f"Say {i}!", f"Here:\n{i} é")},
        "conversational": lambda i: {
            "prompt": turns(f"Say {i}!"),
            "completion": reply(f"It is {i}"),
        },
        "completion": lambda i: {"prompt": f"{i} and {i} is", "completion": f" twice {i}"},
        "question": lambda i: {"question": f"What is {i}?", "answer": "a number\nof course"},
        "instruction": lambda i: {"instruction": f"Say {i}.", "input": "" if i % 2 else "slowly", "output": f"{i}!"},
        "text": lambda i: {"text": f"The number {i} is a number."},
    }[form]
    return [make(i) for i in range(count)]


FORMS = ("messages", "conversational", "completion", "question", "instruction", "text")
