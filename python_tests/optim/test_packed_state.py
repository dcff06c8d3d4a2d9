"""PackedState: the layout of segments, migration, and errors that change nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP32, bits, random_indices

from lift_kernels import PackedState
from lift_kernels.ops.reference import packed_migrate_ref
from lift_kernels.optim.packed_state import ALIGNMENT

SIZES = (((13, 17), 40), ((9, 8), 72), ((20, 30), 129), ((4, 4), 0), ((1, 1), 1))
CPU = torch.device("cpu")


def make_weight(shape, seed, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_entry(numel, count, seed, step=7):
    """An entry as in a state dict, without master."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        "indices": random_indices(numel, count, generator),
        "exp_avg": torch.randn(count, generator=generator),
        "exp_avg_sq": torch.rand(count, generator=generator),
        "births": torch.randint(0, step, (count,), generator=generator, dtype=torch.int32),
        "step": torch.tensor(float(step)),
    }


def make_state(sizes=SIZES, dtype=BF16, moments=FP32, master="fp32", births=True, device=CPU):
    """A state of several matrices after some steps, and what was put in."""
    state = PackedState(torch.device(device), moments, master=master, births=births)
    weights = [make_weight(shape, seed, dtype).to(device) for seed, (shape, _) in enumerate(sizes)]
    entries = [make_entry(w.numel(), count, seed) for seed, (w, (_, count)) in enumerate(zip(weights, sizes))]
    state.append(weights, entries, [f"layer.{i}" for i in range(len(sizes))])
    return state, weights, entries


def copies(state):
    """Bits of all arenas, the step counts and the layout."""
    arenas = {name: bits(arena).clone() for name, arena in state.buffers().items()}
    return {
        **arenas,
        "steps": state.steps.clone(),
        "offsets": list(state.offsets),
        "counts": list(state.counts),
        "names": list(state.names),
        "weights": [bits(w).clone() for w in state.weights],
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, torch.Tensor) else str(actual[name]) == str(value)
        assert same, f"{name} differs"


