"""Refreshes that are skipped: what is predicted, when a mask is kept, and what is remembered."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.optimizers import INTERRUPTIONS, OPTIONS, assert_same, index_sets, make_weights, snapshot, train
from torch import nn

from bench.common.fake_cuda import FakeCuda
from lift_kernels import LiftAdamW, pack_gradients, principal_indices
from lift_kernels.optim import drift
from lift_kernels.optim.packed_state import PackedState
from lift_kernels.optim.refresh import RefreshReport

ALL = {"refresh_interval": 3, "refresh_drift": 1.0}
"""Every refresh by the schedule is skipped while less than all entries would change."""
LARGE = ((300, 200), (180, 250))
"""Shapes with more entries in a mask than are sampled."""


def make(shapes=((24, 40), (33, 17)), dtype=FP32, device="cpu", **options):
    weights = make_weights(shapes, dtype, device)
    named = [(f"{i}.weight", w) for i, w in enumerate(weights)]
    return weights, LiftAdamW(named, **OPTIONS | {"lr": 1e-4} | options)


def move(weight, indices, factor):
    """Change the entries of a mask, of a weight without a master, by a share of their values."""
    with torch.no_grad():
        weight.view(-1)[indices.long()] *= 1 + factor


def drift_of(optimizer):
    refs = optimizer._table.refs
    known = drift.predict(refs)
    return [known.get(ref) for ref in refs]


@pytest.mark.parametrize(
    ("k", "size"), [(1, 1), (255, 255), (256, 256), (5530, 256), (16383, 256), (16384, 512), (44237, 1024)]
)
def test_sample_sizes(k, size):
    assert drift.sample_size(k) == size
    assert drift.sample_size(10**9) == 2048


FORMS = {"fp32": (FP32, {}), "bf16": (BF16, {}), "bf16-no-master": (BF16, {"master": None})}


@pytest.mark.parametrize("form", FORMS)
def test_samples_lie_evenly_in_the_index_list(backend, form):
    """Values are those of the master where there is one, else of the weight, at the last mask."""
    dtype, extra = FORMS[form]
    weights, optimizer = make(LARGE, dtype, backend.device, backend=backend.name, **ALL, **extra)
    train(optimizer, range(2))
    optimizer.refresh()
    for w in weights:
        entry = optimizer.state[w]
        k = entry["indices"].numel()
        size = drift.sample_size(k)
        assert size == 256 < k
        every = torch.tensor([j * k // size for j in range(size)], device=w.device)
        at_weight = w.detach().view(-1)[entry["indices"].long()].float()
        expected = entry.get("master", at_weight)[every]
        assert torch.equal(entry["drift_values"], expected) and entry["drift_values"].dtype == FP32
        assert entry["drift_rate"].item() > 0 and entry["drift_rate"].device.type == "cpu"


@pytest.mark.parametrize("form", FORMS)
def test_the_prediction_is_the_movement_times_rate_and_margin(backend, form):
    """Some matrices move more than others, and an untrained one not at all."""
    dtype, extra = FORMS[form]
    weights, optimizer = make(LARGE, dtype, backend.device, backend=backend.name, **ALL, lr=1e-3, **extra)
    optimizer.refresh()
    assert [d.movement for d in drift_of(optimizer)] == [0.0, 0.0]
    then = [optimizer.state[w]["drift_values"].clone() for w in weights]
    weights[0].grad = torch.randn(weights[0].shape, generator=torch.Generator().manual_seed(0)).to(weights[0])
    optimizer.step()
    moved, still = drift_of(optimizer)
    entry = optimizer.state[weights[0]]
    k = entry["indices"].numel()
    now = entry.get("master", weights[0].detach().view(-1)[entry["indices"].long()].float())
    now = now[[j * k // 256 for j in range(256)]]
    expected = ((now - then[0]).norm() / then[0].norm()).item()
    assert 1e-3 < expected < 1e-2 and moved.movement == pytest.approx(expected, rel=1e-5)
    assert moved.changed == pytest.approx(drift.MARGIN * drift.TYPICAL_RATE * expected, rel=1e-5)
    assert still == drift.Drift(0.0, 0.0)


def test_a_batch_of_matrices_is_sampled_as_one():
    (weight,), optimizer = batch()
    optimizer.refresh()
    entry = optimizer.state[weight]
    assert entry["indices"].numel() == 3 * 480 and entry["drift_values"].shape == (256,)
    flat = weight.detach().view(-1)[entry["indices"].long()]
    assert torch.equal(entry["drift_values"], flat[[j * 1440 // 256 for j in range(256)]])
    move(weight, entry["indices"], 0.01)
    optimizer.refresh()
    (matrix,) = optimizer.last_refresh.matrices
    assert matrix.predicted == pytest.approx(1 - 0.01 * drift.MARGIN * drift.TYPICAL_RATE, rel=1e-4)
    train(optimizer, range(3))
    assert [s.entries for s in optimizer.last_refresh.skipped] == [1440]


def batch():
    weights = make_weights(((3, 60, 80),))
    return weights, LiftAdamW([{"params": weights, "lift": True}], **OPTIONS | {"lr": 1e-5}, **ALL)


@pytest.mark.parametrize("schedule", ["all", "spread"])
def test_a_mask_is_kept_below_the_bound(schedule):
    """A third interval later nothing was exchanged, and the report says what was predicted."""
    weights, optimizer = make(**ALL, refresh_schedule=schedule)
    train(optimizer, [0])
    first, reports = index_sets(optimizer), []
    train(optimizer, range(1, 9), lambda step: reports.append(optimizer.last_refresh))
    assert all(torch.equal(a, b) for a, b in zip(index_sets(optimizer), first))
    skips = [s for report in dict.fromkeys(reports) for s in report.skipped]
    ticks = 3 if schedule == "all" else 2
    assert all(not report.matrices or report.overlap is None for report in reports)
    assert sorted(s.name for s in skips) == sorted(["0.weight", "1.weight"] * ticks) or schedule == "spread"
    assert all(0 < s.predicted < 1 and s.entries in (96, 56) for s in skips)
    assert optimizer.param_groups[0]["steps_since_refresh"] in (0, 3)


def test_only_matrices_that_drifted_are_refreshed():
    weights, optimizer = make(refresh_interval=2, refresh_drift=0.1)
    train(optimizer, range(1))
    old = index_sets(optimizer)
    move(weights[1], old[1], torch.linspace(-0.5, 0.5, old[1].numel()))
    train(optimizer, [1])
    report = optimizer.last_refresh
    assert [m.name for m in report.matrices] == ["1.weight"] and [s.name for s in report.skipped] == ["0.weight"]
    new = index_sets(optimizer)
    assert torch.equal(new[0], old[0]) and not torch.equal(new[1], old[1])
    assert torch.equal(new[1], principal_indices(weights[1].detach(), 4, density=0.1))
    movement = (1 - report.matrices[0].predicted) / (drift.MARGIN * drift.TYPICAL_RATE)
    assert movement == pytest.approx(0.29, abs=0.05)  # rms of the change, where all values are alike
    assert str(report).startswith("1 of 2 matrices (overlap 0.") and ", 1 skipped (predicted overlap 0.99" in str(
        report
    )
    assert report.predicted_overlap == report.skipped[0].predicted


def test_drift_adds_up_over_skipped_refreshes():
    """Values stay those of the last mask, so many small movements end in a refresh."""
    weights, optimizer = make(refresh_interval=1, refresh_drift=0.2)
    optimizer.refresh()
    first, rate = index_sets(optimizer)[0], drift.MARGIN * drift.TYPICAL_RATE
    movements = [1.03**n - 1 for n in range(1, 9)]
    at = next(n for n, movement in enumerate(movements) if rate * movement >= 0.2)
    assert at == 4
    for step, movement in enumerate(movements[:at]):
        move(weights[0], first, 0.03)
        train(optimizer, [step])
        predicted = {s.name: s.predicted for s in optimizer.last_refresh.skipped}
        assert 1 - predicted["0.weight"] == pytest.approx(rate * movement, rel=0.05)
    move(weights[0], first, 0.03)
    train(optimizer, [at])
    assert [m.name for m in optimizer.last_refresh.matrices] == ["0.weight"]
    train(optimizer, [at + 1])
    assert 1 - optimizer.last_refresh.skipped[0].predicted < 0.01


def test_a_refresh_by_hand_skips_nothing():
    weights, optimizer = make(**ALL)
    train(optimizer, range(2))
    optimizer.refresh()
    report = optimizer.last_refresh
    assert [m.name for m in report.matrices] == ["0.weight", "1.weight"] and report.skipped == ()
    assert all(0.9 < m.predicted < 1 for m in report.matrices)


@pytest.mark.parametrize("bound", [None, 0, 0.0])
def test_every_refresh_happens_without_a_bound_and_with_zero(bound):
    weights, optimizer = make(refresh_interval=2, refresh_drift=bound)
    reports = []
    train(optimizer, range(6), lambda step: reports.append(optimizer.last_refresh))
    assert len(set(map(id, reports))) == 4 and all(len(r.matrices) == 2 and not r.skipped for r in reports)
    assert (reports[-1].matrices[0].predicted is None) == (bound is None)
    assert ("drift_values" in optimizer.state[weights[0]]) == (bound is not None)


def test_a_matrix_learns_its_rate():
    """The mean of what was known and what a refresh exchanged, each with its weight."""
    weights, optimizer = make(LARGE[:1], **ALL)
    optimizer.refresh()
    indices = optimizer.state[weights[0]]["indices"].clone()
    rate = drift.TYPICAL_RATE
    for _ in range(2):
        factor = torch.randn(indices.numel(), generator=torch.Generator().manual_seed(3)) * 0.3
        move(weights[0], optimizer.state[weights[0]]["indices"], factor)
        (before,) = drift_of(optimizer)
        assert before.changed == pytest.approx(drift.MARGIN * rate * before.movement)
        optimizer.refresh()
        (matrix,) = optimizer.last_refresh.matrices
        exchanged = round((1 - matrix.overlap) * matrix.entries)
        assert exchanged > 100 and matrix.predicted == pytest.approx(1 - before.changed)
        prior = drift.PRIOR_ENTRIES
        rate = (prior + exchanged) / (prior / rate + matrix.entries * before.movement)
        assert optimizer.state[weights[0]]["drift_rate"].item() == pytest.approx(rate)
    assert rate != pytest.approx(drift.TYPICAL_RATE, rel=0.1)
    optimizer.refresh()  # Nothing moved and nothing was exchanged, so nothing is learned.
    assert optimizer.state[weights[0]]["drift_rate"].item() == pytest.approx(rate)


def test_another_number_of_entries_is_a_reason_to_refresh():
    weights, optimizer = make(**ALL)
    train(optimizer, range(3))
    assert optimizer.last_refresh.skipped
    optimizer.param_groups[0]["density"] = 0.3
    train(optimizer, range(3))
    assert [len(x) for x in index_sets(optimizer)] == [288, 168] and not optimizer.last_refresh.skipped
    assert [optimizer.state[w]["drift_values"].numel() for w in weights] == [256, 168]


def test_weights_that_were_zero_are_refreshed():
    """Nothing tells how far they have moved."""
    weights, optimizer = make(**ALL)
    with torch.no_grad():
        weights[1].zero_()
    train(optimizer, range(3))
    assert [m.name for m in optimizer.last_refresh.matrices] == ["1.weight"]
    assert optimizer.last_refresh.matrices[0].predicted == 0.0
    assert optimizer.state[weights[1]]["drift_rate"].item() == drift.TYPICAL_RATE


def test_weights_that_are_not_finite_are_an_error_and_not_skipped():
    weights, optimizer = make(**ALL)
    train(optimizer, range(2))
    with torch.no_grad():
        weights[1].view(-1)[optimizer.state[weights[1]]["indices"][:1].long()] = math.nan
    with pytest.raises(ValueError, match=r"1\.weight: 1 non-finite weights"):
        train(optimizer, [2])


def test_a_prediction_sees_weights_that_were_changed_from_outside():
    """Masters follow them first."""
    weights, optimizer = make(dtype=BF16, **ALL)
    train(optimizer, range(2))
    with torch.no_grad():
        weights[0].mul_(1.25)
    optimizer.refresh()
    changed, other = (1 - matrix.predicted for matrix in optimizer.last_refresh.matrices)
    assert changed == pytest.approx(0.25 * drift.MARGIN * drift.TYPICAL_RATE, rel=0.05) and other < 0.01


def test_a_refresh_that_fails_in_the_middle_leaves_no_values_of_another_mask(monkeypatch):
    _, optimizer = make(**ALL)
    train(optimizer, range(2))

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(PackedState, "migrate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.refresh()
    assert drift_of(optimizer) == [None, None]
    train(optimizer, [2])
    assert len(optimizer.last_refresh.matrices) == 2


def test_the_bound_can_be_set_and_taken_away_later():
    weights, optimizer = make(refresh_interval=2)
    train(optimizer, range(2))
    optimizer.param_groups[0]["refresh_drift"] = 1.0
    train(optimizer, range(2))  # Values of the last mask are missing.
    assert len(optimizer.last_refresh.matrices) == 2 and "drift_values" in optimizer.state[weights[0]]
    train(optimizer, range(2))
    assert len(optimizer.last_refresh.skipped) == 2
    optimizer.param_groups[0]["refresh_drift"] = None
    train(optimizer, range(2))
    assert len(optimizer.last_refresh.matrices) == 2 and "drift_values" not in optimizer.state[weights[0]]


def test_groups_have_bounds_of_their_own():
    weights = make_weights()
    groups = [{"params": [w], "refresh_drift": bound} for w, bound in zip(weights, (None, 1.0))]
    optimizer = LiftAdamW(groups, **OPTIONS | {"lr": 1e-4}, refresh_interval=2)
    train(optimizer, range(2))
    report = optimizer.last_refresh
    assert [m.name for m in report.matrices] == ["parameter 0 of group 0"]
    assert [s.name for s in report.skipped] == ["parameter 0 of group 1"]


def packed_model(dtype=FP32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24, bias=False), nn.Linear(24, 40, bias=False)).to(dtype)


def run(model, optimizer, steps):
    for step in steps:
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_both_modes_skip_the_same_refreshes(dtype):
    options = dict(rank=4, density=0.2)
    reports = {}
    for mode in ("matrix", "packed"):
        model = packed_model(dtype)
        named = [(n, p) for n, p in model.named_parameters()] if mode == "matrix" else None
        params = named or pack_gradients(model, ".*", **options)
        optimizer = LiftAdamW(params, lr=2e-3, refresh_interval=2, refresh_drift=0.05, **options)
        reports[mode] = []
        for step in range(8):
            run(model, optimizer, [step])
            reports[mode].append(optimizer.last_refresh)
    shown = {
        mode: [
            ([m.name.split(".")[0] for m in r.matrices], [s.name.split(".")[0] for s in r.skipped]) for r in found[1:]
        ]
        for mode, found in reports.items()
    }
    assert shown["matrix"] == shown["packed"]
    assert any(skipped for _, skipped in shown["packed"]) and any(done for done, _ in shown["packed"][1:])
    last = [[s.predicted for r in found for s in r.skipped] for found in reports.values()]
    assert last[0] == pytest.approx(last[1], rel=1e-3 if dtype == FP32 else 0.05)


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_an_interruption_changes_no_decision(form, interrupt):
    """Training stops between two skipped refreshes, goes on to a refresh and learns the rate."""
    dtype, extra = FORMS[form]
    weights = make_weights(((24, 40), (24,), (33, 17)), dtype)
    optimizer = LiftAdamW(weights, **OPTIONS | {"lr": 5e-3}, refresh_interval=2, refresh_drift=0.13, **extra)
    reports = []
    train(optimizer, range(5), lambda step: reports.append(optimizer.last_refresh))
    assert len(optimizer.last_refresh.skipped) == 2
    other, _ = interrupt(optimizer, weights)
    assert_same(snapshot(other), snapshot(optimizer))
    assert {"drift_values", "drift_rate"} <= other.state_dict()["state"][0].keys()
    for step in range(5, 16):
        train(optimizer, [step])
        train(other, [step])
        reports.append(optimizer.last_refresh)
        assert str(other.last_refresh) == str(optimizer.last_refresh)
    assert any(r.matrices and r.overlap for r in reports) and any(r.skipped for r in reports[5:])
    assert_same(snapshot(other), snapshot(optimizer))


def test_a_state_without_values_loads_and_is_refreshed_at_the_next_turn():
    """So is a state from before there was a bound. The optimizer's own bound holds then."""
    weights, optimizer = make(refresh_interval=3)
    train(optimizer, range(4))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["refresh_drift"] is None and "drift_values" not in saved["state"][0]
    again, other = make(refresh_interval=3, refresh_drift=1.0)
    with torch.no_grad():
        for w, trained in zip(again, weights):
            w.copy_(trained)
    other.load_state_dict(saved)
    assert other.param_groups[0]["refresh_drift"] == 1.0
    train(other, range(4, 6))
    assert len(other.last_refresh.matrices) == 2 and other.last_refresh.matrices[0].predicted is None
    train(other, range(6, 9))
    assert len(other.last_refresh.skipped) == 2
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["refresh_drift"] == 1.0 and "drift_rate" in optimizer.state[weights[0]]


