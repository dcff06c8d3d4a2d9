"""LiftAdamW's step: torch's AdamW at density 1, and the golden traces.

Groups, dtypes and clipping are tested side by side.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, assert_near, bits
from helpers.optimizers import INTERRUPTIONS, OPTIONS, index_sets, make_weights, set_gradients, train
from torch.optim import AdamW

from lift_kernels import LiftAdamW

DATA = Path(__file__).parents[1] / "data"


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def moments(optimizer, weights, key):
    return flat(optimizer.state[w][key] for w in weights)


def train_torch(dtype, weight_decay, device):
    """The weights of `test_density_one` after torch's for-loop AdamW in ``dtype``."""
    weights = [torch.nn.Parameter(w.detach().to(dtype)) for w in make_weights(device=device)]
    optimizer = AdamW(weights, lr=0.01, betas=(0.9, 0.95), weight_decay=weight_decay, foreach=False, fused=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 60)
    for step in range(50):
        set_gradients(weights, step)
        for w in weights:
            w.grad = w.grad.float().to(dtype)
        optimizer.step()
        scheduler.step()
    return weights, optimizer


def test_density_one_is_torch_adamw(backend):
    """50 steps with decay, a falling lr, refreshes and interruptions of each kind.

    The reference is equal to the bit.
    """
    weights = make_weights(device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS | {"density": 1.0}, refresh_interval=7, backend=backend.name)
    for step in range(50):
        if step % 12 == 11 and step < 40:
            optimizer, weights = INTERRUPTIONS[step // 12](optimizer, weights)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1.0 - step / 60)
        train(optimizer, [step])
    ordinary, torch_optimizer = train_torch(FP32, 0.1, backend.device)
    if backend.name == "reference":
        for w, o in zip(weights, ordinary):
            assert torch.equal(bits(w), bits(o))
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(bits(optimizer.state[w][key]), bits(torch_optimizer.state[o][key].flatten()))
    exact, exact_optimizer = train_torch(torch.float64, 0.1, backend.device)
    assert_near(flat(weights).float(), flat(exact), flat(ordinary), "weight")
    for key in ("exp_avg", "exp_avg_sq"):
        truth, yardstick = moments(exact_optimizer, exact, key), moments(torch_optimizer, ordinary, key)
        assert_near(moments(optimizer, weights, key).float(), truth, yardstick, key)


def test_density_one_with_a_master(backend):
    """At density 1 a bf16 weight is its rounded master.

    The master is what AdamW gives for an fp32 copy.
    """
    weights = make_weights(dtype=BF16, device=backend.device)
    copies = [torch.nn.Parameter(w.detach().float()) for w in weights]
    optimizer = LiftAdamW(weights, **OPTIONS | {"density": 1.0}, backend=backend.name)
    reference = AdamW(copies, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for step in range(12):
        train(optimizer, [step])
        for w, c in zip(weights, copies):
            c.grad = w.grad.float()
        reference.step()
    for w, c in zip(weights, copies):
        master = optimizer.state[w]["master"].view(w.shape)
        assert torch.equal(w, master.to(BF16))
        torch.testing.assert_close(master, c.detach(), rtol=0, atol=0 if backend.name == "reference" else 2e-7)


def load_trace(name):
    safe_open = pytest.importorskip("safetensors").safe_open
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, {
            k: json.loads(v) for k, v in file.metadata().items()
        }


@pytest.mark.parametrize("name", ["trace_a", "trace_b"])
def test_golden_trace(backend, name):
    """The published optimizer's index sets are equal.

    Weights and moments agree within 1e-6 of the largest entry.
    """
    tensors, meta = load_trace(name)
    count = len(meta["shapes"])
    weights = [torch.nn.Parameter(tensors[f"w0.{i}"].to(backend.device)) for i in range(count)]
    optimizer = LiftAdamW(
        weights,
        lr=meta["lr"],
        betas=meta["betas"],
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        rank=meta["rank"],
        budget_rank=meta["budget_rank"],
        refresh_interval=None,
        backend=backend.name,
    )

    def check_masks(step):
        for i, indices in enumerate(index_sets(optimizer)):
            expected = tensors[f"mask.{step}.{i}"].flatten().nonzero().flatten().int()
            assert torch.equal(indices.cpu(), expected), f"mask of matrix {i} after step {step}"

    def near(actual, expected, label):
        error = (actual.detach().cpu() - expected).abs().max()
        assert error <= 1e-6 * expected.abs().max(), f"{label}: error {error}"

    optimizer.refresh()
    check_masks(0)
    refreshes = 0
    for step in range(1, meta["steps"] + 1):
        for i, w in enumerate(weights):
            w.grad = tensors[f"grad.{step}.{i}"].to(backend.device)
        optimizer.step()
        for i, w in enumerate(weights):
            near(w, tensors[f"w.{step}.{i}"], f"weight {i} after step {step}")
        if f"mask.{step}.0" in tensors:
            optimizer.refresh()
            check_masks(step)
            refreshes += 1
    for i, w in enumerate(weights):
        near(optimizer.state[w]["exp_avg"], tensors[f"m.{i}"], f"first moment {i}")
        near(optimizer.state[w]["exp_avg_sq"], tensors[f"v.{i}"], f"second moment {i}")
    assert refreshes == 2


def expected_adamw(weights, optimizer_options, steps, **torch_options):
    """Copies of the weights after torch's AdamW."""
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    options = {key: OPTIONS[key] for key in ("lr", "betas", "weight_decay")} | optimizer_options
    optimizer = AdamW(copies, **options, **torch_options)
    train(optimizer, steps)
    return copies


def test_sparse_and_dense_side_by_side(backend):
    """Vectors and ``lift=False`` groups get torch's AdamW.

    Matrices move at their k entries alone.
    """
    weights = make_weights(((24, 40), (24,), (33, 17), (5, 6), ()), device=backend.device)
    start = [w.detach().clone() for w in weights]
    groups = [{"params": weights[:3]}, {"params": weights[3:4], "lift": False, "lr": 0.002}, {"params": weights[4:]}]
    optimizer = LiftAdamW(groups, **OPTIONS, backend=backend.name)
    # Gradients depend on the parameters that an optimizer holds. So every run holds all of them.
    alone = LiftAdamW(
        [{"params": make_weights(((24, 40), (24,), (33, 17), (5, 6), ()), device=backend.device), "lift": False}],
        **OPTIONS,
    )
    train(optimizer, range(6))
    train(alone, range(6))
    dense = expected_adamw(start, {}, range(6), fused=True)
    for i in (1, 4):
        assert torch.equal(weights[i], dense[i]) and "indices" not in optimizer.state[weights[i]]
        assert optimizer.state[weights[i]]["exp_avg"].shape == weights[i].shape
    assert torch.equal(alone.param_groups[0]["params"][0], dense[0])
    assert torch.equal(weights[3], expected_adamw(start, {"lr": 0.002}, range(6), fused=True)[3])
    for i in (0, 2):
        moved = (weights[i] != start[i]).flatten().nonzero().flatten().int()
        assert torch.equal(moved, optimizer.state[weights[i]]["indices"])
        chosen = moved.long()
        torch.testing.assert_close(weights[i].flatten()[chosen], dense[i].flatten()[chosen], rtol=0, atol=1e-7)


def test_groups_keep_their_own_options(backend):
    weights = make_weights(((20, 30), (20, 30), (20, 30)), device=backend.device)
    start = [w.detach().clone() for w in weights]
    groups = [
        {"params": weights[:1], "density": 0.5},
        {"params": weights[1:2], "budget_rank": 2, "lr": 0.0},
        {"params": weights[2:], "rank": 1, "weight_decay": 0.0, "maximize": True, "betas": (0.5, 0.5)},
    ]
    optimizer = LiftAdamW(groups, **OPTIONS, backend=backend.name)
    train(optimizer, range(3))
    assert [len(x) for x in index_sets(optimizer)] == [300, 100, 60]
    assert torch.equal(weights[1], start[1])
    expected = expected_adamw(
        start, {"betas": (0.5, 0.5), "weight_decay": 0.0, "maximize": True}, range(3), foreach=False
    )[2]
    chosen = optimizer.state[weights[2]]["indices"].long()
    torch.testing.assert_close(weights[2].flatten()[chosen], expected.flatten()[chosen], rtol=0, atol=1e-7)


def test_a_missing_gradient_skips_the_parameter(backend):
    """Its weight, moments and step count stay.

    The others move as if it were not there.
    """
    weights, others = make_weights(device=backend.device), make_weights(device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, backend=backend.name)
    whole = LiftAdamW(others, **OPTIONS, backend=backend.name)
    train(optimizer, range(2))
    train(whole, range(2))
    before = {k: v.clone() for k, v in optimizer.state[weights[0]].items()} | {"weight": weights[0].detach().clone()}
    for step in range(2, 5):
        set_gradients(weights, step)
        set_gradients(others, step)
        weights[0].grad = None
        optimizer.step()
        whole.step()
    after = {**optimizer.state[weights[0]], "weight": weights[0].detach()}
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(weights[1], others[1])
    assert [optimizer.state[w]["step"].item() for w in weights] == [2, 5]
    set_gradients(weights, 2)
    optimizer.step()
    again = make_weights(device=backend.device)
    third = LiftAdamW(again, **OPTIONS, backend=backend.name)
    train(third, range(3))
    assert torch.equal(weights[0], again[0]), "its third step must be a third step, not a sixth"


def test_several_dtypes_at_once(backend):
    """Each matrix ends as it does with an optimizer of its own."""

    def build():
        return [make_weights(((24, 40),), dtype, backend.device)[0] for dtype in (FP32, BF16, FP16)]

    together, apart = build(), build()
    optimizer = LiftAdamW(together, **OPTIONS, backend=backend.name)
    alone = [LiftAdamW([w], **OPTIONS, backend=backend.name) for w in apart]
    for step in range(4):
        set_gradients(together, step)
        for w, other, single in zip(together, apart, alone):
            other.grad = w.grad.clone()
            single.step()
        optimizer.step()
    for w, other, single in zip(together, apart, alone):
        assert torch.equal(bits(w), bits(other))
        assert ("master" in optimizer.state[w]) == (w.dtype != FP32)
        for key, value in single.state[other].items():
            assert torch.equal(optimizer.state[w][key], value), key


def test_gradient_clipping_uses_trained_entries(backend):
    """`max_grad_norm` is clip_grad_norm_ over all trained entries.

    These are the trained entries of sparse parameters and all of dense parameters.
    """
    weights = make_weights(((24, 40), (40,), (33, 17)), device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, max_grad_norm=0.5, backend=backend.name)
    copies = make_weights(((24, 40), (40,), (33, 17)), device=backend.device)
    unclipped = LiftAdamW(copies, **OPTIONS, backend=backend.name)
    optimizer.refresh()
    for step in range(3):
        set_gradients(weights, step)
        trained = [w.grad.flatten()[optimizer.state[w]["indices"].long()] if w.dim() == 2 else w.grad for w in weights]
        packed = [torch.nn.Parameter(g.clone()) for g in trained]
        for p, g in zip(packed, trained):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(packed, 0.5)
        assert norm > 0.5
        for w, other in zip(weights, copies):
            other.grad = w.grad * (0.5 / (norm + 1e-6))
        given = [w.grad.clone() for w in weights]
        optimizer.step()
        unclipped.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        assert all(torch.equal(w.grad, g) for w, g in zip(weights, given)), "gradients are not overwritten"
    for w, other in zip(weights, copies):
        torch.testing.assert_close(
            optimizer.state[w]["exp_avg"], unclipped.state[other]["exp_avg"], rtol=2e-6, atol=1e-9
        )
        torch.testing.assert_close(w, other, rtol=0, atol=1e-6)


def test_a_small_norm_is_not_clipped(backend):
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    train(LiftAdamW(weights, **OPTIONS, max_grad_norm=1e6, backend=backend.name), range(3))
    train(LiftAdamW(copies, **OPTIONS, backend=backend.name), range(3))
    assert all(torch.equal(w, other) for w, other in zip(weights, copies))


def test_maximize_is_a_step_on_the_negated_gradient(backend):
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    upward = LiftAdamW(weights, **OPTIONS, maximize=True, backend=backend.name)
    downward = LiftAdamW(copies, **OPTIONS, backend=backend.name)
    for step in range(3):
        set_gradients(weights, step)
        for w, other in zip(weights, copies):
            other.grad = -w.grad
        upward.step()
        downward.step()
    assert all(torch.equal(w, other) for w, other in zip(weights, copies))
    assert not torch.equal(upward.state[weights[0]]["exp_avg"], torch.zeros_like(upward.state[weights[0]]["exp_avg"]))
