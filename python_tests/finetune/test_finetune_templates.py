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


def sample(tmp_path, template, *more, **columns):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [*more, *turns("Hi", "Ho")], **columns}) + "\n")
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


PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": None}}}]
SEEN = '[{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}][user]Hi<eos>[assistant]'


def test_tools_stand_in_the_prompt_without_the_keys_that_parquet_adds(tmp_path):
    found = sample(tmp_path, CALLS, tools=TOOLS)
    assert (found.prompt, found.completion) == (SEEN, "Ho<eos>")


def test_tools_in_json_are_taken_as_they_are(tmp_path):
    found = sample(tmp_path, CALLS, tools=json.dumps(TOOLS))
    assert found.prompt == SEEN.replace('{"a": "int"}', '{"a": "int", "b": null}')


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]"])
def test_a_chat_may_have_no_tools(tmp_path, tools):
    assert sample(tmp_path, CALLS, tools=tools).prompt == "[user]Hi<eos>[assistant]"


@pytest.mark.parametrize(
    ("template", "tools", "message"),
    [
        (PLAIN, TOOLS, "the tokenizer's chat template leaves out the tools; remove the column tools, or give another"),
        (PLAIN, [{"name": "Hi"}], "the tokenizer's chat template leaves out the tools; "),  # as the user turn says
        (CALLS, "add", "tools is no JSON .Expecting value.*; write a list of objects, or its JSON"),
        (CALLS, {"name": "add"}, "tools is no list of objects; describe each tool by one"),
        (CALLS, ["add"], "tools is no list of objects; "),
        (CALLS, 7, "tools is no list of objects; "),
        (CALLS, "[" * 100_000, "is nested too deeply; flatten it"),
        (CALLS, [{"name": "add", "about": "\ud800"}], "the chat has half of a surrogate pair, which is no character"),
    ],
)
def test_tools_that_would_be_lost_are_refused(tmp_path, template, tools, message):
    with pytest.raises(UserError, match=f"line 1: {message}"):
        sample(tmp_path, template, tools=tools)


def test_calls_of_tools_lose_the_keys_that_parquet_adds(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "c": None}}]}
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}")
    found = sample(tmp_path, template, {"role": "user", "content": "1 + 1"}, call)
    assert "[assistant][{'name': 'add', 'arguments': {'a': 1}}]<eos>[user]Hi<eos>" in found.prompt
