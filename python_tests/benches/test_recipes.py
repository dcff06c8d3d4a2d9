"""bench/recipes.py: what the paper's recipe takes on a card, against closed formulas."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import recipes
from bench.recipes import MODELS, SETTINGS, activation_bytes, measured, row_of, training_seconds

SMALL, LARGE = (model for model, _ in recipes.MEASURED_MODELS.values())
FAST, CHECKPOINTED = SETTINGS


def test_the_models_have_their_published_numbers_of_parameters():
    assert [model.parameters for model in MODELS] == [1_235_814_400, 3_212_749_824, 6_738_415_616, 8_030_261_248]
    assert MODELS[2].linear == 6_476_005_376 and MODELS[2].entries == 323_800_269
    assert (SMALL.parameters, LARGE.parameters) == (1_100_048_384, 6_738_415_616)


def test_a_shape_counts_what_a_model_of_transformers_has():
    from helpers.tiny_llama import tiny_config
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM(tiny_config(tie_word_embeddings=False))
    shape = recipes.Model("tiny", 32, 64, 2, 16, llama.config.vocab_size, False)
    assert shape.parameters == llama.num_parameters()
    assert shape.linear == sum(m.weight.numel() for m in llama.model.modules() if isinstance(m, torch.nn.Linear))


def test_the_measured_runs_are_given_back():
    rates = measured()
    assert rates.tokens == {SMALL: 65_770, LARGE: 12_510}
    assert rates.refresh * LARGE.linear == pytest.approx(0.6532)
    # The peak of the run of 1.1 B, whose activations are the larger ones: 40.004 GB.
    kept = 16384 * (22 * rates.activation * (2048 + 5632) + 10 * 32000)
    assert kept + 2 * SMALL.parameters + 16 * 0.05 * SMALL.linear == pytest.approx(40.004e9, rel=1e-4)


def test_memory_of_a_backward_pass():
    rates = recipes.Rates({}, activation=10.0, refresh=0.0)
    model = recipes.Model("m", 100, 300, 4, 100, 1000, True)
    assert activation_bytes(model, FAST, rates) == 16 * 210 * (4 * 10 * 400 + 10 * 1000)
    assert activation_bytes(model, CHECKPOINTED, rates) == 4 * 210 * (4 * 2 * 100 + 10 * 400 + 10 * 1000)


def test_time_of_training_and_masks():
    model = recipes.Model("m", 100, 300, 4, 100, 1000, True)
    double = recipes.Model("twice", 100, 300, 8, 100, 1000, True)
    far = recipes.Model("far", 1000, 3000, 40, 1000, 1000, True)
    rates = recipes.Rates({double: 1000.0, far: 1.0}, activation=0.0, refresh=1e-6)
    tokens, masks = 3 * 10_000 * 210, 5 * 1e-6 * model.linear
    expected = tokens * model.parameters / double.parameters / 1000
    assert training_seconds(model, FAST, rates) == pytest.approx(expected + masks)
    assert training_seconds(model, CHECKPOINTED, rates) == pytest.approx(4 / 3 * expected + masks)


def test_a_row_names_the_least_card_and_the_minutes_of_those_that_are_large_enough():
    rates = measured()
    row = row_of(MODELS[2], CHECKPOINTED, rates)
    total = 2 * 6_738_415_616 + 20 * 323_800_269 + activation_bytes(MODELS[2], CHECKPOINTED, rates) + 1e9
    assert float(row["total_gb"]) == pytest.approx(total / 1e9, rel=5e-3) and row["card_gb"] == 24
    h200, rtx = float(row["minutes_h200"]), float(row["minutes_rtx_4090"])
    assert h200 == pytest.approx(training_seconds(MODELS[2], CHECKPOINTED, rates) / 60, rel=5e-3)
    assert rtx == pytest.approx(h200 * 989 / 165, rel=1e-2)
    row = row_of(MODELS[3], FAST, rates)
    assert (row["card_gb"], row["minutes_rtx_4090"], row["minutes_l40s"]) == (80, "", "") and row["minutes_a100"]


def test_the_saved_rows_are_those_of_the_present_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes", "--csv", str(tmp_path / "recipes.csv")])
    recipes.main()
    assert "Llama-3.2-3B" in capsys.readouterr().out
    new, saved = (
        [{key: value for key, value in row.items() if key != "commit"} for row in csv.DictReader(path.open())]
        for path in (tmp_path / "recipes.csv", recipes.MEASURED.parents[1] / "computed" / "recipes.csv")
    )
    assert new == saved and len(new) == len(MODELS) * len(SETTINGS)