def assert_layout(state):
    """Check that segments follow each other, start on the boundary, and have zeros between them."""
    end = 0
    for offset, count in zip(state.offsets, state.counts):
        assert offset == end and offset % ALIGNMENT == 0
        end = offset + -(-count // ALIGNMENT) * ALIGNMENT
    used = torch.zeros(end, dtype=torch.bool)
    for i in range(len(state.counts)):
        used[state.segment(i)] = True
    for name, arena in state.buffers().items():
        assert arena.shape == (end,) and not arena[~used].any(), f"padding of {name} is not zero"


@pytest.mark.parametrize("moments", [FP32, BF16])
def test_append_places_and_fills(moments):
    state, weights, entries = make_state(moments=moments)
    assert state.counts == [40, 72, 129, 0, 1] and state.offsets == [0, 64, 192, 384, 384]
    assert_layout(state)
    assert state.steps.tolist() == [7.0] * 5
    for i, (weight, entry) in enumerate(zip(weights, entries)):
        views = state.views(i)
        assert set(views) == {"step", "indices", "exp_avg", "exp_avg_sq", "master", "births"}
        assert torch.equal(views["indices"], entry["indices"]) and torch.equal(views["births"], entry["births"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert views[key].dtype == moments and torch.equal(views[key], entry[key].to(moments))
        assert views["master"].dtype == FP32
        assert torch.equal(views["master"], weight.flatten()[entry["indices"].long()].float())


def test_a_bare_index_list_starts_from_zero():
    state = PackedState(CPU, FP32, master="fp32", births=True)
    weight = make_weight((5, 6), 0, BF16)
    state.append([weight], [{"indices": torch.tensor([0, 7, 29], dtype=torch.int32)}], ["w"])
    views = state.views(0)
    assert views["step"].item() == 0 and views["births"].tolist() == [0, 0, 0]
    assert views["exp_avg"].tolist() == views["exp_avg_sq"].tolist() == [0.0, 0.0, 0.0]
    assert views["master"].tolist() == [float(weight[0, 0]), float(weight[1, 1]), float(weight[4, 5])]


def test_optional_arenas_are_absent():
    state, _, _ = make_state(master=None, births=False)
    assert state.master is None and state.births is None
    assert set(state.views(0)) == {"step", "indices", "exp_avg", "exp_avg_sq"}


def test_append_twice_equals_append_at_once():
    both, weights, entries = make_state()
    state = PackedState(CPU, FP32, master="fp32", births=True)
    names = [f"layer.{i}" for i in range(len(weights))]
    state.append(weights[:2], entries[:2], names[:2])
    state.exp_avg[: state.counts[0]] *= 1  # a second append must copy present values, not the ones first put in
    state.append(weights[2:], entries[2:], names[2:])
    assert_equal(copies(state), copies(both))
    assert_layout(state)


def test_append_keeps_what_was_trained_since():
    state, _, _ = make_state()
    for arena in (state.exp_avg, state.exp_avg_sq, state.master):
        for i in range(len(state.counts)):
            arena[state.segment(i)] += 1.5
    state.steps += 3
    before = copies(state)
    state.append([make_weight((3, 3), 9, BF16)], [{"indices": torch.tensor([4], dtype=torch.int32)}], ["late"])
    for name in state.buffers():
        assert torch.equal(bits(getattr(state, name))[: before[name].numel()], before[name])
    assert state.steps.tolist() == [10.0] * 5 + [0.0] and state.names[-1] == "late"
    assert_layout(state)


def test_views_alias_the_arenas():
    state, _, _ = make_state()
    views = state.views(2)
    views["exp_avg"].fill_(5.0)
    views["step"].fill_(42.0)
    assert state.exp_avg[192:321].tolist() == [5.0] * 129 and state.steps.tolist() == [7, 7, 42, 7, 7]
    assert_layout(state)


def test_steps_count_only_their_rows():
    """`begin_step` returns what a step will count, and `end_step` keeps it.

    A skipped step counts nothing.
    """
    state, _, _ = make_state()
    assert state.begin_step([0, 2]).tolist() == [8.0, 8.0] and state.steps.tolist() == [7] * 5
    state.end_step([0, 2], state.begin_step([0, 2]))
    assert state.steps.tolist() == [8, 7, 8, 7, 7]
    state.end_step([4, 2], state.begin_step([4, 2], torch.tensor(1.0)))
    assert state.steps.tolist() == [8, 7, 8, 7, 7]
    state.end_step([4, 2], state.begin_step([4, 2], torch.tensor(0.0)))
    assert state.steps.tolist() == [8, 7, 9, 7, 8]
    address = state.steps.data_ptr()
    state.end_step(range(5), state.begin_step(range(5)))
    assert state.steps.tolist() == [9, 8, 10, 8, 9] and state.steps.data_ptr() == address


def expected_entry(state, i, new):
    """Matrix i after a migration to ``new``, by the specification."""
    old, weight = state.indices[state.segment(i)], state.weights[i].flatten()[new.long()].float()
    birth = torch.full_like(new, int(state.steps[i]))
    fills = {"exp_avg": None, "exp_avg_sq": None, "master": weight, "births": birth}
    moved = {
        name: packed_migrate_ref(getattr(state, name)[state.segment(i)].clone(), old, new, fill_values=fill)
        for name, fill in fills.items()
        if getattr(state, name) is not None
    }
    return {"step": state.steps[i].clone(), "indices": new, **moved}


def new_lists(state, counts, seed=5):
    """Other lists that share about half of their entries with the present ones."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for i, count in enumerate(counts):
        kept = state.indices[state.segment(i)][::2][:count].cpu()
        rest = torch.tensor(
            [x for x in range(state.weights[i].numel()) if x not in set(kept.tolist())], dtype=torch.int32
        )
        chosen = rest[torch.randperm(rest.numel(), generator=generator)[: count - kept.numel()]]
        lists.append(torch.cat([kept, chosen]).sort().values.to(state.indices.device))
    return lists


@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("counts", [None, (60, 72, 300, 5, 1)], ids=["same-size", "resized"])
def test_migrate(backend, moments, counts):
    state, _, _ = make_state(moments=moments, device=backend.device)
    state.master += 1e-4  # so masters hold more than the weights
    for padding in (slice(40, 64), slice(136, 192), slice(321, 384), slice(385, 448)):
        state.master[padding] = 0
    state.steps += 2
    lists = new_lists(state, counts or state.counts)
    rows = [2, 0, 3] if counts is None else [2, 0, 3, 1]
    expected = [
        expected_entry(state, i, lists[i]) if i in rows else {k: v.clone() for k, v in state.views(i).items()}
        for i in range(5)
    ]
    addresses = {name: arena.data_ptr() for name, arena in state.buffers().items()}
    state.migrate(rows, [lists[i] for i in rows], backend=backend.name)
    for i in range(5):
        assert_equal({k: bits(v) for k, v in state.views(i).items()}, {k: bits(v) for k, v in expected[i].items()})
    assert_layout(state)
    if counts is None:
        assert {name: arena.data_ptr() for name, arena in state.buffers().items()} == addresses


def test_migrate_leaves_weights_alone_and_keeps_the_step_tensor_usable():
    state, weights, _ = make_state()
    before = [bits(w).clone() for w in weights]
    state.migrate([0, 1], new_lists(state, (50, 72, 129, 0, 1))[:2])
    assert all(torch.equal(bits(w), old) for w, old in zip(weights, before))
    state.end_step([1, 0], state.begin_step([1, 0]))
    assert state.steps.tolist() == [8, 8, 7, 7, 7]


BAD_LISTS = [
    (torch.tensor([0, 1, 221], dtype=torch.int32), IndexError, "layer.0: index 221 is out of range for 221 entries"),
    (torch.tensor([-1, 1, 3], dtype=torch.int32), IndexError, "layer.0: index -1 is out of range"),
    (torch.tensor([0, 3, 1], dtype=torch.int32), ValueError, "layer.0: .* sorted without duplicates, got 3 before 1"),
    (torch.tensor([0, 3, 3], dtype=torch.int32), ValueError, "layer.0: .* sorted without duplicates, got 3 before 3"),
    (torch.tensor([0, 1, 2]), TypeError, "layer.0: the index list must be int32, got torch.int64"),
    (torch.tensor([0.0, 1.0]), TypeError, "layer.0: the index list must be int32, got torch.float32"),
    (torch.tensor([[0, 1]], dtype=torch.int32), ValueError, r"layer.0: .* one-dimensional, got shape \(1, 2\)"),
    ([0, 1, 2], TypeError, "layer.0: the index list must be a tensor, got list"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_LISTS)
def test_a_bad_list_changes_nothing(bad, error, message):
    state, weights, entries = make_state()
    before = copies(state)
    good = entries[1]["indices"].flip(0).sort().values
    with pytest.raises(error, match=message):
        state.migrate([1, 0], [good, bad])
    assert_equal(copies(state), before)
    fresh = PackedState(CPU, FP32, master="fp32", births=True)
    with pytest.raises(error, match=message):
        fresh.append(weights[1::-1], [entries[1], {"indices": bad}], ["layer.1", "layer.0"])
    assert fresh.weights == fresh.offsets == fresh.names == [] and fresh.indices.numel() == 0


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master", "births"])
def test_state_of_another_length_changes_nothing(key):
    state, weights, entries = make_state()
    before = copies(state)
    bad = {**entries[0], key: torch.zeros(39)}
    with pytest.raises(ValueError, match=f"late: {key} has 39 entries, its index list 40"):
        state.append([weights[1], weights[0]], [entries[1], bad], ["fine", "late"])
    assert_equal(copies(state), before)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(6, 8, dtype=torch.float64), TypeError, "late: weights must be float32, .* got torch.float64"),
        (torch.zeros(8, 6, dtype=BF16).T, ValueError, "late: the weight must be contiguous"),
        (torch.zeros(6, 8, device="meta", dtype=BF16), ValueError, "late: .* meta"),
    ],
)
def test_a_weight_that_does_not_fit_changes_nothing(weight, error, message):
    state, _, _ = make_state()
    before = copies(state)
    with pytest.raises(error, match=message):
        state.append([weight], [{"indices": torch.tensor([3], dtype=torch.int32)}], ["late"])
    assert_equal(copies(state), before)


def test_regather_follows_outside_changes_alone(caplog):
    """Entries whose master rounds to the present weight keep their bits.

    The others take the weight's value.
    """
    state, weights, _ = make_state()
    state.master[state.segment(0)] *= 1 + 2.0**-12  # below half a bf16 ulp: rounds to the same weights
    state.master[state.segment(1)] *= 1 + 2.0**-12
    before = state.master.clone()
    index = state.views(0)["indices"].long()
    with torch.no_grad():
        weights[0].copy_(weights[0].clone())  # a new version, the same values
    state.regather_masters([0, 1])
    assert torch.equal(state.master, before) and not caplog.records
    with torch.no_grad():
        weights[0].view(-1)[index[5:7]] += 1.0
        weights[1].view(-1)[:] += 1.0
    state.regather_masters([0])
    before[5:7] = weights[0].flatten()[index[5:7]].float()
    assert torch.equal(state.master, before)
    assert [record.getMessage() for record in caplog.records] == [
        "layer.0 was changed outside the optimizer; fp32 masters follow the new values"
    ]
    state.regather_masters([0])
    assert len(caplog.records) == 1
    with torch.no_grad():
        weights[0].add_(1)
        weights[1].add_(1)
    state.regather_masters([0, 1])
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "layer.0 and 1 more weights were changed outside the optimizer; fp32 masters follow the new values"
    ]


def test_masters_follow_changed_weights_before_they_move(caplog):
    state, weights, _ = make_state()
    (new,) = new_lists(state, (40,))
    old = state.views(0)["indices"].clone()
    with torch.no_grad():
        weights[0] += 1.0
    kept = state.migrate([0], [new])
    assert kept.tolist() == [int(torch.isin(new, old).sum())] and 0 < kept.item() < 40
    assert torch.equal(state.views(0)["master"], weights[0].flatten()[new.long()].float())
    assert [r.getMessage().startswith("layer.0 was changed outside the optimizer;") for r in caplog.records] == [True]


def test_marked_writes_are_not_outside_changes(caplog):
    state, weights, _ = make_state()
    before = state.master.clone()
    with torch.no_grad():
        weights[2] += 1.0
    state.end_step([2], torch.tensor([8.0]))
    state.regather_masters([0, 1, 2])
    assert torch.equal(state.master, before) and not caplog.records
