"""A step never waits for the device, and a refresh moves the state in a few launches.

The package runs on fake CUDA tensors (`bench.common.fake_cuda`), so no GPU is needed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.common.fake_cuda import FakeCuda
from lift_kernels import LiftAdamW, pack_gradients

pytestmark = pytest.mark.slow
MATRICES, SHAPE = 224, (64, 48)
MODES = ("matrix", "packed")


@pytest.fixture(scope="module")
def cuda():
    with FakeCuda() as cuda:
        yield cuda


def ready_lists(weight, k):
    """The selection of every test. Fake index lists hold no numbers, so any one is ready-made."""
    return torch.empty(k, dtype=torch.int32, device=weight.device)


def trained(mode, **options):
    """An optimizer after its first step, with gradients for the next one."""
    rows, columns = SHAPE
    make = dict(bias=False, device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, columns, rows, **make) for _ in range(MATRICES)))
    params = model.named_parameters() if mode == "matrix" else pack_gradients(model, ".*", selection=ready_lists)
    optimizer = LiftAdamW(params, refresh_interval=None, selection=ready_lists, **options)
    step(optimizer)
    return optimizer


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()


@pytest.fixture(scope="module")
def optimizers(cuda):
    """An optimizer for each mode, and one with another bias correction."""
    return {mode: trained(mode) for mode in MODES} | {"per entry": trained("matrix", bias_correction="per_entry")}


@pytest.fixture
def with_scaler(cuda):
    """What a GradScaler lets an optimizer know."""
    return {"grad_scale": torch.ones((), device="cuda"), "found_inf": torch.zeros((), device="cuda")}


def events_of_a_step(cuda, optimizer, monkeypatch, **attributes):
    """What a step records, after one that was the first with these attributes."""
    for name, value in attributes.items():
        monkeypatch.setattr(optimizer, name, value, raising=False)
    step(optimizer)
    with cuda.recording() as events:
        optimizer.step()
    assert "_sparse_adamw_kernel" in [event.what for event in events.launches], events.report()
    return events


@pytest.mark.parametrize("name", ["matrix", "packed", "per entry"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_never_waits(name, max_grad_norm, cuda, optimizers, monkeypatch):
    events = events_of_a_step(cuda, optimizers[name], monkeypatch, max_grad_norm=max_grad_norm)
    assert not events.waits, events.report()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_under_a_scaler_never_waits(max_grad_norm, cuda, optimizers, with_scaler, monkeypatch):
    attributes = {"max_grad_norm": max_grad_norm, **with_scaler}
    events = events_of_a_step(cuda, optimizers["matrix"], monkeypatch, **attributes)
    assert not events.waits, events.report()


def test_the_first_step_after_a_load_compares_all_weights_with_one_wait(cuda):
    optimizer = trained("matrix")
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["indices"] = torch.arange(len(entry["indices"]), dtype=torch.int32)
    optimizer.load_state_dict(saved)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.empty_like(p)
    with cuda.recording() as events:
        optimizer.step()
    assert len(events.inside("optim/weight_check.py").waits) == 1, events.report()


@pytest.mark.parametrize("name", ["matrix", "packed", "per entry"])
def test_a_refresh_moves_all_matrices_with_two_waits_and_twenty_launches(name, cuda, optimizers):
    """Apart from the making of masks, which is another module's work."""
    optimizer = optimizers[name]
    optimizer.zero_grad()
    optimizer.state_dict()  # It reads how many steps a scaler has skipped, so the refresh need not.
    with cuda.recording() as events:
        optimizer.refresh()
    events = events.outside("masks/")
    assert any("migrate" in event.what for event in events.launches), events.report()
    assert len(events.waits) <= 2 and len(events.launches) <= 20, events.report()


@pytest.mark.parametrize("name", ["matrix", "packed", "per entry"])
def test_a_saved_state_takes_no_memory_of_the_card(name, cuda, optimizers):
    """Each tensor is copied to host memory, without a clone on the card before."""
    with cuda.recording() as events:
        saved = optimizers[name].state_dict()
    tensors = [x for entry in saved["state"].values() for x in entry.values() if isinstance(x, torch.Tensor)]
    assert len(saved["state"]) == MATRICES and {tensor.device.type for tensor in tensors} == {"cpu"}
    assert any("cuda to cpu" in event.what for event in events.launches)
    assert not any("clone" in event.what for event in events.launches), events.report()
