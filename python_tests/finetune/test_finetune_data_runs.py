"""Rows of each form train a model, from files that people, datasets and pandas write."""

import json
import math
import random

import datasets
import numpy
import pandas
import pytest
import torch
import trl  # noqa: F401  (for chats and packing)
from helpers.data_rows import make_chat_tokenizer, rows_of
from helpers.short_training import trained
from helpers.tiny_llama import save_tiny

from lift_kernels.errors import UserError
from lift_kernels.finetune import evaluation
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import choose_samples, prepare_data

TOKENIZER = make_chat_tokenizer()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


def by_hand(rows, folder):
    path = folder / "hand.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def by_datasets(method, suffix):
    def write(rows, folder):
        path = folder / f"datasets.{suffix}"
        getattr(datasets.Dataset.from_list(rows), method)(path)
        return path

    return write


def by_pandas(rows, folder):
    path = folder / "pandas.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    return path


WRITERS = {
    "hand": by_hand,
    "json": by_datasets("to_json", "jsonl"),
    "csv": by_datasets("to_csv", "csv"),
    "parquet": by_datasets("to_parquet", "parquet"),
    "pandas": by_pandas,
}
CHATS = ("messages", "conversational")  # CSV cannot hold them
CASES = [
    (form, writer)
    for form in (*CHATS, "completion", "question", "instruction", "text")
    for writer in WRITERS
    if not (form in CHATS and writer == "csv")
]


@pytest.mark.parametrize(("form", "writer"), CASES)
def test_rows_of_each_form_train_alike_from_every_file(tiny, tmp_path, form, writer):
    rows = rows_of(form)
    path = WRITERS[writer](rows, tmp_path)
    options = {"model": str(tiny), "device": "cpu", "batch_size": 4, "save_steps": 0}
    model, losses, data = trained(Settings(data=str(path), **options), TOKENIZER, tmp_path, 2)
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert losses == trained(Settings(data=str(by_hand(rows, tmp_path)), **options), TOKENIZER, tmp_path, 2)[1]
    assert (len(data.sequences), len(data.heldout), data.rows) == (24, 6, 4)
    measured = evaluation.sample_losses(model, TOKENIZER, data.encoded, 4, "held out")
    assert all(math.isfinite(loss) and count > 0 for loss, count in measured)


@pytest.mark.parametrize("loss", ["answers", "all"])
def test_training_lowers_the_loss_of_a_chat(tiny, tmp_path, loss):
    path = by_hand(rows_of("messages"), tmp_path)
    options = Settings(model=str(tiny), device="cpu", batch_size=4, save_steps=0, data=str(path), loss=loss)
    _, losses, data = trained(options, TOKENIZER, tmp_path, 40)
    assert losses[-1] < 0.8 * losses[0]
    learned = TOKENIZER.decode([label for label in data.sequences[0]["labels"] if label != -100])
    whole = TOKENIZER.decode(data.sequences[0]["input_ids"])
    assert whole == "[" + learned if loss == "all" else whole.endswith("[assistant]" + learned)
    assert learned.endswith(" é<eos>\n") and learned.startswith("user]Hi" if loss == "all" else "Here:\n")


def test_several_files_train_together_and_one_form_is_asked_of_them(tmp_path):
    first = by_hand(rows_of("completion"), tmp_path)
    second = by_datasets("to_csv", "csv")(rows_of("completion", 50)[30:], tmp_path)
    settings = Settings(device="cpu", data=(str(first), str(second)), eval_problems=5)
    data = prepare_data(settings, TOKENIZER)
    assert data.description == f"{first}, {second}: 45 for training, 5 held out"
    assert {s.where.split(",")[0] for s in choose_samples(settings, TOKENIZER).train} == {str(first), str(second)}
    other = by_datasets("to_json", "jsonl")(rows_of("text", 2), tmp_path)
    said = f"^{other}, line 1: has text, and rows before have prompt and completion; give one form in a run .as in 1"
    with pytest.raises(UserError, match=said):
        prepare_data(Settings(device="cpu", data=(str(first), str(other))), TOKENIZER)


def test_preparing_data_draws_no_random_numbers(tiny, tmp_path):
    path = by_hand(rows_of("messages"), tmp_path)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    prepare_data(Settings(device="cpu", data=str(path)), TOKENIZER)
    assert random.getstate() == states[0] and numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
