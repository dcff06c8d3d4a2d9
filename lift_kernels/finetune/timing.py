"""Seconds of the parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from .._storage import storage_bytes


class Clock(TrainerCallback):
    """Seconds of every forward + backward pass, optimizer step and mask refresh."""

    KEPT = ("forward_backward", "steps", "refreshes", "gradient_bytes")  # in checkpoints

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forward_backward: list[float] = []
        self.steps: list[float] = []
        self.refreshes: dict[int, float] = {}  # by the number of steps before it
        self.gradient_bytes = 0  # of the last backward pass

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def first_mask(self, make: Callable[[], Any]) -> Any:
        """The result of ``make``, which makes the first mask."""
        start = self.now()
        result = make()
        self.refreshes[0] = self.now() - start
        return result

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        middle = self.now()
        self.forward_backward.append(middle - self.start)
        self.gradient_bytes = storage_bytes(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        self.start = middle

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(self.now() - self.start)
        if kwargs["optimizer"].param_groups[0].get("steps_since_refresh") == 0:
            self.refreshes[len(self.steps)] = self.steps[-1]

    def separate_refreshes(self) -> None:
        """Take the steps that ended in a refresh apart, with the median of the others as the step's
        own share.
        """
        plain = [spent for number, spent in enumerate(self.steps, 1) if number not in self.refreshes]
        own = median(plain) if plain else 0.0
        self.refreshes = {at: spent - own if at else spent for at, spent in self.refreshes.items()}
        self.steps = plain or self.steps
