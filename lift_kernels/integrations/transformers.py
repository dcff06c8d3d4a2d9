"""LiftAdamW in transformers' Trainer and what builds on it (TRL): a callback that logs what LIFT does."""

from __future__ import annotations

import logging
import math
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..checks import require
from ..ops import packed_gather
from ..optimizer import LiftAdamW

logger = logging.getLogger("lift_kernels")


class LiftCallback(TrainerCallback):
    """Adds figures about LIFT to what the Trainer logs with the training loss.

    ``LiftCallback.attach(trainer)`` puts it in front of the callbacks that report (TensorBoard, W&B, ...), so that each of them
    gets the figures; given as ``callbacks=[LiftCallback()]`` it comes behind those, and only the progress bar and
    ``state.log_history`` do.

    Logged: ``lift_density``, share of the matrices that is trained; ``lift_mask_overlap``, shared entries of the last two masks
    over their number; ``lift_refresh_seconds``, time of a step with a refresh less that of an ordinary one; ``lift_grad_norm``,
    norm of the gradient over trained entries, before clipping; ``lift_update_norm``, norm of the weights' change at this step.
    The last masks are kept for comparison, 4 bytes a trained entry. An optimizer without ``max_grad_norm`` is given an infinite
    one, which measures the norm and clips nothing.

    Raises ValueError at the start of training when the optimizer is not a LiftAdamW.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._masks: list[Tensor] = []
        self._seconds: list[float] = []
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, indices and values before the step

    @classmethod
    def attach(cls, trainer: Any) -> LiftCallback:
        """Make one and add it to a Trainer, in front of all other callbacks."""
        callback = cls()
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return callback

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        lift = _unwrap(optimizer)
        if lift.max_grad_norm is None:
            lift.max_grad_norm = math.inf
        if args.max_grad_norm:
            logger.warning("TrainingArguments(max_grad_norm=%s) clips by the norm of dense gradients, several times larger than "
                           "over trained entries; set it to 0 and give max_grad_norm to LiftAdamW", args.max_grad_norm)  # fmt: skip
        self._masks = [mask.clone() for mask in _masks(lift)]

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        lift = _unwrap(optimizer)
        self._before = []
        if _will_log(args, state):
            for p, entry in lift.state.items():
                if "indices" in entry:
                    indices = entry["indices"].clone()  # a refresh at the end of this step overwrites the list
                    self._before.append((p, indices, packed_gather(p.detach(), indices)))
        self._start = time.perf_counter()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        seconds, lift = time.perf_counter() - self._start, _unwrap(optimizer)
        masks = _masks(lift)
        entries = sum(mask.numel() for mask in masks)
        self.figures["lift_density"] = entries / max(1, sum(p.numel() for p, entry in lift.state.items() if "indices" in entry))
        if any(group["steps_since_refresh"] == 0 for group in lift.param_groups) or not self._masks:
            if len(self._masks) == len(masks):
                shared = sum(_shared(new, old) for new, old in zip(masks, self._masks))
                self.figures["lift_mask_overlap"] = shared / max(1, entries)
            if self._seconds:
                self.figures["lift_refresh_seconds"] = max(0.0, seconds - median(self._seconds))
            self._masks = [mask.clone() for mask in masks]
        else:
            self._seconds = [*self._seconds[-100:], seconds]
        if self._before:
            changes = [torch.linalg.vector_norm(packed_gather(p.detach(), indices).float() - old.float())
                       for p, indices, old in self._before]  # fmt: skip
            self.figures["lift_update_norm"] = float(torch.linalg.vector_norm(torch.stack([c.cpu() for c in changes])))
            self._before = []

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        lift = _unwrap(optimizer)
        if lift.grad_norm is not None:
            self.figures["lift_grad_norm"] = float(lift.grad_norm)
        logs.update(self.figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self.figures)


def _unwrap(optimizer: Any) -> LiftAdamW:
    """The LiftAdamW inside what accelerate made of it."""
    while not isinstance(optimizer, LiftAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    require(isinstance(optimizer, LiftAdamW), f"LiftCallback needs LiftAdamW as optimizer, got {type(optimizer).__name__}")
    return optimizer


def _masks(optimizer: LiftAdamW) -> list[Tensor]:
    return [entry["indices"] for entry in optimizer.state.values() if "indices" in entry]


def _shared(new: Tensor, old: Tensor) -> int:
    """How many entries two sorted index lists share."""
    places = torch.searchsorted(old, new).clamp(max=max(0, old.numel() - 1))
    return int((old[places] == new).sum()) if old.numel() else 0


def _will_log(args: Any, state: Any) -> bool:
    """Whether the coming step is one that the Trainer logs, as far as one can know."""
    step = state.global_step + 1
    if args.logging_strategy != "steps":
        return True
    return step % max(1, int(state.logging_steps or 1)) == 0 or (step == 1 and args.logging_first_step)
