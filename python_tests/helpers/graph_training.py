"""Runs of LiftAdamW by a graph and without one, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.bits import BF16, FP32, bits
from helpers.small_models import ThreeLinears
from torch import Tensor, nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients

MASK = {"rank": 4, "density": 0.1}
ADAMW = {"lr": 0.03, "betas": (0.9, 0.95), "weight_decay": 0.1}
REFRESHES = (2, 4)


@dataclass(frozen=True)
class Case:
    """A run: matrices or packed layers, what trains them, and what changes between replays.

    Attributes:
        without: a parameter that gets no gradient.
        scaled: whether a GradScaler is there, which skips the third step.
        scheduled: whether the learning rate lies on the device and falls.
    """

    mode: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    without: str = ""
    scaled: bool = False
    scheduled: bool = False


CASES = {
    "fp32 matrices": Case("matrix", FP32, scheduled=True),
    "bf16 matrices, per entry, clipped": Case("matrix", BF16, {"bias_correction": "per_entry", "max_grad_norm": 0.5}),
    "bf16 without master, stochastic": Case("matrix", BF16, {"master": None, "rounding": "stochastic"}),
    "one matrix without a gradient": Case("matrix", BF16, {"state_dtype": BF16}, without="b.weight"),
    "packed fp32, per entry": Case("packed", FP32, {"bias_correction": "per_entry"}),
    "packed bf16, scaled and clipped": Case("packed", BF16, {"max_grad_norm": 0.5}, scaled=True),
}


class Training:
    """A small model, and its optimizer, which trains the biases densely.

    Attributes:
        changed: whether a refresh has exchanged entries.
    """

    def __init__(self, mode: str, dtype: torch.dtype, *, device: str, scheduled: bool = False, **options) -> None:
        self.model = ThreeLinears(dtype).to(device)
        given = dict(selection="magnitude", backend="triton")
        groups = pack_gradients(self.model, **MASK, **given) if mode == "packed" else lift_param_groups(self.model)
        groups.append({"params": [("a.bias", self.model.a.bias), ("b.bias", self.model.b.bias)], "lift": False})
        self.named = dict(pair for group in groups for pair in group["params"])
        self.lr = torch.tensor(ADAMW["lr"], device=device) if scheduled else ADAMW["lr"]
        options = ADAMW | MASK | given | options | {"lr": self.lr}
        self.optimizer = LiftAdamW(groups, refresh_interval=None, capturable=True, **options)
        self.changed = False

    def make_gradients(self, without: str = "") -> None:
        for name, p in self.named.items():
            p.grad = None if name == without else torch.zeros_like(p)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.named.items() if p.grad is not None}

    def refresh(self, gradients: dict[str, Tensor]) -> None:
        """New masks. ``gradients`` stay where they are, though an optimizer drops packed ones."""
        self.optimizer.refresh(drop_gradients=True)
        for name, gradient in gradients.items():
            self.named[name].grad = gradient
        self.changed |= self.optimizer.last_refresh.overlap < 1

    def tensors(self) -> dict[str, Tensor]:
        """Weights, and what the optimizer shows."""
        found = {f"{name} of the model": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.named.items():
            found |= {f"{key} of {name}": value for key, value in self.optimizer.state[p].items()}
        return found

    def assert_same(self, other: Training, when: str) -> None:
        mine, theirs = self.tensors(), other.tensors()
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(bits(tensor), bits(theirs[name])), f"{name} differs after {when}"


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def set_gradients(gradients: dict[str, Tensor], number: int) -> None:
    """Write the gradients of a step, in place."""
    generator = torch.Generator().manual_seed(1000 + number)
    for gradient in gradients.values():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))


def assert_same_run(case: Case, device: str, graph, after_capture: Callable[[], object] = lambda: None) -> None:
    """Check that replays with refreshes in between equal steps without a graph, to the bit.

    A refresh must exchange some entries. ``after_capture`` is called once.
    """
    runs = [Training(case.mode, case.dtype, device=device, scheduled=case.scheduled, **case.options) for _ in range(2)]
    graphed, eager = runs
    for run in runs:
        run.make_gradients(case.without)
        if case.scaled:
            run.optimizer.grad_scale = torch.tensor(2.0, device=device)
            run.optimizer.found_inf = torch.tensor(0.0, device=device)
    gradients = [run.gradients() for run in runs]
    for of_one in gradients:
        set_gradients(of_one, 0)
    with graph.warming_up():
        graphed.optimizer.step()
    eager.optimizer.step()
    graph.capture(graphed.optimizer.step)
    after_capture()
    graphed.assert_same(eager, "the capture, in which nothing runs")
    for number in range(1, 6):
        for run, of_one in zip(runs, gradients):
            set_gradients(of_one, number)
            if case.scaled:
                run.optimizer.found_inf.fill_(float(number == 3))
            if case.scheduled:
                run.lr.mul_(0.9)
        graph.replay()
        eager.optimizer.step()
        graphed.assert_same(eager, f"replay {number}")
        if number in REFRESHES:
            for run, of_one in zip(runs, gradients):
                run.refresh(of_one)
            graphed.assert_same(eager, f"the refresh after replay {number}")
    assert graphed.changed, "no refresh exchanged an entry"