BAD_STATES = [
    ("drift_values", None, ValueError, "holds only one of"),
    ("drift_values", torch.zeros(5), ValueError, r"drift_values .* shape \(5,\), its index list needs \(96,\)"),
    ("drift_values", torch.zeros(96, dtype=BF16), TypeError, "drift_values must be torch.float32, got torch.bfloat16"),
    ("drift_rate", torch.tensor(-1.0), ValueError, "drift_rate .* one positive number, got -1"),
    ("drift_rate", torch.tensor(math.nan), ValueError, "drift_rate .* one positive number, got nan"),
    ("drift_rate", torch.ones(2), ValueError, "drift_rate .* one positive number"),
]


@pytest.mark.parametrize(("key", "value", "error", "message"), BAD_STATES)
def test_a_damaged_state_is_refused(key, value, error, message):
    _, optimizer = make(**ALL)
    optimizer.refresh()
    saved = optimizer.state_dict()
    saved["state"][0][key] = value
    if value is None:
        del saved["state"][0][key]
    with pytest.raises(error, match=rf"0\.weight: .*{message}"):
        optimizer.load_state_dict(saved)


def test_skipped_masks_are_compared_among_ranks():
    """A rank that refreshed where another did not has other lists, and both have to show theirs."""
    _, optimizer = make(**ALL)
    train(optimizer, range(2))
    optimizer._table.unseen.clear()
    train(optimizer, [2])
    assert len(optimizer.last_refresh.skipped) == 2
    assert [ref.name for ref in optimizer._table.unseen] == ["0.weight", "1.weight"]


