"""State in host memory gives the bits of state beside the weights.

Here both are on the CPU, and the same code runs as for weights on a GPU. Chunks are much shorter
than the matrices.
"""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from helpers import expert_model
from helpers.bits import BF16, FP16, FP32, bits
from helpers.optimizers import (
    INTERRUPTIONS,
    OPTIONS,
    assert_refused,
    assert_same,
    index_sets,
    make_weights,
    set_gradients,
    snapshot,
    train,
)

from lift_kernels import LiftAdamW, ops
from lift_kernels.ops import dispatch
from lift_kernels.optim import staging
from lift_kernels.optim.offload import HostState
from lift_kernels.optim.staging import chunks_of

FORMS = {
    "fp32": dict(state_dtype=FP32),
    "bf16": dict(state_dtype=BF16, bias_correction="per_entry"),
    "8bit": dict(state_dtype="8bit"),
    "8bit per entry": dict(state_dtype="8bit", bias_correction="per_entry"),
}
MASTERS = {
    "fp32": dict(master="fp32"),
    "split": dict(master="split"),
    "none": dict(master=None),
    "stochastic": dict(master=None, rounding="stochastic", seed=5),
}
LONG = ((90, 70), (64, 33), (40,))  # the first needs many chunks


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(staging, "CHUNK", 192)


def made(place, shapes=LONG, dtype=BF16, **options):
    weights = make_weights(shapes, dtype)
    return weights, LiftAdamW(weights, offload=place, **{**OPTIONS, "refresh_interval": 3, **options})


def taken(optimizer):
    """A snapshot without the place of the state."""
    return {key: value for key, value in snapshot(optimizer).items() if not key.startswith("offload")}


def arenas(optimizer):
    return list(optimizer._table.arenas.values())


def assert_places(optimizer, place):
    assert arenas(optimizer) and all(isinstance(arena, HostState) == (place == "cpu") for arena in arenas(optimizer))


