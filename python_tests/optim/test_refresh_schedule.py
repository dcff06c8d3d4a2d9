"""Masks over time: when they are made, and which entries stay, enter and leave.

No other weight ever moves.
"""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, bits
from helpers.optimizers import OPTIONS, index_sets, make_weights, set_gradients, train

from lift_kernels import LiftAdamW, principal_indices
from lift_kernels.ops.reference import packed_migrate_ref


def record_refreshes(optimizer, steps, **options):
    """The steps (from 1) that ended in new masks, recorded by the calls of the selection."""
    calls = []
    optimizer.selection = lambda w, k: (calls.append(w.shape), torch.arange(k, dtype=torch.int32))[1]
    seen = []
    train(optimizer, range(steps), lambda step: (seen.append(step + 1) if calls else None, calls.clear()))
    return seen


@pytest.mark.parametrize(
    ("interval", "expected"), [(None, [1]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6]), (5, [1, 5]), (8, [1])]
)
def test_refresh_schedule(interval, expected):
    """The first mask at the first step, then one after every ``interval`` steps."""
    optimizer = LiftAdamW(make_weights(), **OPTIONS, refresh_interval=interval)
    assert record_refreshes(optimizer, 7) == expected
    assert all(not entry for entry in LiftAdamW(make_weights(), **OPTIONS).state.values()), "no mask in the constructor"


def test_groups_refresh_on_their_own_schedule():
    weights = make_weights(((24, 40), (33, 17)))
    optimizer = LiftAdamW([{"params": [w], "refresh_interval": i} for w, i in zip(weights, (2, 3))], **OPTIONS)
    seen = []
    optimizer.selection = lambda w, k: (seen.append((step, w.shape[0])), torch.arange(k, dtype=torch.int32))[1]
    for step in range(1, 7):
        train(optimizer, [step])
    assert seen == [(1, 24), (1, 33), (2, 24), (3, 33), (4, 24), (6, 24), (6, 33)]


def test_refresh_by_hand_restarts_the_count():
    optimizer = LiftAdamW(make_weights(), **OPTIONS, refresh_interval=4)
    train(optimizer, range(3))
    optimizer.refresh()
    assert record_refreshes(optimizer, 9) == [4, 8]


def test_the_first_refresh_by_hand_makes_one_mask():
    calls = []
    optimizer = LiftAdamW(make_weights(), **OPTIONS, selection=lambda w, k: (calls.append(k), torch.arange(k).int())[1])
    optimizer.refresh()
    assert calls == [96, 56]
    train(optimizer, [0])
    assert calls == [96, 56]
    optimizer.refresh()
    assert calls == [96, 56, 96, 56]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bias", ["global", "per_entry"])
def test_stay_enter_leave(backend, dtype, bias):
    """The state after a refresh is the old one, migrated.

    The new entries are the principal ones of the present weights.
    """
    weights = make_weights(dtype=dtype, device=backend.device)
    options = OPTIONS | {"lr": 0.05}
    optimizer = LiftAdamW(weights, **options, refresh_interval=None, bias_correction=bias, backend=backend.name)
    train(optimizer, range(5))
    old = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    before = [bits(w.detach()).clone() for w in weights]
    optimizer.refresh()
    for w, entry, unchanged in zip(weights, old, before):
        new = optimizer.state[w]
        assert torch.equal(bits(w.detach()), unchanged), "a refresh moves no weight"
        assert torch.equal(new["indices"], principal_indices(w.detach(), 4, density=0.1))
        entering = (~torch.isin(new["indices"], entry["indices"])).sum().item()
        assert 0 < entering < len(new["indices"]), "the test needs entries of each kind"
        fills = {"exp_avg": None, "exp_avg_sq": None}
        if dtype == BF16:
            fills["master"] = w.detach().flatten()[new["indices"].long()].float()
        if bias == "per_entry":
            fills["births"] = torch.full_like(new["indices"], 5)
        assert new.keys() == {"step", "indices", "threshold", *fills} and new["step"] == 5
        for key, fill in fills.items():
            expected = packed_migrate_ref(entry[key], entry["indices"], new["indices"], fill_values=fill)
            assert torch.equal(bits(new[key]), bits(expected)), key


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("selection", ["principal", "random"])
def test_unselected_weights_keep_every_bit(backend, dtype, selection):
    """Steps decay weights and masks change.

    An entry that was in no mask keeps its bits. One that left keeps its last value.
    """
    weights = make_weights(dtype=dtype, device=backend.device)
    options = OPTIONS | {"lr": 0.05, "weight_decay": 0.5}
    optimizer = LiftAdamW(weights, **options, refresh_interval=3, selection=selection, backend=backend.name)
    optimizer.refresh()
    masks = index_sets(optimizer)
    expected = [bits(w.detach()).clone().flatten() for w in weights]

    def check(step):
        for i, w in enumerate(weights):
            now = bits(w.detach()).flatten()
            chosen = masks[i].long()
            assert (now[chosen] != expected[i][chosen]).any()
            expected[i][chosen] = now[chosen]
            assert torch.equal(now, expected[i])
        masks[:] = index_sets(optimizer)

    train(optimizer, range(8), check)