def test_samples_are_counted_and_own_their_memory():
    """A few refreshed matrices do not keep the samples of all alive."""
    weights, optimizer = make(((320, 320), (320, 320)), refresh_interval=1, refresh_drift=0.5)
    train(optimizer, range(1))
    with_samples = optimizer.state_bytes()
    _, plain = make(((320, 320), (320, 320)), refresh_interval=1)
    train(plain, range(1))
    assert with_samples - plain.state_bytes() == 2 * (4 * 256 + 8)
    for step in range(3):
        indices = optimizer.state[weights[0]]["indices"]
        move(weights[0], indices, torch.linspace(-0.9, 0.9, indices.numel()))
        train(optimizer, [step])
        assert [m.name for m in optimizer.last_refresh.matrices] == ["0.weight"]
    assert optimizer.state_bytes() == with_samples


def test_at_most_two_percent_of_the_state_of_a_model():
    """Samples of SmolLM2-135M's shapes at density 0.05, against 16 bytes an entry."""
    shapes = {(576, 576): 2, (192, 576): 2, (1536, 576): 3}
    entries = {shape: round(0.05 * shape[0] * shape[1]) for shape in shapes}
    samples = sum(count * (4 * drift.sample_size(entries[shape]) + 8) for shape, count in shapes.items())
    assert samples < 0.012 * 16 * sum(count * entries[shape] for shape, count in shapes.items())


