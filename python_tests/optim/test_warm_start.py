"""Refreshes of LiftAdamW: warm starts, the spread schedule, the report and the selections."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from helpers.optimizers import set_gradients, train

from lift_kernels import LiftAdamW, pack_gradients, principal_indices
from lift_kernels.masks import costs
from lift_kernels.masks.principal import MaskRequest, principal_masks
from lift_kernels.masks.selection import largest_indices
from lift_kernels.optim.refresh import RefreshSchedule

WIDE = (300, 280)  # wide enough for subspace iteration


def parameters(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.05).to(dtype)) for s in shapes]


def masks(optimizer):
    return [optimizer.state[p]["indices"].clone() for group in optimizer.param_groups for p in group["params"]]


def test_the_report_of_first_masks_and_of_a_refresh():
    weights = parameters((40, 60), (30, 20))
    optimizer = LiftAdamW(weights, lr=1e-3, rank=4, refresh_interval=2)
    train(optimizer, range(1))
    report = optimizer.last_refresh
    assert [m.overlap for m in report.matrices] == [None, None] and report.overlap is None
    assert [m.method for m in report.matrices] == ["gram", "gram"] and report.not_converged == ()
    assert report.seconds == sum(m.seconds for m in report.matrices) > 0
    old = masks(optimizer)
    train(optimizer, range(1, 2))
    shared = [float(torch.isin(new, was).double().mean()) for new, was in zip(masks(optimizer), old)]
    assert [m.overlap for m in optimizer.last_refresh.matrices] == pytest.approx(shared)
    assert optimizer.last_refresh.overlap == pytest.approx((120 * shared[0] + 30 * shared[1]) / 150)
    assert optimizer.last_refresh.matrices[1].name == "parameter 1 of group 0"


@pytest.mark.parametrize("where_kept", ["device", "cpu", None])
def test_a_refresh_starts_from_the_basis_of_the_last(where_kept):
    (weight,) = parameters(WIDE)
    optimizer = LiftAdamW(
        [weight], lr=1e-5, rank=16, mask_method="chebyshev", warm_start=where_kept, refresh_interval=None
    )
    train(optimizer, range(3))
    assert optimizer.last_refresh.matrices[0].method == "chebyshev"
    assert ("basis" in optimizer.state[weight]) == (where_kept is not None)
    optimizer.refresh()
    record = optimizer.last_refresh.matrices[0]
    assert record.method == ("chebyshev" if where_kept is None else "warm") and record.converged
    assert where_kept is None or record.passes == 3
    exact = principal_indices(weight.detach(), 16, density=0.05, method="gram")
    assert torch.isin(masks(optimizer)[0], exact).double().mean() > 0.9


def test_a_reloaded_optimizer_refreshes_to_the_same_bits():
    """The basis and the threshold are part of the state, in memory, in a file and in a copy."""
    (weight,) = parameters(WIDE)
    options = {"lr": 1e-4, "rank": 16, "mask_method": "chebyshev", "refresh_interval": 3}
    optimizer = LiftAdamW([weight], **options)
    train(optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (copied,) = parameters(WIDE)
    copied.data.copy_(weight.detach())
    other = LiftAdamW([copied], **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for key in ("basis", "threshold"):
        assert torch.equal(other.state[copied][key], optimizer.state[weight][key])
    for one in (optimizer, other):
        train(one, range(4, 8))
        assert one.last_refresh.matrices[0].method == "warm"
    assert torch.equal(weight, copied) and torch.equal(masks(optimizer)[0], masks(other)[0])


def test_a_basis_that_does_not_fit_is_refused_at_loading():
    (weight,) = parameters(WIDE)
    optimizer = LiftAdamW([weight], lr=1e-4, rank=16, mask_method="chebyshev")
    train(optimizer, range(1))
    state = optimizer.state_dict()
    state["state"][0]["basis"] = state["state"][0]["basis"][:100]
    before = masks(optimizer)[0]
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: a warm start for shape \(300, 280\)"):
        optimizer.load_state_dict(state)
    assert torch.equal(masks(optimizer)[0], before)


def test_packed_gradients_refresh_from_the_basis_of_their_first_mask():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(520, 600, bias=False))
    groups = pack_gradients(model, rank=40, freeze_rest=True)
    assert costs.cheapest_method((600, 520), 40, warm=True) == "chebyshev"
    optimizer = LiftAdamW(groups, lr=1e-4, refresh_interval=None)
    model(torch.randn(4, 520)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.refresh()
    assert optimizer.last_refresh.matrices[0].method == "warm"
    assert torch.equal(model[0].indices, masks(optimizer)[0])


def test_stacked_matrices_get_a_mask_each():
    """A 3-D parameter is a batch of matrices. Each part has the mask that it has alone."""
    (stack,) = parameters((3, 300, 280))
    optimizer = LiftAdamW(
        [{"params": [stack], "lift": True}], lr=1e-4, rank=16, mask_method="chebyshev", refresh_interval=None
    )
    train(optimizer, [0])
    assert optimizer.state[stack]["basis"].shape == (3, 280, 24)
    optimizer.refresh()
    assert optimizer.last_refresh.matrices[0].method == "warm"
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[stack]["basis"], state["state"][0]["basis"])
    indices, k = masks(optimizer)[0], round(0.05 * 300 * 280)
    for i in range(3):
        exact = principal_indices(stack.detach()[i], 16, k, method="gram") + i * 300 * 280
        assert torch.isin(indices[i * k : (i + 1) * k], exact).double().mean() > 0.9


def test_a_raised_rank_makes_a_cold_start():
    (weight,) = parameters(WIDE)
    optimizer = LiftAdamW([weight], lr=1e-4, rank=16, mask_method="chebyshev")
    train(optimizer, range(1))
    optimizer.param_groups[0]["rank"] = 40
    optimizer.refresh()
    assert optimizer.last_refresh.matrices[0].method == "chebyshev" and optimizer.state[weight]["basis"].shape[1] == 60


def test_spread_gives_every_matrix_one_turn_in_an_interval():
    for n, interval in [(7, 3), (3, 7), (5, 5), (210, 200), (1, 4)]:
        group = {"refresh_schedule": "spread", "refresh_interval": interval}
        turns = [
            RefreshSchedule().turn(group | {"steps_since_refresh": step}, range(n)) for step in range(1, interval + 1)
        ]
        assert [i for turn in turns for i in turn] == list(range(n))
        assert max(map(len, turns)) <= -(-n // interval)


def test_spread_renews_a_few_masks_at_each_step():
    weights = parameters(*[(30, 40)] * 5)
    optimizer = LiftAdamW(weights, lr=3e-2, rank=3, density=0.1, refresh_interval=3, refresh_schedule="spread")
    optimizer.refresh()
    renewed = []
    for step in range(7):
        old = masks(optimizer)
        train(optimizer, [step])
        names = [m.name for m in optimizer.last_refresh.matrices]
        for i, (new, was) in enumerate(zip(masks(optimizer), old)):
            mine = f"parameter {i} of group 0" in names
            assert mine or torch.equal(new, was)
            assert not mine or torch.equal(new, principal_indices(weights[i].detach(), 3, density=0.1))
        renewed += [int(name.split()[1]) for name in names]
    assert renewed == [0, 1, 2, 3, 4] * 2 + [0]


def test_spread_survives_a_reload():
    def run(interrupt):
        weights = parameters(*[(30, 40)] * 4)
        options = {"lr": 1e-2, "rank": 3, "refresh_interval": 3, "refresh_schedule": "spread"}
        optimizer = LiftAdamW(weights, **options)
        for step in range(8):
            if step == interrupt:
                state = optimizer.state_dict()
                optimizer = LiftAdamW(weights, **options)
                optimizer.load_state_dict(state)
            train(optimizer, [step])
        return weights

    for interrupted in map(run, (1, 4, 5)):
        assert all(torch.equal(a, b) for a, b in zip(interrupted, run(None)))


@pytest.mark.parametrize("selection", ["magnitude", "gradient"])
def test_other_selections_train_what_they_say(selection):
    (weight,) = parameters((30, 40))
    optimizer = LiftAdamW([weight], lr=1e-3, density=0.1, selection=selection, rank=4)
    set_gradients([weight], 0)
    scored = weight.detach() if selection == "magnitude" else weight.grad
    expected = largest_indices(scored.abs(), 120)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(masks(optimizer)[0], expected)
    moved = (weight.detach() != before).flatten().nonzero().flatten().int()
    assert torch.equal(moved, expected)
    assert optimizer.last_refresh.matrices[0].method == selection and "basis" not in optimizer.state[weight]


def test_selection_by_gradient_needs_one():
    (weight,) = parameters((30, 40))
    optimizer = LiftAdamW([weight], lr=1e-3, selection="gradient")
    with pytest.raises(ValueError, match="parameter 0 of group 0: selection='gradient' needs a dense gradient"):
        optimizer.refresh()
    layer = torch.nn.Linear(40, 30)
    layer.weight.grad = weight.detach().clone()
    groups = pack_gradients(layer, selection="gradient")
    with pytest.raises(ValueError, match="values: selection='gradient' .* these are packed; .* refresh_interval=None"):
        LiftAdamW(groups, selection="gradient")
    packed = LiftAdamW(groups, selection="gradient", refresh_interval=None)
    with pytest.raises(
        ValueError, match="packed gradient will not do: .* refresh_interval=None, or use lift_param_groups"
    ):
        packed.refresh()
    weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(ValueError, match="parameter 0 of group 0: 1200 non-finite gradients"):
        optimizer.refresh()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refresh_schedule": "random"}, "refresh_schedule must be 'all' or 'spread', got 'random'"),
        ({"mask_method": "qr"}, "unknown mask_method 'qr'; choose one of auto, gram, chebyshev, svd"),
        ({"warm_start": "disk"}, "warm_start must be 'device', 'cpu' or None, got 'disk'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LiftAdamW(parameters((4, 6)), lr=1e-3, **options)


def test_a_model_of_many_matrices_is_quiet_and_works_without_tqdm(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    weights = parameters(*[(20, 30)] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LiftAdamW(weights, lr=1e-3, rank=2).refresh()


def test_spread_over_the_cores_changes_no_mask_and_no_setting():
    """Each small matrix has a thread of its own.

    The number of torch's threads is as before, also after a failure.
    """
    weights = [w.detach() for w in parameters(*[(300, 280), (60, 90)] * 3)]
    requests = [MaskRequest(w, 16, 400, f"w{i}") for i, w in enumerate(weights)]
    threads = torch.get_num_threads()
    together = principal_masks(requests, method="chebyshev")
    assert torch.get_num_threads() == threads
    for request, mask in zip(requests, together):
        assert torch.equal(mask.indices, principal_masks([request], method="chebyshev")[0].indices)
    weights[3][0, 0] = float("nan")
    with pytest.raises(ValueError, match="w3: 1 non-finite weights"):
        principal_masks(requests)
    assert torch.get_num_threads() == threads


def test_basis_bytes_are_counted():
    (weight,) = parameters(WIDE)
    kept, dropped = (
        LiftAdamW([weight], lr=1e-3, rank=16, mask_method="chebyshev", warm_start=w) for w in ("device", None)
    )
    kept.refresh()
    dropped.refresh()
    width = costs.block_width(WIDE, 16, warm=True)
    assert kept.state_bytes() - dropped.state_bytes() == 280 * width * 2 + 4
