"""The texts that are made of a row of each form, their tokens and labels, and refused rows."""

import json

import pytest
import trl  # noqa: F401  (for chats and packing)
from helpers.data_rows import make_chat_tokenizer, rows_of, turns
from helpers.tiny_llama import make_tokenizer

from lift_kernels.errors import UserError
from lift_kernels.finetune import prompts
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import prepare_data
from lift_kernels.finetune.forms import read_samples
from lift_kernels.finetune.prompts import IGNORE

OPENED = make_chat_tokenizer(opening=True)
CHAT = "[user]Hi<eos>\n[assistant]Hello.<eos>\n[user]Say 0!<eos>\n[assistant]"


def samples_of(folder, *rows, tokenizer=OPENED):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples([str(path)], "train", tokenizer)[1]


EXPECTED = {
    "messages": ("<pad>" + CHAT, "Here:\n0 é<eos>\n"),
    "conversational": ("<pad>[user]Say 0!<eos>\n[assistant]", "It is 0<eos>\n"),
    "completion": ("<pad>0 and 0 is", " twice 0<eos>"),
    "question": ("<pad>Question: What is 0?\nAnswer:", " a number\nof course<eos>"),
    "instruction": ("<pad>Instruction: Say 0.\nInput: slowly\nOutput:", " 0!<eos>"),
    "text": ("<pad>", "The number 0 is a number.<eos>"),
}
"""What the model reads of the first row of a form, and what it learns."""


@pytest.mark.parametrize("form", EXPECTED)
def test_a_row_becomes_a_prompt_and_a_completion(tmp_path, form):
    prompt, completion = EXPECTED[form]
    sample = samples_of(tmp_path, *rows_of(form, 1))[0]
    example = prompts.encode(OPENED, sample, alone=True)
    assert OPENED.decode(example["input_ids"]) == prompt + completion
    learned = [label for label in example["labels"] if label != IGNORE]
    assert OPENED.decode(learned) == completion and example["labels"][-len(learned) :] == learned
    assert OPENED.decode(prompts.encode_prompt(OPENED, sample, alone=True)) == prompt


@pytest.mark.parametrize("form", EXPECTED)
def test_loss_on_all_tokens_leaves_out_the_first_alone(tmp_path, form):
    sample = samples_of(tmp_path, *rows_of(form, 1))[0]
    example = prompts.encode(OPENED, sample, loss="all", alone=True)
    assert example["labels"] == [IGNORE, *example["input_ids"][1:]]
    plain = make_chat_tokenizer()
    example = prompts.encode(plain, samples_of(tmp_path, *rows_of(form, 1), tokenizer=plain)[0], "all", alone=True)
    assert example["labels"] == [IGNORE, *example["input_ids"][1:]], "also without an opening token"


def test_tokens_that_a_text_has_already_are_not_doubled(tmp_path):
    row = {"prompt": "<pad>Hi", "completion": " there<eos>"}
    example = prompts.encode(OPENED, samples_of(tmp_path, row)[0], alone=True)
    assert OPENED.decode(example["input_ids"]) == "<pad>Hi there<eos>"


def test_worked_examples_learn_all_tokens_when_asked_to(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": i}) + "\n" for i in range(40)))
    tokenizer = make_tokenizer()
    data = prepare_data(Settings(device="cpu", data=str(path), loss="all"), tokenizer)
    assert data.prefix and all(s["labels"] == [IGNORE, *s["input_ids"][1:]] for s in data.sequences)


@pytest.mark.parametrize(("wanted", "together", "joined"), [(None, 5, 4), (2, 3, 2), (0, 1, 1)])
def test_answers_that_are_numbers_follow_worked_examples_unless_shots_says_otherwise(
    tmp_path, wanted, together, joined
):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"a\n{i}"}) + "\n" for i in range(40)))
    tokenizer = make_tokenizer()
    data = prepare_data(Settings(device="cpu", data=str(path), shots=wanted, eval_problems=1), tokenizer)
    text = tokenizer.decode(data.sequences[0]["input_ids"])
    assert (data.together, text.count("Question"), data.lines) == (together, joined, joined > 1)
    assert tokenizer.decode(data.prefix).count("Question") == together - 1
    assert ("Answer: a 1" in text or "Answer: a 2" in text or "Answer: a 3" in text) or joined == 1
    assert ("Answer: a\n" in text and text.endswith("<eos>")) == (joined == 1)
    assert data.metric == "number"
    unscored = Settings(device="cpu", data=str(path), shots=wanted, eval_problems=1, metric="none")
    same = prepare_data(unscored, tokenizer)
    assert (same.sequences, same.metric) == (data.sequences, "none")


