"""The training data: which files are read, how problems are encoded, which files are refused."""

import json

import pytest
from helpers.finetune_runs import refused
from helpers.word_problem_examples import encoded

from lift_kernels.errors import UserError
from lift_kernels.finetune import prompts, word_problems
from lift_kernels.finetune.data import choose_problems, read_problems, training_sequences
from lift_kernels.finetune.run import run


def test_finetune_reads_jsonl_and_splits_off_a_heldout_part(settings, tmp_path):
    problems = word_problems.generate(60, "train", seed=5)
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    data.write_text("\n".join([*rows, "", rows[0]]) + "\n")  # a blank line and a repeated question
    options = settings(data=str(data), name="data", steps=2, eval_problems=100)
    train, heldout, shots, description = choose_problems(options)
    questions = [p.question for p in train + heldout + shots]
    assert sorted(questions) == sorted(p.question for p in problems)
    assert (len(train), len(heldout), len(shots)) == (44, 12, 4)
    assert description.endswith("44 for training, 12 held out")
    assert run(options)["exact_match.problems"] == 12


def test_encoding_labels_the_answer_alone(tokenizer):
    example = encoded(tokenizer, word_problems.Problem("How many? ", "1 + 1 = 2.\nThe answer is 2."))
    labels = [t for t in example["labels"] if t != prompts.IGNORE]
    assert tokenizer.decode(example["input_ids"]) == "Question: How many?\nAnswer: 1 + 1 = 2. The answer is 2.\n"
    assert tokenizer.decode(labels) == " 1 + 1 = 2. The answer is 2.\n"
    assert example["labels"][-len(labels) :] == labels


def test_encoding_join_keeps_every_label_and_puts_the_opening_token_first(tokenizer):
    examples = [encoded(tokenizer, p) for p in word_problems.generate(3, "train")]
    joined = prompts.join(tokenizer, examples)
    assert joined["input_ids"] == sum((e["input_ids"] for e in examples), [])
    assert joined["labels"] == sum((e["labels"] for e in examples), [])

    class WithOpening:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": ([7] if add_special_tokens else []) + list(text.encode())}

    joined = prompts.join(WithOpening(), examples)
    assert joined["input_ids"][0] == 7 and joined["labels"][0] == prompts.IGNORE
    assert joined["input_ids"].count(7) == 1 + sum(e["input_ids"].count(7) for e in examples)


def test_qa_data_training_sequences_hold_every_problem_once(tokenizer):
    examples = [encoded(tokenizer, p) for p in word_problems.generate(24, "train")]
    for batch_size, each, rows in ((8, 4, 2), (6, 3, 2), (2, 2, 1), (5, 1, 5), (1, 1, 1)):
        sequences, found = training_sequences(tokenizer, examples, batch_size)
        assert (len(sequences), found) == (24 // each, rows)
        assert sum((s["labels"] for s in sequences), []) == sum((e["labels"] for e in examples), [])
    with pytest.raises(UserError, match="24 training problems do not fill a batch of 25"):
        training_sequences(tokenizer, examples, 25)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not valid JSON"),
        ('["question", "answer"]', 'the strings "question" and "answer"'),
        ('{"question": "How many?"}', 'the strings "question" and "answer"'),
        ('{"question": "How many?", "answer": 3}', 'the strings "question" and "answer"'),
        ('{"question": " ", "answer": "3"}', 'the strings "question" and "answer"'),
        ('{"question": "How many?", "answer": "a few"}', "no number"),
    ],
)
def test_finetune_malformed_jsonl_is_refused_with_its_line(tmp_path, capsys, tiny, line, reason):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 and 1?", "answer": "2"}\n\n' + line + "\n")
    message = refused(capsys, "--model", str(tiny), "--data", str(data))
    assert f"{data}, line 3: " in message and reason in message


def test_finetune_refuses_data_that_is_missing_or_too_little(tmp_path, capsys, tiny):
    assert "cannot read" in refused(capsys, "--model", str(tiny), "--data", str(tmp_path / "none.jsonl"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"question": "{i} and 1?", "answer": "{i + 1}"}}\n' for i in range(10)))
    assert "holds 10 different problems; give at least 17" in refused(capsys, "--model", str(tiny), "--data", str(data))


SEPARATORS = {"U+2028": "\u2028", "U+2029": "\u2029", "U+0085": "\x85", "VT": "\\u000b", "FF": "\\f"}


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_end_where_json_lines_say(tmp_path, separator, end, mark):
    """Unicode has more line separators, which strings may hold. An editor may add a mark."""
    rows = [f'{{"question": "{i}{SEPARATORS[separator]}?", "answer": "{i}"}}' for i in range(3)]
    (tmp_path / "data.jsonl").write_bytes(mark + end.join([*rows, "", ""]).encode())
    problems = read_problems(tmp_path / "data.jsonl")
    inside = json.loads(f'"{SEPARATORS[separator]}"')
    assert [(p.question, p.answer) for p in problems] == [(f"{i}{inside}?", str(i)) for i in range(3)]


def test_a_wrong_line_is_counted_as_an_editor_counts(tmp_path):
    rows = ['{"question": "a\u2028b", "answer": "1"}', '{"question": "c", "answer": "none"}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match="line 2: the answer contains no number"):
        read_problems(tmp_path / "data.jsonl")


def test_a_file_that_is_not_utf_8_is_named_with_the_way_out(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "1"}', encoding="utf-16")
    with pytest.raises(UserError, match="data.jsonl is not UTF-8 .* at byte 0.; save it as UTF-8"):
        read_problems(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="cannot read .*: Is a directory; check --data"):
        read_problems(tmp_path)
