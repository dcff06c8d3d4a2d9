"""The neutral text: what it is, its pieces, and files that are added to it."""

import platform
import sys

import pytest
from helpers.data_rows import make_chat_tokenizer
from helpers.finetune_runs import refused
from transformers import AutoTokenizer

from lift_kernels.errors import UserError
from lift_kernels.finetune import evaluation, neutral, prompts
from lift_kernels.finetune.model_io import bundled_model


@pytest.fixture
def whole(monkeypatch):
    """Take as much of the text as a run does."""
    monkeypatch.setattr(neutral, "TOKENS", 20_480)


def test_the_bundled_model_gets_eighty_pieces_of_256_tokens_without_padding(whole):
    source = bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    description, pieces = neutral.neutral_pieces(tokenizer)
    assert description == f"4 paragraphs, the prose of Python {platform.python_version()}'s language reference"
    assert [len(piece["input_ids"]) for piece in pieces] == [256] * 80
    assert (description, pieces) == neutral.neutral_pieces(tokenizer), "the same at each call"
    text = tokenizer.decode([token for piece in pieces for token in piece["input_ids"]])
    assert text.startswith("The river rises in the hills") and len(text) > 90_000


def test_pieces_are_the_text_in_order_and_all_tokens_but_the_first_are_labelled(tokenizer, whole):
    pieces = evaluation.neutral_examples(tokenizer)
    assert len(pieces) == 80
    text = tokenizer.decode([token for piece in pieces for token in piece["input_ids"]], errors="ignore")
    assert "\n\n".join(neutral.PARAGRAPHS) + "\n\n" == text[: sum(map(len, neutral.PARAGRAPHS)) + 8]
    for piece in pieces:
        assert piece["labels"] == [prompts.IGNORE, *piece["input_ids"][1:]]


def test_each_piece_begins_with_the_opening_token():
    tokenizer = make_chat_tokenizer(opening=True)
    [opening] = prompts.opening(tokenizer)
    pieces = neutral.neutral_pieces(tokenizer)[1]
    assert [len(piece["input_ids"]) for piece in pieces] == [256] * (neutral.TOKENS // 256)
    assert all(piece["input_ids"].index(opening) == 0 and piece["labels"][1] != prompts.IGNORE for piece in pieces)
    plain = [token for piece in pieces for token in piece["input_ids"][1:]]
    assert tokenizer.decode(plain).startswith(neutral.PARAGRAPHS[0])


def test_a_model_of_few_positions_gets_shorter_pieces(tokenizer):
    pieces = neutral.neutral_pieces(tokenizer, limit=100)[1]
    assert [len(piece["input_ids"]) for piece in pieces] == [100] * (neutral.TOKENS // 100)
    assert [len(p["input_ids"]) for p in neutral.neutral_pieces(tokenizer, limit=4096)[1]] == [256] * 4


def test_paragraphs_of_the_reference_are_sentences_and_differ():
    found = list(neutral._reference())
    assert len(found) == len(set(found)) > 250 and sum(map(len, found)) > 95_000
    assert all(text[0].isupper() and text.endswith(".") and "::" not in text and "\n" not in text for text in found)


def test_without_the_reference_the_paragraphs_alone_are_taken_and_it_is_said(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    description, pieces = neutral.neutral_pieces(tokenizer)
    assert description == "4 paragraphs alone, for this Python has no pydoc_data with the language reference"
    text = tokenizer.decode([token for piece in pieces for token in piece["input_ids"]])
    assert text == "\n\n".join(neutral.PARAGRAPHS)


def test_files_are_added_whole(tokenizer, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(b"\xef\xbb\xbf" + b"One two three. " * 30)  # a byte-order mark and 450 bytes
    second.write_text("Fünf Sätze.\n")
    built_in, pieces = neutral.neutral_pieces(tokenizer)
    description, more = neutral.neutral_pieces(tokenizer, [str(first), str(second)])
    assert description == f"{built_in}, {first}, {second}"
    assert more[: len(pieces)] == pieces
    assert [len(piece["input_ids"]) for piece in more[len(pieces) :]] == [256, 449 - 256, 13]
    assert tokenizer.decode(more[-1]["input_ids"]) == "Fünf Sätze."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read {}: No such file or directory; check --neutral"),
        (b" \n", "{} holds no text; give --neutral a file with some paragraphs"),
        (b"a", "{} holds less than two tokens of text; give --neutral a file with some paragraphs"),
        (b"ab\xff", "{} is not UTF-8 (invalid start byte at byte 2); save it as UTF-8 for --neutral"),
    ],
)
def test_bad_files_are_refused_before_the_run_has_a_directory(tokenizer, tiny, tmp_path, capsys, content, said):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        neutral.neutral_pieces(tokenizer, [str(path)])
    assert str(error.value) == said.format(path)
    output = tmp_path / "runs"
    line = refused(capsys, "--model", str(tiny), "--output", str(output), "--neutral", str(path))
    assert line == f"error: {said.format(path)}"
    assert not output.exists()
