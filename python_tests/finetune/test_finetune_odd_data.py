"""Odd data: doubled columns, answers that differ by capitals, and tokenizers that add spaces."""

import csv
import json

import pandas
import pytest
from helpers.tiny_llama import make_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from lift_kernels.errors import UserError
from lift_kernels.finetune import metrics, prompts
from lift_kernels.finetune.forms import COLUMNS, read_samples
from lift_kernels.finetune.prompts import Sample
from lift_kernels.finetune.sources import read_rows


def spaced_tokenizer(*merges):
    """A tokenizer of characters and merges that puts a space in front of a text, as Llama 2's."""
    letters = sorted(set("▁Question:Answer7\nHelo "))
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *letters, *map("".join, merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def test_an_answer_has_the_tokens_that_follow_its_prompt_in_the_whole_text():
    """Encoded alone, " 7" would have a second space in front."""
    tokenizer = spaced_tokenizer(("▁", "7"))
    sample = prompts.single_example("so", "7")
    for alone in (True, False):
        example = prompts.encode(tokenizer, sample, alone=alone)
        tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
        learned = [label for label in example["labels"] if label != prompts.IGNORE]
        assert tokenizer.convert_ids_to_tokens(learned) == ["▁7", "<eos>"][: 1 + alone]
        assert tokens[: tokens.index("▁7")] == list("▁Question:▁so\nAnswer:")
        asked = prompts.encode_prompt(tokenizer, sample, alone)
        assert example["input_ids"][: len(asked)] == asked


def test_a_completion_that_would_share_a_token_with_its_prompt_is_encoded_alone():
    tokenizer = spaced_tokenizer(("e", "l"))
    example = prompts.encode(tokenizer, Sample("He", "lo"))
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == list("▁He") + list("▁lo")
    assert example["labels"][:3] == [prompts.IGNORE] * 3


def test_choices_that_differ_by_capitals_are_different_answers():
    samples = [Sample("a", answer, "a", answer) for answer in ("yes", "YES", "yes", "YES")]
    metric = metrics.choose_metric(samples, None, make_tokenizer())
    assert (metric.name, metric.choices) == ("choice", ("YES", "yes"))
    assert metric.right("YES", " YES\n") and not metric.right("YES", "yes")
    assert metrics.choose_metric(samples, "exact", make_tokenizer()).right("YES", "yes")


@pytest.mark.parametrize(
    ("text", "expected", "same"),
    [
        ("7006652", "7006653", False),
        ("7,006,652.0", "7006652", True),
        ("2.3333333", "2.33333333", True),
        ("2.33", "2.34", False),
        ("none", "7", False),
    ],
)
def test_whole_numbers_are_equal_and_others_nearly(text, expected, same):
    assert metrics.same_number(text, expected) == same


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_needed_column_that_is_there_twice_is_refused(tmp_path, suffix):
    """The last one would be taken without a word."""
    path = tmp_path / f"a.{suffix}"
    write_table(path, ["question", "answer", "answer"], [["a", "b", "c"]] * 3)
    with pytest.raises(UserError, match=f"^{path}.*: 2 columns are called answer; rename or remove all but one$"):
        read_rows([str(path)], "train", COLUMNS)
    write_table(path, ["question", "answer", "", ""], [["a", "b", "c", "d"]])
    [row] = read_rows([str(path)], "train", COLUMNS)
    assert (row.values["question"], row.values["answer"]) == ("a", "b")


def write_table(path, names, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
        return
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array(column) for column in zip(*rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names), path)


def test_blank_lines_may_stand_before_the_names_of_csv_columns(tmp_path):
    (tmp_path / "a.csv").write_text("\n\ntext\none\n")
    [row] = read_rows([str(tmp_path / "a.csv")], "train", COLUMNS)
    assert row.values == {"text": "one"} and row.where.endswith("a.csv, line 4")


def test_a_blank_input_is_no_input(tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": given, "output": "a"} for i, given in enumerate(("", " \n", None, 0))]
    pandas.DataFrame(rows).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    _, samples = read_samples([str(tmp_path / "a.jsonl")], "train", make_tokenizer())
    assert [s.prompt for s in samples] == [f"Instruction: Say {i}.\nOutput:" for i in range(3)] + [
        "Instruction: Say 3.\nInput: 0\nOutput:"
    ]


def test_messages_about_very_long_names_are_short(tmp_path):
    (tmp_path / "a.csv").write_text("x" * 100_000 + "\na\n")
    turn = {"role": "r" * 100_000, "content": "a"}
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [turn]}) + "\n")
    for name, said in (("a.csv", "no known column (xxx"), ("b.jsonl", "has the role 'rrr")):
        with pytest.raises(UserError) as caught:
            read_samples([str(tmp_path / name)], "train", make_tokenizer())
        assert said in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))
