"""How much Python a step, a refresh and a packed backward pass run: modules and crossings.

A step of a small model is mostly Python. Each call from module to module makes it longer to run and
longer to follow, so their numbers have limits.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict

import pytest
import torch
from helpers.call_counter import CallCounter
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients

pytestmark = pytest.mark.native
MODES = ("matrix", "packed")


@pytest.fixture(autouse=True)
def no_hooks_of_other_tests(monkeypatch):
    """Hooks on all optimizers, which a test leaves whose packed model SGD has trained."""
    torch_hooks = importlib.import_module("torch.optim.optimizer")  # torch.optim shows no attribute of this name
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        monkeypatch.setattr(torch_hooks, name, OrderedDict())


def trained(mode, matrices=2):
    """A model of bf16 layers and its optimizer after two steps, with gradients for a third."""
    torch.manual_seed(0)
    shapes = [(48, 64), (64, 48)] * (matrices // 2)
    model = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes)).bfloat16()
    params = pack_gradients(model, ".*", rank=8) if mode == "packed" else model.named_parameters()
    optimizer = LiftAdamW(params, rank=8, refresh_interval=None, max_grad_norm=1.0)
    for _ in range(2):
        forward_and_backward(model)
        optimizer.step()
        optimizer.zero_grad()
    forward_and_backward(model)
    return model, optimizer


def forward_and_backward(model):
    x = torch.ones(8, 48, dtype=torch.bfloat16)
    model(x).float().square().sum().backward()


def counts_of_a_step(mode, matrices):
    _, optimizer = trained(mode, matrices)
    with CallCounter() as counter:
        optimizer.step()
    return counter


@pytest.mark.parametrize("mode", MODES)
def test_a_step_runs_through_few_modules(mode):
    counter = counts_of_a_step(mode, 2)
    assert len(counter.modules) <= 7 and counter.crossings <= 18, counter.report()


@pytest.mark.parametrize("mode", MODES)
def test_the_crossings_of_a_step_do_not_grow_with_the_matrices(mode):
    few, many = counts_of_a_step(mode, 2), counts_of_a_step(mode, 6)
    assert many.crossings <= few.crossings, f"2 matrices: {few.report()}\n6 matrices: {many.report()}"


@pytest.mark.parametrize("mode", MODES)
def test_a_refresh_crosses_modules_rarely(mode):
    _, optimizer = trained(mode)
    optimizer.zero_grad()
    with CallCounter() as counter:
        optimizer.refresh()
    assert counter.crossings <= 40, counter.report()


def test_a_packed_forward_and_backward_pass_run_through_few_modules():
    model, _ = trained("packed")
    with CallCounter() as counter:
        forward_and_backward(model)
    assert len(counter.modules) <= 4 and counter.crossings <= 10, counter.report()
