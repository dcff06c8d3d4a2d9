"""How long a run will take: counts of tokens, and passes that leave no trace."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.architectures import save_architecture
from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings
from helpers.interrupted_runs import interrupted
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import RunData, prepare_data
from lift_kernels.finetune.estimate import Estimate, Tokens, estimate, span, training_batches
from lift_kernels.finetune.methods import prepare
from lift_kernels.finetune.run import run
from lift_kernels.finetune.timing import Clock
from lift_kernels.nn.grad_hooks import hooked_parameters


@pytest.fixture(autouse=True)
def cheap_runs(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


def example(length: int, labelled: int = 1) -> dict[str, list[int]]:
    return {"input_ids": [5] * length, "labels": [-100] * (length - labelled) + [5] * labelled}


DATA = RunData(
    sequences=[example(length) for length in (10, 20, 30, 40, 50)],
    rows=2,
    heldout=[None, None, None],
    encoded=[example(8, 2), example(3), example(5, 3)],
    asked=[[5] * 6, [5] * 2, [5] * 2],
    prefix=[5] * 4,
    lines=True,
    metric="number",
    longest=50,
    together=1,
    description="",
)


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


def areas(settings: Settings, padded: bool) -> list[int]:
    """Tokens of each batch of an epoch."""
    return [
        (max if padded else sum)(10 * (i + 1) for i in batch) * (len(batch) if padded else 1)
        for batch in training_batches(DATA, settings)
    ]


def test_training_counts_the_tokens_of_all_batches_with_their_padding(model, tokenizer):
    settings = Settings(device="cpu", steps=1)
    epoch = areas(settings, padded=True)
    assert len(epoch) == 3 and sum(epoch) > 150
    for steps, expected in ((1, epoch[0]), (3, sum(epoch)), (7, 2 * sum(epoch) + epoch[0])):
        assert estimate(model, tokenizer, DATA, steps, settings, 100).tokens.training == expected
    halves = replace(settings, accumulation=2)
    assert sorted(areas(halves, padded=True)) == [10, 20, 30, 40, 50], "one sequence a pass has no padding"
    first = training_batches(DATA, halves)[:2]
    assert estimate(model, tokenizer, DATA, 4, halves, 100).tokens.training == 150 + sum(10 * (b[0] + 1) for b in first)


def test_measuring_counts_texts_prompts_and_passes_that_write(model, tokenizer):
    settings = Settings(device="cpu", steps=1)
    found = estimate(model, tokenizer, DATA, 1, settings, 100)
    assert found.tokens == Tokens(found.tokens.training, measured=3 * 8 + 100, asked=4 + 3 * 6, written=3 + 8)
    assert found.total == found.training + found.losses + found.answers and found.masks == 0
    chosen = estimate(model, tokenizer, replace(DATA, metric="choice"), 1, settings, 100).tokens
    assert (chosen.asked, chosen.written) == (4 + 10 + 3 * (1 + 2 + 3), 0), "every answer continues every prompt"
    silent = estimate(model, tokenizer, replace(DATA, metric="none"), 1, settings, 100)
    assert (silent.tokens.asked, silent.tokens.written, silent.answers) == (0, 0, 0)


def test_a_model_that_reads_padding_gets_rows_without_it(tokenizer):
    config = RwkvConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=0)
    model = RwkvForCausalLM(config)
    found = estimate(model, tokenizer, DATA, 3, Settings(device="cpu", steps=3), 100).tokens
    assert found == Tokens(training=150, measured=16 + 100, asked=10 + 3 * 4, written=3 * (3 + 8))


def test_later_masks_are_counted_where_a_method_makes_some(model, tokenizer):
    def masks(**options):
        settings = Settings(device="cpu", steps=60, refresh_interval=25, **options)
        return estimate(model, tokenizer, DATA, 60, settings, 100, mask_seconds=3.0).masks

    assert masks() == 6.0 and masks(method="magnitude") == 6.0
    assert masks(method="random") == masks(method="full") == masks(method="gradient") == 0.0


def everything(ready) -> dict[str, torch.Tensor]:
    """Copies of all that a training step reads or writes."""
    model, found = ready.model, {}
    for name, p in model.named_parameters():
        found[name] = p.detach().clone()
        assert p.grad is None and getattr(p, "lift_grad", None) is None, name
    for name, buffer in model.named_buffers():
        found[name] = buffer.clone()
    for number, state in enumerate(ready.optimizer.state.values()):
        found |= {f"{number}.{key}": value.clone() for key, value in state.items() if torch.is_tensor(value)}
    return found


@pytest.mark.parametrize("changes", [{}, {"gradients": "dense"}, {"method": "full"}, {"checkpointing": True}])
def test_the_passes_disturb_nothing(settings, tmp_path, tokenizer, changes):
    """The model has dropout, which draws random numbers, and experts with hooks."""
    folder = save_architecture("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.1)
    options = settings(model=str(folder), autocast=True, **changes)
    data = prepare_data(options, tokenizer)
    ready = prepare(model, tokenizer, options, data, Clock(model.device), None)
    assert bool(hooked_parameters(model)) == (changes in ({}, {"checkpointing": True}))
    before, mode = everything(ready), model.training
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    estimate(ready.model, tokenizer, data, 3, options, 100)
    drawn = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(drawn[0], expected[0]) and drawn[1:] == expected[1:]
    assert model.training == mode
    after = everything(ready)
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_gradients_that_were_there_stay(model, tokenizer):
    gradient = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = gradient
    estimate(model, tokenizer, DATA, 1, Settings(device="cpu", steps=1), 100)
    assert model.lm_head.weight.grad is gradient and bool((gradient == 1).all())
    assert sum(p.grad is not None for p in model.parameters()) == 1
    model.lm_head.weight.grad = None


def test_a_run_with_and_without_an_estimate_ends_in_the_same_bits(tiny, tmp_path, monkeypatch, capsys):
    run(make_settings(tiny, tmp_path, name="with", steps=4))
    said = capsys.readouterr().out
    assert "s of training (4 steps), " in said and "of measuring before and after, on this machine as it is now" in said
    with monkeypatch.context() as patch:
        patch.setitem(run.__globals__, "estimate", lambda *args, **kwargs: "no estimate")
        run(make_settings(tiny, tmp_path, name="without", steps=4))
    assert "no estimate" in capsys.readouterr().out
    assert_same_end(tmp_path / "with", tmp_path / "without")


def test_a_resumed_run_counts_the_rest(tiny, tmp_path, monkeypatch, capsys):
    interrupted(monkeypatch, make_settings(tiny, tmp_path, steps=5), 3)
    capsys.readouterr()
    run(make_settings(tiny, tmp_path, steps=5), resumed=True)
    said = capsys.readouterr().out
    assert "of training (2 steps), " in said and "of measuring after, on this machine" in said


def test_times_are_said_as_people_say_them():
    assert [span(s) for s in (0.2, 40, 99, 100, 240, 5900, 9000)] == [
        *("0 s", "40 s", "99 s", "2 min", "4 min", "98 min", "2.5 h"),
    ]
    text = str(Estimate(Tokens(1, 1, 1, 1), 60, 2, training=120, masks=20, losses=30, answers=30))
    assert text == (
        "about 3 min: 2 min of training (60 steps), up to 20 s of new masks, 60 s of measuring before and after, on "
        "this machine as it is now"
    )