@pytest.mark.parametrize("counts", [[], [0], [1], [192], [193], [500, 3, 64, 0, 200], [65] * 9])
def test_chunks_hold_every_entry_once(counts):
    offsets = [1000 * i for i in range(len(counts))]
    chunks = chunks_of(offsets, counts)
    parts = [part for chunk in chunks for part in chunk]
    assert [(i, e) for i, n in enumerate(counts) for e in range(n)] == [
        (part.place, e) for part in parts for e in range(part.start, part.start + part.size)
    ]
    assert all(part.start % 64 == part.at % 64 == 0 and part.staged.stop <= 192 for part in parts)
    assert all(part.arena == 1000 * part.place + part.start for part in parts)
    for chunk in chunks:
        assert all(a.staged.stop <= b.at for a, b in zip(chunk, chunk[1:]))
    assert len(chunks) <= sum(-(-n // 64) * 64 for n in counts) // 192 + 1


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_matrices_get_the_same_bits(form, master, max_grad_norm):
    options = {**FORMS[form], **MASTERS[master], "max_grad_norm": max_grad_norm}
    runs = [made(place, **options)[1] for place in (None, "cpu")]
    for run in runs:
        train(run, range(8))
    assert_same(taken(runs[1]), taken(runs[0]))
    assert_places(runs[1], "cpu")
    assert runs[1].last_refresh.overlap == runs[0].last_refresh.overlap > 0
    if max_grad_norm is not None:
        assert runs[1].grad_norm == runs[0].grad_norm > 0


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_other_dtypes(form, dtype):
    runs = [made(place, dtype=dtype, maximize=True, **FORMS[form])[1] for place in (None, "cpu")]
    for run in runs:
        train(run, range(5))
    assert_same(taken(runs[1]), taken(runs[0]))


@pytest.mark.parametrize("engine", [name for name in ("reference", "native-cpu") if dispatch.backends()[name].usable])
def test_backends(engine):
    runs = [made(place, backend=engine, state_dtype="8bit")[1] for place in (None, "cpu")]
    for run in runs:
        train(run, range(5))
    assert_same(taken(runs[1]), taken(runs[0]))


def test_other_numbers_of_entries():
    """A mask that grows and one that shrinks move all segments."""
    runs = [made(place, state_dtype="8bit", bias_correction="per_entry")[1] for place in (None, "cpu")]
    for run in runs:
        for density in (0.1, 0.3, 0.05):
            run.param_groups[0]["density"] = density
            train(run, range(4))
    assert_same(taken(runs[1]), taken(runs[0]))
    assert len(index_sets(runs[1])[0]) == 315


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", FORMS)
def test_layers_hooked_experts_and_dense_parameters(form, dtype, mode):
    """With groups of their own, accumulation, and refreshes that are skipped by drift."""
    found = []
    for place in (None, "cpu"):
        model, optimizer = expert_model.build(mode, dtype=dtype, offload=place, max_grad_norm=1.0, **FORMS[form])
        for step in range(5):
            x = torch.randn(4, 264, generator=torch.Generator().manual_seed(90 + step)).to(dtype)
            model(x).backward()
            expert_model.train(model, optimizer, range(step, step + 1))
        weights = {f"model {name}": bits(w).clone() for name, w in model.state_dict().items()}
        found.append(taken(optimizer) | weights | {"report": str(optimizer.last_refresh)})
        assert_places(optimizer, place)
    assert_same(found[1], found[0])


def test_one_group_of_several():
    """Groups differ in the place of their state, and one norm clips both."""
    runs = []
    for place in (None, "cpu"):
        first, second, third = make_weights(((90, 70), (64, 33), (50, 40)), BF16)
        groups = [{"params": [first, second], "offload": place}, {"params": [third], "lr": 0.1}]
        runs.append(LiftAdamW(groups, **OPTIONS, refresh_interval=2, max_grad_norm=0.5))
        train(runs[-1], range(5))
    assert_same(taken(runs[1]), taken(runs[0]))
    assert [isinstance(arena, HostState) for arena in arenas(runs[1])] == [True, False]


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_a_scaler_skips_and_scales(max_grad_norm):
    runs = []
    for place in (None, "cpu"):
        weights, optimizer = made(place, max_grad_norm=max_grad_norm)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            set_gradients(weights, step)
            for w in weights:
                w.grad *= scaler.get_scale()
            if step in (1, 4):
                weights[0].grad[0, 0] = torch.inf
                before = {key: bits(x).clone() for key, x in optimizer.state[weights[0]].items()}
            scaler.scale(torch.ones(1))
            scaler.step(optimizer)
            scaler.update()
            if step in (1, 4):
                assert_same({key: bits(x) for key, x in optimizer.state[weights[0]].items()}, before)
        runs.append(taken(optimizer))
        assert float(optimizer.state[weights[0]]["step"]) == 4.0
    assert_same(runs[1], runs[0])


def test_a_scheduler_with_a_tensor_for_the_learning_rate():
    runs = []
    for place in (None, "cpu"):
        weights, optimizer = made(place, lr=torch.tensor(0.01))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        train(optimizer, range(5), after=lambda step, scheduler=scheduler: scheduler.step())
        runs.append(taken(optimizer))
    assert float(runs[1]["lr of group 0"]) == pytest.approx(0.01 / 6)
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_goes_on(form, interrupt):
    weights, optimizer = made("cpu", **FORMS[form])
    train(optimizer, range(4))
    copied, _ = interrupt(optimizer, weights)
    for run in (optimizer, copied):
        train(run, range(4, 9))
    kept = "cpu" if interrupt.__name__ != "by_state_dict" else None  # which makes an optimizer of its own
    if kept is None and FORMS[form]["state_dtype"] == "8bit":
        assert copied.param_groups[0]["state_dtype"] == "8bit"
    assert copied.param_groups[0]["offload"] == kept
    assert_places(copied, kept)
    assert_same(taken(copied), taken(optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("places", [("cpu", "cpu"), ("cpu", None), (None, "cpu")])
@pytest.mark.parametrize("forms", [("fp32", "8bit"), ("8bit", "bf16")])
@pytest.mark.parametrize("masters", [("fp32", "split"), ("split", "fp32"), ("none", "split")])
def test_states_load_into_other_forms_and_places(masters, forms, places):
    """The place is that of the loading optimizer, and does not change what is loaded."""
    found = []
    for source, target in (places, (None, None)):
        weights, optimizer = made(source, **FORMS[forms[0]], **MASTERS[masters[0]])
        train(optimizer, range(4))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = LiftAdamW(
            [torch.nn.Parameter(w.detach().clone()) for w in weights],
            **{**OPTIONS, **FORMS[forms[1]], **MASTERS[masters[1]], "offload": target},
        )
        other.load_state_dict(torch.load(file, weights_only=True))
        assert other.param_groups[0]["offload"] == target
        train(other, range(4, 8))
        found.append(taken(other))
        assert_places(other, target)
    assert_same(found[0], found[1])


def test_a_state_of_an_earlier_version_lacks_the_option():
    weights, optimizer = made("cpu")
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["offload"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["offload"] == "cpu"
    del optimizer.param_groups[0]["offload"]  # as in an older pickle
    copied = copy.deepcopy(optimizer)
    train(copied, range(2, 4))
    assert_places(copied, None)


@pytest.mark.parametrize("master", ["fp32", "split", "none"])
def test_a_model_that_is_loaded_later_is_noticed(master, caplog):
    runs = []
    for place in (None, "cpu"):
        weights, optimizer = made(place, **MASTERS[master])
        train(optimizer, range(2))
        caplog.clear()
        with torch.no_grad():
            weights[0].mul_(1.5)  # Low halves of masters fit all weights that keep their sign.
        with caplog.at_level(logging.WARNING, logger="lift_kernels"):
            train(optimizer, range(2, 4))
        assert ("fp32 masters follow the new values" in caplog.text) == (master == "fp32")
        runs.append(taken(optimizer))
    assert_same(runs[1], runs[0])


def test_drift_is_predicted_from_masters_in_host_memory():
    runs = [made(place, refresh_drift=0.5, refresh_interval=2)[1] for place in (None, "cpu")]
    for run in runs:
        train(run, range(6))
    assert str(runs[1].last_refresh) == str(runs[0].last_refresh)
    assert_same(taken(runs[1]), taken(runs[0]))


@pytest.mark.parametrize("density", [0.1, 0.2, 0.05])
def test_a_refresh_that_fails_midway_changes_nothing(density, monkeypatch):
    weights, optimizer = made("cpu", state_dtype="8bit", refresh_interval=None)
    train(optimizer, range(3))
    optimizer.param_groups[0]["density"] = density
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory for the second matrix")
        return migrate(*arguments, **options)

    migrate = ops.packed_migrate
    monkeypatch.setattr(ops, "packed_migrate", failing)
    assert_refused(optimizer, torch.OutOfMemoryError, "no memory for the second matrix", optimizer.refresh)
    optimizer.refresh()
    assert len(calls) == 4 and [len(indices) for indices in index_sets(optimizer)] == [
        round(density * w.numel()) for w in weights[:2]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "cuda"}, r"offload must be 'cpu' or None, got 'cuda'"),
        ({"offload": True}, r"offload must be 'cpu' or None, got True"),
        ({"offload": "cpu", "capturable": True}, r"capturable=True cannot work with offload='cpu'.*leave one out"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        LiftAdamW(make_weights(), **{**OPTIONS, **options})


def test_a_saved_state_that_cannot_work_here():
    weights, optimizer = made("cpu")
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["capturable"] = True
    assert_refused(optimizer, ValueError, "capturable=True cannot work", lambda: optimizer.load_state_dict(saved))
