"""Durations of the phases of a run and of the parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .._storage import storage_bytes


class PhaseTimer:
    """Prints a line when a phase of a run begins, and measures how long each phase takes.

    Attributes:
        starts: seconds from the creation of the timer to the start of each phase, by its name.
    """

    def __init__(self) -> None:
        self._created = time.perf_counter()
        self.starts: dict[str, float] = {}

    def begin(self, name: str, message: str) -> None:
        """End the current phase and begin the phase ``name``."""
        now = self.starts[name] = time.perf_counter() - self._created
        print(f"[{now:5.0f} s] {message}", flush=True)

    def durations(self) -> dict[str, float]:
        """Return the seconds of every phase but the last, which has not ended."""
        names = list(self.starts)
        return {a: self.starts[b] - self.starts[a] for a, b in zip(names, names[1:], strict=False)}


class Clock(TrainerCallback):
    """Measures the seconds of every forward + backward pass, optimizer step and mask refresh.

    Attributes:
        forward_backward: seconds of each forward + backward pass.
        steps: seconds of each optimizer step.
        refreshes: seconds of each mask refresh, by the number of steps before it.
        gradient_bytes: size of the gradients of the last backward pass.
        due: of every time that masks were due: the step, how many of them were refreshed and how
            many skipped, their overlap with the masks before, and the predicted overlap of those
            that were skipped.
    """

    KEPT = ("forward_backward", "steps", "refreshes", "gradient_bytes", "due")  # attributes saved in checkpoints

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forward_backward: list[float] = []
        self.steps: list[float] = []
        self.refreshes: dict[int, float] = {}
        self.gradient_bytes = 0
        self.due: list[dict[str, Any]] = []
        self._seen: Any = None  # report of the last refresh

    def now(self) -> float:
        """Return the time in seconds, after all queued work of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def first_mask(self, make: Callable[[], Any]) -> Any:
        """Return the result of ``make``, timed as the refresh that computes the first mask."""
        start = self.now()
        result = make()
        self.refreshes[0] = self.now() - start
        return result

    def on_step_begin(self, args, state, control, **kwargs):
        self._seen = _last_refresh(kwargs["optimizer"])
        self.start = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        middle = self.now()
        self.forward_backward.append(middle - self.start)
        # A hook packs the gradient of a stack of matrices into ``lift_grad``.
        held = (getattr(p, name, None) for p in kwargs["model"].parameters() for name in ("grad", "lift_grad"))
        self.gradient_bytes = storage_bytes(gradient for gradient in held if gradient is not None)
        self.start = middle

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(self.now() - self.start)
        report, number = _last_refresh(kwargs["optimizer"]), len(self.steps)
        if report is self._seen or not (report.matrices or report.skipped):  # The first step may take given masks.
            return
        if report.matrices:
            self.refreshes[number] = self.steps[-1]
        self.due.append(
            {
                "step": number,
                "refreshed": len(report.matrices),
                "skipped": len(report.skipped),
                "overlap": report.overlap,
                "predicted_overlap": report.predicted_overlap,
            }
        )
        tqdm.write(f"refresh at step {number}: {report}")

    def refresh_figures(self) -> dict[str, Any]:
        """Return what became of the masks that were due, by report key."""
        skipped = sum(row["skipped"] for row in self.due)
        predicted = [row["skipped"] * row["predicted_overlap"] for row in self.due if row["skipped"]]
        return {
            "refreshes": len(self.refreshes),
            "refreshes.matrices": sum(row["refreshed"] for row in self.due),
            "refreshes.skipped": skipped,
            "refreshes.skipped_overlap": sum(predicted) / skipped if skipped else None,
            "refreshes.due": self.due,
        }

    def separate_refreshes(self) -> None:
        """Split each step that ended with a refresh into the step and the refresh.

        The median of the steps without a refresh counts as the step's share.
        """
        plain = [spent for number, spent in enumerate(self.steps, 1) if number not in self.refreshes]
        own = median(plain) if plain else 0.0
        self.refreshes = {at: spent - own if at else spent for at, spent in self.refreshes.items()}
        self.steps = plain or self.steps


def _last_refresh(optimizer: Any) -> Any:
    """Return the `RefreshReport` of a LiftAdamW, which accelerate may have wrapped, or None."""
    return getattr(getattr(optimizer, "optimizer", optimizer), "last_refresh", None)
