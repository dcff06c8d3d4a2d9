"""LiftAdamW as a torch optimizer.

Tested are schedulers, closures, hooks, groups added later, names and warnings.
"""

from __future__ import annotations

import pytest
import torch
from helpers.bits import bits
from helpers.optimizers import OPTIONS, index_sets, make_weights, set_gradients, train
from torch.optim import lr_scheduler

from lift_kernels import LiftAdamW, principal_indices


def test_two_weights_and_lr_are_enough():
    weights = make_weights(((80, 100), (30, 20)))
    start = [w.detach().clone() for w in weights]
    optimizer = LiftAdamW(weights, lr=0.01)
    train(optimizer, range(2))
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["density"]) == ((0.9, 0.999), 1e-8, 0.0, 0.05)
    for w, s, rank in zip(weights, start, (64, 20)):
        assert torch.equal((w != s).flatten().nonzero().flatten().int(), principal_indices(s, rank, density=0.05))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=10),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]),
    ],
)
def test_schedulers_drive_lr(backend, make):
    """The same learning rates by hand give the same bits. OneCycleLR moves betas too."""
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, backend=backend.name)
    by_hand = LiftAdamW(copies, **OPTIONS, backend=backend.name)
    scheduler = make(optimizer)
    rates = set()
    for step in range(6):
        for key in ("lr", "betas"):
            by_hand.param_groups[0][key] = optimizer.param_groups[0][key]
        rates.add(optimizer.param_groups[0]["lr"])
        train(optimizer, [step])
        train(by_hand, [step])
        scheduler.step()
    assert len(rates) > 3 and all(torch.equal(w, t) for w, t in zip(weights, copies))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_equals_the_number(backend, shape):
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    lr = torch.full(shape, 0.0078125)  # exact in fp32
    optimizer = LiftAdamW(weights, **OPTIONS | {"lr": lr}, backend=backend.name)
    other = LiftAdamW(copies, **OPTIONS | {"lr": 0.0078125}, backend=backend.name)
    for step in range(4):
        if step == 2:
            lr.fill_(0.00390625)
            other.param_groups[0]["lr"] = 0.00390625
        train(optimizer, [step])
        train(other, [step])
    assert all(torch.equal(bits(w), bits(t)) for w, t in zip(weights, copies))


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    weight = make_weights(((12, 10),))[0]
    optimizer = LiftAdamW([weight], lr=0.1, density=1.0)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert [optimizer.step(closure).item() for _ in range(20)] == losses
    assert losses[-1] < 0.3 * losses[0]


def test_zero_grad():
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS)
    set_gradients(weights, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not w.grad.any() for w in weights)
    optimizer.zero_grad()
    assert all(w.grad is None for w in weights)
    optimizer.step()  # nothing to do, nothing counted
    assert optimizer.param_groups[0]["steps_since_refresh"] == 0


def test_step_hooks_see_each_step():
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS)
    before, after = [], []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: before.append(weights[0].detach().clone()))
    optimizer.register_step_post_hook(lambda o, args, kwargs: after.append(weights[0].detach().clone()))
    train(optimizer, range(2))
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], weights[0])
    assert not torch.equal(before[0], after[0]) and len(before) == len(after) == 2


def test_a_group_added_later_starts_from_zero(backend):
    """It joins at its first step, with its own options.

    Matrices that are already there continue as without it.
    """
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    late = make_weights(((30, 30),), device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, backend=backend.name)
    other = LiftAdamW(copies, **OPTIONS, backend=backend.name)
    train(optimizer, range(3))
    train(other, range(3))
    optimizer.add_param_group({"params": late, "density": 0.2})
    train(optimizer, range(3, 5))
    train(other, range(3, 5))
    assert [len(x) for x in index_sets(optimizer)] == [96, 56, 180]
    assert [optimizer.state[p]["step"].item() for p in (*weights, *late)] == [5, 5, 2]
    for w, t in zip(weights, copies):
        assert torch.equal(w, t)
        assert all(torch.equal(optimizer.state[w][key], value) for key, value in other.state[t].items())


def test_a_group_that_cannot_work_is_not_added():
    optimizer = LiftAdamW(make_weights(), **OPTIONS)
    with pytest.raises(ValueError, match="parameter 0 of group 1: density must be"):
        optimizer.add_param_group({"params": make_weights(((5, 5),)), "density": 2.0, "rank": 3})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": make_weights(((5, 5),)), "rank": 3})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "lm_head.weight",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "word_embeddings.weight",
        "shared.weight",
        "transformer.wpe.weight",
    ],
)
def test_an_embedding_chosen_by_default_is_warned_about(name, caplog):
    weight = make_weights(((12, 8),))[0]
    LiftAdamW([(name, weight)], rank=2)
    (record,) = caplog.records
    assert "1 matrices look like embeddings or heads" in record.getMessage()
    assert f"leaves out, for example {name};" in record.getMessage()
    caplog.clear()
    LiftAdamW([{"params": [(name, weight)], "lift": True}], rank=2)
    LiftAdamW([{"params": [(name, weight)], "lift": False}], rank=2)
    LiftAdamW([("model.layers.0.self_attn.q_proj.weight", weight), ("norm.weight", make_weights(((8,),))[0])], rank=2)
    assert not caplog.records


def test_repr_and_defaults_are_plain():
    text = repr(LiftAdamW(make_weights(), **OPTIONS))
    assert text.startswith("LiftAdamW (\nParameter Group 0") and "density: 0.1" in text