@pytest.mark.parametrize(
    "selection", ["off_principal", "magnitude", "gradient", "random", lambda w, k: torch.arange(k).int()]
)
def test_other_selections_have_no_prediction(selection):
    weights = make_weights()
    with pytest.raises(ValueError, match=r"refresh_drift=0\.03 .* leave it None with selection="):
        LiftAdamW(weights, **OPTIONS, selection=selection, refresh_drift=0.03)
    optimizer = LiftAdamW(weights, **OPTIONS, selection=selection)
    with pytest.raises(ValueError, match="refresh_drift"):
        optimizer.add_param_group({"params": make_weights(), "refresh_drift": 0.03})


def test_a_report_without_matrices():
    report = RefreshReport(())
    assert report.overlap is None and report.predicted_overlap is None and report.seconds == 0
    assert str(report) == "0 of 0 matrices"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["matrix", "packed", "no master"])
def test_a_prediction_waits_once_whatever_the_number_of_matrices(form):
    """A mask's values are noted without a wait, and both take a few launches."""
    launches = {}
    with FakeCuda() as cuda:
        for matrices in (4, 12):
            make_layer = dict(bias=False, device="cuda", dtype=BF16)
            model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, 48, 64, **make_layer) for _ in range(matrices)))
            lists = dict(selection=lambda w, k: torch.empty(k, dtype=torch.int32, device=w.device))
            params = pack_gradients(model, ".*", **lists) if form == "packed" else model.named_parameters()
            options = {"master": None} if form == "no master" else {}
            optimizer = LiftAdamW(params, refresh_interval=None, **lists, **options)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.empty_like(p)
            optimizer.step()
            optimizer.param_groups[0]["refresh_drift"] = 0.1
            refs = optimizer._table.refs
            drift.note(refs)
            with cuda.recording() as events:
                drift.note(refs)
            assert not events.waits and len(events.launches) <= 16, events.report()
            with cuda.recording() as events:
                found = drift.predict(refs)
            assert len(found) == matrices and len(events.waits) == 1, events.report()
            launches[matrices] = len(events.launches)
    assert launches[12] <= launches[4] + 1 <= 22, launches
