"""The training data: which files are read, how problems are encoded, which files are refused."""

import json

import pytest
from helpers.finetune_runs import refused
from helpers.word_problem_examples import encoded

from lift_kernels.errors import UserError
from lift_kernels.finetune import prompts, word_problems
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import choose_samples, prepare_data, read_problems
from lift_kernels.finetune.run import run
from lift_kernels.finetune.sequences import training_sequences


def test_finetune_reads_jsonl_and_splits_off_a_heldout_part(settings, tmp_path):
    problems = word_problems.generate(60, "train", seed=5)
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    data.write_text("\n".join([*rows, "", rows[0]]) + "\n")  # a blank line and a repeated question
    options = settings(data=str(data), name="data", steps=2, eval_problems=100)
    chosen = choose_samples(options, None)
    questions = [p.question for p in chosen.train + chosen.heldout + chosen.shown]
    assert sorted(questions) == sorted(p.question for p in problems)
    assert (len(chosen.train), len(chosen.heldout), len(chosen.shown)) == (44, 12, 4)
    report = run(options)
    assert report["exact_match.problems"] == 12
    assert report["data.description"] == f"{data}: 44 for training, 12 held out"


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


def test_training_sequences_hold_every_sample_once(tokenizer):
    examples = [encoded(tokenizer, p) for p in word_problems.generate(26, "train")]
    for size, shots, each, rows in ((8, 4, 4, 2), (6, 4, 3, 2), (2, 4, 2, 1), (5, 4, 1, 5), (8, 2, 2, 4), (8, 0, 1, 8)):
        options = Settings(device="cpu", batch_size=size)
        sequences, found = training_sequences(tokenizer, examples, options, shots)
        assert (len(sequences), found) == (-(-26 // each), rows)
        assert sum((s["labels"] for s in sequences), []) == sum((e["labels"] for e in examples), [])
    with pytest.raises(UserError, match="26 training samples do not fill a batch of 27; lower --batch-size"):
        training_sequences(tokenizer, examples, Settings(device="cpu", batch_size=27), 4)


def test_the_default_job_joins_four_problems_and_asks_after_four(tokenizer):
    data = prepare_data(Settings(device="cpu", steps=3, eval_problems=2), tokenizer)
    problems = [f"Question: {p.question}\nAnswer: {p.answer}\n" for p in word_problems.generate(28, "train")]
    assert tokenizer.decode(data.prefix) == "".join(problems[:4])
    assert [tokenizer.decode(s["input_ids"]) for s in data.sequences] == [
        "".join(problems[i : i + 4]) for i in range(4, 28, 4)
    ]
    asked = [f"Question: {p.question}\nAnswer:" for p in word_problems.generate(2, "heldout")]
    assert [tokenizer.decode(ids) for ids in data.asked] == asked
    assert (data.rows, data.lines, data.metric, data.together) == (2, True, "number", 5)


def test_hard_problems_are_generated_when_asked_for(tokenizer):
    data = prepare_data(Settings(device="cpu", steps=1, eval_problems=3, problems="hard"), tokenizer)
    assert [s.question for s in data.heldout] == [p.question for p in word_problems.generate(3, "heldout", 0, "hard")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not valid JSON"),
        ('["question", "answer"]', "a row has to be an object with columns such as question and answer"),
        ('{"question": "How many?"}', "has the column question and lacks answer; add it"),
        ('{"question": "How many?", "answer": true}', "answer is true or false; write it as text"),
        ('{"question": "How many?", "answer": null}', "answer is missing; fill it in, or leave out the row"),
        ('{"question": "How many?", "answer": NaN}', "answer is missing; fill it in, or leave out the row"),
        ('{"question": "How many?", "answer": ["3"]}', "answer is a list; write it as text"),
        ('{"question": " ", "answer": "3"}', "question is empty; fill it in, or leave out the row"),
        ('{"question": "How many?", "answer": "\\ud800"}', "answer has half of a surrogate pair"),
        ('{"text": "How many?"}', "has text, and rows before have question and answer; give one form in a run"),
    ],
)
def test_finetune_malformed_jsonl_is_refused_with_its_line(tmp_path, capsys, tiny, line, reason):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 and 1?", "answer": "2"}\n\n' + line + "\n")
    message = refused(capsys, "--model", str(tiny), "--data", str(data))
    assert f"{data}, line 3: " in message and reason in message


def test_the_number_of_further_bad_rows_is_said(tmp_path, capsys, tiny):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n' + '{"text": ""}\n' * 3 + '{"text": null}\n')
    message = refused(capsys, "--model", str(tiny), "--data", str(data))
    assert message == f"error: {data}, line 2: text is empty; fill it in, or leave out the row (as in 2 more)"
    data.write_text('{"text": "a"}\n' + "{text\n" * 3)
    assert refused(capsys, "--model", str(tiny), "--data", str(data)).endswith("or one array (as in 2 more)")


def test_finetune_refuses_data_that_is_missing_or_too_little(tmp_path, capsys, tiny):
    assert "cannot read" in refused(capsys, "--model", str(tiny), "--data", str(tmp_path / "none.jsonl"))
    data = tmp_path / "data.jsonl"
    for count in (10, 13, 14):
        data.write_text("".join(f'{{"question": "{i} and 1?", "answer": "{i + 1}"}}\n' for i in range(count)))
        if count < 14:
            message = refused(capsys, "--model", str(tiny), "--data", str(data))
            enough = "give at least 14, or lower --batch-size (8)"
            assert message == f"error: {data} holds {count} different samples; {enough}"
    chosen = choose_samples(Settings(device="cpu", data=str(data)), None)
    assert (len(chosen.train), len(chosen.heldout), len(chosen.shown)) == (8, 2, 4)


def test_a_repeated_prompt_is_kept_once_and_said(tmp_path, capsys):
    rows = [{"prompt": f"{i % 20}  is", "completion": f" {i}"} for i in range(23)]
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    second.write_text("".join(json.dumps(row) + "\n" for row in rows[12:]))
    chosen = choose_samples(Settings(device="cpu", data=(str(first), str(second))), None)
    assert sorted(s.completion for s in chosen.train + chosen.heldout) == sorted(f" {i}" for i in range(20))
    assert not {s.prompt for s in chosen.train} & {s.prompt for s in chosen.heldout}
    assert f"3 samples of {first}, {second} repeat a prompt and are left out" in capsys.readouterr().out


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
    rows = ['{"question": "a\u2028b", "answer": "1"}', '{"question": "c", "answer": ""}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match="line 2: answer is empty"):
        read_problems(tmp_path / "data.jsonl")


def test_a_file_that_is_not_utf_8_is_named_with_the_way_out(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "1"}', encoding="utf-16")
    with pytest.raises(UserError, match="data.jsonl is not UTF-8 .* at byte 0.; save it as UTF-8"):
        read_problems(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match="data.jsonl has no question and answer; give a file with these columns"):
        read_problems(tmp_path / "data.jsonl")
