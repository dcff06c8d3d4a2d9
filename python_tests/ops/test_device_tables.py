"""Launch tables inside a CUDA graph capture.

The tests replace torch's answer on whether a capture runs, so they need no GPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.optimizers import OPTIONS, assert_same, make_weights, snapshot, train
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.ops import bias_correction
from lift_kernels.ops.device_tables import DeviceTables, Table, _Entry

CUDA = torch.device("cuda", 0)


@pytest.fixture
def capture(monkeypatch):
    """A function that starts or ends a pretended capture; tables of a GPU stay on the CPU."""
    state = {"on": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(DeviceTables, "_upload", staticmethod(lambda table, device: _Entry(table)))
    return lambda on: state.update(on=on)


def table(number: int) -> Table:
    return Table(torch.tensor([number]), True)


def test_nothing_is_built_or_kept_inside_a_capture(capture):
    tables = DeviceTables("betas", 2, "run the step once before the capture")
    capture(True)
    with pytest.raises(
        RuntimeError, match="the betas of a launch changed inside a CUDA graph capture.*: run the step once before"
    ):
        tables.get("key", CUDA, lambda: pytest.fail("built inside a capture"))
    capture(False)
    assert tables.get("key", CUDA, lambda: table(1)).data.item() == 1, "what the failed capture left must not be read"
    capture(True)
    assert tables.get("key", CUDA, lambda: pytest.fail("it is there")).data.item() == 1


def test_tables_of_a_captured_graph_stay(capture):
    """The graph reads them at every replay. The other tables may be dropped."""
    tables = DeviceTables("betas", 2, "")
    kept = tables.get(0, CUDA, lambda: table(0))
    capture(True)
    tables.get(0, CUDA, lambda: table(9))
    capture(False)
    for number in range(1, 6):
        tables.get(number, CUDA, lambda number=number: table(number))
    assert tables.get(0, CUDA, lambda: table(9)).data is kept.data
    assert tables.get(5, CUDA, lambda: table(9)).data.item() == 5
    assert tables.get(1, CUDA, lambda: table(9)).data.item() == 9, "the oldest that no graph reads went"


def test_bias_corrections_are_refused_and_built_afterwards(capture):
    """per_entry is captured without a warm-up, and then stepped as the message asks for."""
    betas = 0.87, 0.93
    capture(True)
    with pytest.raises(RuntimeError, match="the betas of a launch changed .* run the step once before the capture"):
        bias_correction.bias_table(*betas, CUDA)
    capture(False)
    found = bias_correction.bias_table(*betas, CUDA)
    assert found.shape == (2, bias_correction.last_age(*betas) + 1) and found.dtype == torch.float32
    for age in (1, 2, 50):
        assert found[0, age].item() == pytest.approx(1 / (1 - betas[0] ** age), rel=1e-7)
        assert found[1, age].item() == pytest.approx((1 - betas[1] ** age) ** -0.5, rel=1e-7)
    assert found[:, -1].tolist() == [1.0, 1.0]
    for number in range(40):  # other betas, as from a schedule of momenta
        bias_correction.bias_table(0.5, 0.5 + number / 100, CUDA)
    assert torch.equal(bias_correction.bias_table(*betas, CUDA), found)


def test_hooked_gradients_are_refused_inside_a_capture(capture):
    """p.lift_grad is a new tensor at every step, and a replayed graph would not read it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    model[0].register_parameter("same", model[0].weight)  # held by two names: the weight gets a hook
    optimizer = LiftAdamW(pack_gradients(model, rank=3, density=0.2), lr=0.1, capturable=True)
    model(torch.ones(5, 12)).square().mean().backward()
    before = snapshot(optimizer)
    capture(True)
    with pytest.raises(RuntimeError, match=r"0\.weight: a CUDA graph cannot follow its packed gradient lift_grad"):
        optimizer.step()
    capture(False)
    assert_same(snapshot(optimizer), before)
    optimizer.step()


def test_lists_are_compared_outside_a_capture_alone(capture, monkeypatch):
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS, capturable=True)
    seen = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(optimizer._replicas, "active", lambda: True)
    monkeypatch.setattr(optimizer._replicas, "compare", lambda lists, seconds: seen.append(len(lists)))
    capture(True)
    train(optimizer, range(2))
    assert not seen
    capture(False)
    train(optimizer, range(2))
    assert seen == [2]
