"""Chat templates of many manners: the last assistant turn is learned, and nothing else."""

import json

import pytest
import trl  # noqa: F401  (renders chats)
from helpers.data_rows import turns
from helpers.tiny_llama import make_tokenizer

from lift_kernels.errors import UserError
from lift_kernels.finetune.forms import read_samples

TURN = "[{{ m.role }}]{{ m.content }}<eos>"
ASK = "{% if add_generation_prompt %}[assistant]{% endif %}"


def sample(tmp_path, template, *more):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [*more, *turns("Hi", "Ho")]}) + "\n")
    [found] = read_samples([str(path)], "train", tokenizer)[1]
    return found


TEMPLATES = {
    "plain": ("{% for m in messages %}" + TURN + "{% endfor %}" + ASK, "[user]Hi<eos>[assistant]", "Ho<eos>"),
    "thinks": (
        "{% for m in messages %}" + TURN + "{% endfor %}" + ASK.replace("t]", "t]<think>"),
        "[user]Hi<eos>[assistant]",
        "Ho<eos>",
    ),
    "closes a chat without a question": (
        "{% for m in messages %}" + TURN + "{% endfor %}" + ASK.replace("{% endif", "{% else %}[end]{% endif"),
        "[user]Hi<eos>[assistant]",
        "Ho<eos>[end]",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_turn_is_learned(tmp_path, name):
    template, prompt, completion = TEMPLATES[name]
    found = sample(tmp_path, template)
    assert (found.prompt, found.completion, found.answer) == (prompt, completion, "Ho")


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path):
    """That of Mistral puts the system turn in front of a user turn which is the last one."""
    template = (
        "{% set s = '' %}{% if messages[0].role == 'system' %}{% set s = messages[0].content + ' ' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'user' and loop.last %}{{ s }}{% endif %}{{ m.content }}<eos>{% endfor %}" + ASK
    )
    assert sample(tmp_path, template).prompt == "[user]Hi<eos>[assistant]"
    with pytest.raises(UserError, match="line 1: the tokenizer's chat template changes earlier turns when an answer"):
        sample(tmp_path, template, {"role": "system", "content": "Be kind."})


def test_a_template_that_leaves_out_the_answer_is_refused(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'user' %}" + TURN + "{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="line 1: the tokenizer's chat template leaves out the last assistant turn"):
        sample(tmp_path, template)