def test_per_entry_counts_from_the_entry(backend):
    """An entering entry moves by lr at its first step.

    Under global correction it moves by much more.
    """
    lists = [torch.arange(0, 8), torch.arange(4, 12)]
    moved = {}
    for bias in ("global", "per_entry"):
        weight = torch.nn.Parameter(torch.zeros(6, 5, device=backend.device))
        masks = iter(lists)
        optimizer = LiftAdamW(
            [weight],
            lr=0.01,
            bias_correction=bias,
            refresh_interval=None,
            backend=backend.name,
            selection=lambda w, k, masks=masks: next(masks).int().to(w.device),
        )
        train(optimizer, range(20))
        optimizer.refresh()
        before = weight.detach().clone().flatten()
        train(optimizer, [20])
        moved[bias] = (weight.detach().flatten() - before).abs()
    torch.testing.assert_close(moved["per_entry"][8:12].cpu(), torch.full((4,), 0.01), rtol=1e-5, atol=0)
    ratio = (1 - 0.9) / (1 - 0.9**21) / ((1 - 0.999) / (1 - 0.999**21)) ** 0.5
    torch.testing.assert_close(moved["global"][8:12].cpu(), torch.full((4,), 0.01 * ratio), rtol=1e-5, atol=0)
    torch.testing.assert_close(moved["global"][4:8], moved["per_entry"][4:8], rtol=1e-4, atol=0)


def test_per_entry_equals_global_before_the_first_refresh(backend):
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    train(LiftAdamW(weights, **OPTIONS, bias_correction="per_entry", backend=backend.name), range(6))
    train(LiftAdamW(copies, **OPTIONS, backend=backend.name), range(6))
    for w, other in zip(weights, copies):
        torch.testing.assert_close(w, other, rtol=0, atol=1e-7)


def test_a_refresh_on_changed_density_resizes_the_state(backend):
    """Entries in both masks keep their moments although the arena has a new layout."""
    weights = make_weights(device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, refresh_interval=None, backend=backend.name)
    train(optimizer, range(3))
    old = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    optimizer.param_groups[0]["density"] = 0.3
    optimizer.refresh()
    assert [len(x) for x in index_sets(optimizer)] == [288, 168]
    for w, entry in zip(weights, old):
        for key in ("exp_avg", "exp_avg_sq"):
            expected = packed_migrate_ref(entry[key], entry["indices"], optimizer.state[w]["indices"])
            assert torch.equal(optimizer.state[w][key], expected)
    train(optimizer, [3])
    assert [optimizer.state[w]["step"].item() for w in weights] == [4, 4]


def test_random_selection_has_the_same_k_and_its_seed_decides():
    def masks(seed):
        optimizer = LiftAdamW(make_weights(((30, 30), (30, 30))), **OPTIONS, selection="random", seed=seed)
        optimizer.refresh()
        return index_sets(optimizer)

    first = masks(1)
    assert [len(x) for x in first] == [90, 90] and not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, masks(1)))
    assert not torch.equal(first[0], masks(2)[0])


def test_a_callable_selects(backend):
    """It gets the weight without its graph and may return any number of entries."""
    seen = []

    def largest_rows(weight, k):
        seen.append((weight.requires_grad, k))
        return torch.arange(2 * weight.shape[1], dtype=torch.int32, device=weight.device)

    weights = make_weights(device=backend.device)
    start = [w.detach().clone() for w in weights]
    train(LiftAdamW(weights, **OPTIONS, selection=largest_rows, backend=backend.name), range(2))
    assert seen == [(False, 96), (False, 56)]
    for w, s in zip(weights, start):
        assert torch.equal(w[2:], s[2:]) and (w[:2] != s[:2]).all()


def test_a_failed_refresh_keeps_every_mask():
    """An infinite weight is named. Masks and moments of the healthy weight stay too."""
    weights = make_weights()
    optimizer = LiftAdamW([("a.weight", weights[0]), ("b.weight", weights[1])], **OPTIONS, refresh_interval=None)
    train(optimizer, range(2))
    state = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    with torch.no_grad():
        weights[0].mul_(torch.linspace(-3, 3, 40))  # its mask would change
        weights[1][3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"b\.weight: 1 non-finite weights, the first at flat index 55"):
        optimizer.refresh()
    for w, entry in zip(weights, state):
        assert all(torch.equal(optimizer.state[w][key], value) for key, value in entry.items())
    set_gradients(weights, 2)
    optimizer.step()
    assert optimizer.state[weights[0]]["step"] == 3
