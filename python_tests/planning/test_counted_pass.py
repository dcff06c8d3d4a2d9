"""Counting a pass: layers that repeat, two counts in place of many, and options of the pass."""

from __future__ import annotations

import pytest
import torch
from helpers.planned_models import SIZES, config_of
from torch import nn
from transformers import LlamaConfig, MambaConfig

from lift_kernels.errors import UserError
from lift_kernels.planning import counted_pass
from lift_kernels.planning.counted_pass import count_pass, decoder_layers, repetition
from lift_kernels.planning.live_storages import LiveStorages
from lift_kernels.planning.model_shapes import model_shapes

pytestmark = pytest.mark.slow


def shapes(layers: int = 7, **options):
    return model_shapes(LlamaConfig(**SIZES, num_hidden_layers=layers), **options)


@pytest.mark.parametrize(
    "kinds, expected",
    [("aaaa", (0, 1)), ("dmmmm", (1, 1)), ("ssfssfs", (0, 3)), ("dsfsf", (1, 2)), ("abcd", (0, 4)), ("", (0, 1))],
)
def test_what_repeats(kinds, expected):
    start, period = repetition(kinds)
    assert (start, period) == expected or (kinds == "abcd" and start + period == 4)


@pytest.mark.parametrize("name, layers", [("llama", 7), ("gemma", 12), ("mixture", 6)])
def test_layers_are_found(name, layers):
    assert len(decoder_layers(model_shapes(config_of(name)).model)) == layers
    assert len(decoder_layers(nn.Linear(2, 2))) == 0


@pytest.mark.parametrize("kind", ["full", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_counts_give_what_a_whole_count_gives(monkeypatch, kind, checkpointing):
    model, options = shapes(6), {"batch": 1, "seq": 64, "checkpointing": checkpointing}
    lengths = []
    whole = counted_pass._first_layers

    def noted(model, length):
        lengths.append(length)
        return whole(model, length)

    monkeypatch.setattr(counted_pass, "_first_layers", noted)
    quick = count_pass(model, kind, **options)
    assert lengths == [2, 3]
    monkeypatch.setattr(counted_pass, "MOST", 100)
    full = count_pass(model, kind, **options)
    assert lengths == [2, 3, 6]
    assert vars(quick) == pytest.approx(vars(full), rel=1e-3)


def test_gradients_and_what_a_form_adds():
    model = shapes(3, density=0.1)
    linear = sum(m.shape.numel() for m in model.matrices)
    options = {"batch": 1, "seq": 32}
    full, dense, packed = (count_pass(model, kind, **options) for kind in ("full", "dense", "packed"))
    assert (full.added, full.gradients) == (0, 2 * model.parameters)
    assert (dense.added, dense.gradients) == (0, 2 * linear)
    assert (packed.added, packed.gradients) == (8 * model.entries, 4 * model.entries)
    assert model.entries == sum(round(0.1 * m.shape.numel()) for m in model.matrices)
    for count in (full, dense, packed):
        assert count.activations <= count.halved <= count.together <= count.activations + count.gradients
    assert full.together > full.gradients


def test_options_of_a_pass():
    """More tokens, a second pass on top of gradients, padding, autocast, a GPU's dense product."""
    model, options = shapes(3), {"batch": 1, "seq": 64}
    plain = count_pass(model, "dense", **options)
    assert 1.8 < count_pass(model, "dense", batch=2, seq=64).activations / plain.activations < 2.05
    again = count_pass(model, "dense", **options, passes=3)
    assert again.gradients == plain.gradients
    assert again.together > plain.together and again.together > again.gradients + 0.8 * plain.activations
    assert count_pass(model, "dense", **options, padded=True).activations > plain.activations
    whole = shapes(3, dtype=torch.float32)
    wide, narrow = (count_pass(whole, "packed", **options, autocast=autocast) for autocast in (False, True))
    assert narrow.activations != wide.activations
    card, host = (
        count_pass(model, "packed", batch=1, seq=4, checkpointing=True, device=device) for device in ("cuda", "cpu")
    )
    assert card.activations - host.activations > 0.5 * 2 * 640 * 256


def test_a_model_without_checkpointing_says_so():
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=64)
    count_pass(model_shapes(config), "full", batch=1, seq=16)
    model = model_shapes(config)
    type(model.model).supports_gradient_checkpointing, before = False, type(model.model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match="has no checkpointing"):
            count_pass(model, "full", batch=1, seq=16, checkpointing=True)
    finally:
        type(model.model).supports_gradient_checkpointing = before


def test_a_model_that_cannot_be_run_is_refused(monkeypatch):
    model = shapes(2)

    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(model.model), "forward", broken)
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be run without numbers .*no such kernel"):
        count_pass(model, "full", batch=1, seq=16)


def test_storages_count_once_and_until_they_are_freed():
    live = LiveStorages({torch.ops.aten.mul.Tensor: lambda a, b: 1000})
    held = torch.zeros(16)
    live.hold([held, held[2:]])
    assert live.alive == 64
    with live:
        made = torch.ones(8)
        view = made.view(2, 4)
        assert live.alive == 96
        live.mark_gradient(made)
        live.mark_gradient(view)
        assert live.gradients == 32
        del made
        assert live.alive == 96
        del view
        assert (live.alive, live.gradients) == (64, 0)
        assert live.restart_peaks() == {0.0: 96, 0.5: 96, 1.0: 96} and live.peaks == dict.fromkeys((0.0, 0.5, 1.0), 64)
        held * held
    assert live.alive == 64 and live.peaks[1.0] == 64 + 64 + 1000