def test_answers_that_are_words_follow_none(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": i or "none"}) + "\n" for i in range(40)))
    tokenizer = make_tokenizer()
    data = prepare_data(Settings(device="cpu", data=str(path)), tokenizer)
    assert (data.prefix, data.lines, data.together, len(data.sequences), data.rows) == ([], False, 1, 32, 8)
    asked = prepare_data(Settings(device="cpu", data=str(path), shots=3, batch_size=6), tokenizer)
    assert asked.lines and asked.together == 4 and asked.rows == 2


@pytest.mark.parametrize("form", ["messages", "completion", "instruction", "text"])
def test_worked_examples_are_for_questions(tmp_path, form):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(form)))
    with pytest.raises(UserError, match="^shots is 2, and only questions with answers follow others"):
        prepare_data(Settings(device="cpu", data=str(path), shots=2), OPENED)


def test_a_metric_that_an_answer_does_not_fit_is_refused_with_its_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": i or "none"}) + "\n" for i in range(40)))
    with pytest.raises(UserError, match=f"^{path}, line 1: .* holds no number"):
        prepare_data(Settings(device="cpu", data=str(path), metric="number"), make_tokenizer())


def test_other_columns_are_ignored_and_the_first_form_counts(tmp_path):
    row = {"id": 3, "text": "unused", "prompt": "1 and", "completion": 2.50}
    sample = samples_of(tmp_path, row)[0]
    assert (sample.prompt, sample.completion, sample.answer) == ("1 and", "2.5", "2.5")
    row = {"messages": turns("Hi", "Hello"), "prompt": "unused"}
    assert samples_of(tmp_path, row)[0].question == "Hi"


MESSAGES = {
    "the chat ends with the role user; end it with the assistant turn to learn": turns("a", "b", "c"),
    "the chat has no assistant turn to learn; add one": turns("a"),
    "no user turn stands before the assistant turn to learn; add one": turns("a", first="assistant"),
    "messages has the role 'bot'; use one of system, developer, user, assistant, tool": [
        {"role": "bot", "content": "a"}
    ],
    "messages has the role None": [{"from": "user", "value": "a"}],
    "messages has a turn whose content is no text; write it as one string": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ],
    "the last assistant turn is empty; fill it in, or leave out the row": turns("a", " "),
    "messages is no list of messages; give objects with role and content": [],
    "messages is no list of messages; ": "user: a",
    "messages is no list of messages": ["a", "b"],
    "the tokenizer's chat template refuses the chat: no developers here": [
        {"role": "developer", "content": "a"},
        *turns("a", "b"),
    ],
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_chat_that_cannot_be_learned_is_refused_with_its_line(tmp_path, message):
    with pytest.raises(UserError) as error:
        samples_of(tmp_path, {"messages": turns("a", "b")}, {"messages": MESSAGES[message]})
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}, line 2: {message}")


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="the model's tokenizer has no chat template; give a model that was trained on"):
        samples_of(tmp_path, {"messages": turns("a", "b")}, tokenizer=make_tokenizer())


def test_prompt_and_completion_are_both_texts_or_both_chats(tmp_path):
    with pytest.raises(UserError, match="line 1: completion is no list of messages"):
        samples_of(tmp_path, {"prompt": turns("a"), "completion": "b"})


def test_long_samples_are_left_out_or_cut(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i:02}", "completion": "b" * (30 if i % 2 else 5)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    options = {"device": "cpu", "data": str(path), "max_length": 20, "batch_size": 2}
    data = prepare_data(Settings(**options), tokenizer)
    said = capsys.readouterr().out
    short, kept = len(data.sequences), len(data.heldout)
    assert said == (
        f"{32 - short} training samples have more than 20 tokens and are left out\n"
        f"{8 - kept} held-out samples have more than 20 tokens and are left out\n"
    )
    assert 0 < short < 32 and 0 < kept < 8
    assert {len(s["input_ids"]) for s in data.sequences} == {8} and data.longest == 8
    data = prepare_data(Settings(**options, truncate=True), tokenizer)
    assert capsys.readouterr().out == said.replace("left out\n", "cut\n", 1)
    assert len(data.sequences) == 32 and len(data.heldout) == kept
    cut = [s for s in data.sequences if len(s["input_ids"]) == 20]
    assert len(cut) == 32 - short and all(tokenizer.decode(s["input_ids"][2:]) == "b" * 18 for s in cut)
    assert all(s["labels"] == [IGNORE] * 2 + s["input_ids"][2:] for s in cut)
    with pytest.raises(UserError, match="no training sample has at most 3 tokens; raise --max-length"):
        prepare_data(Settings(**options | {"max_length": 3}), tokenizer)


def test_a_prompt_that_leaves_nothing_to_learn_is_left_out_even_when_samples_are_cut(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": ("a" * 30 if i % 2 else "") + f"{i:02}", "completion": "b"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Settings(device="cpu", data=str(path), max_length=20, batch_size=2, truncate=True)
    data = prepare_data(options, make_tokenizer())
    assert {len(s["input_ids"]) for s in data.sequences} == {4}
    said = capsys.readouterr().out
    assert f"{32 - len(data.sequences)} training samples have more than 20 tokens and are left out" in said
    with pytest.raises(UserError, match="leave out --truncate, or give --shots 0"):
        prepare_data(Settings(device="cpu", truncate=True), make_tokenizer())
