"""A callback for transformers' Trainer, and TRL's, that logs figures of LiftAdamW."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..nn.trainable import trainable_of
from ..ops.packed_ops import packed_gather
from ..optim.ddp_hook import register_where_useful
from ..optim.lift_adamw import LiftAdamW
from ..validation import require

logger = logging.getLogger("lift_kernels")


class LiftCallback(TrainerCallback):
    """Adds figures about LIFT to what the Trainer logs with the training loss.

    ``LiftCallback.attach(trainer)`` puts it in front of the callbacks that report (TensorBoard,
    W&B, ...), so that each of them gets the figures. With ``callbacks=[LiftCallback()]`` it comes
    behind those. Then only the progress bar and ``state.log_history`` get the figures.

    An optimizer without ``max_grad_norm`` is given an infinite one, which measures the norm and
    clips nothing.

    Under DistributedDataParallel an attached callback registers `trained_entries_hook` for matrices
    with ordinary gradients, if no other communication hook is there.

    Logged:
        lift_density: share of the matrices' entries that is trained.
        lift_mask_overlap: share of the last mask's entries that the mask before it had too.
        lift_refresh_skipped: share of the due masks that the last refresh skipped, given a
            ``refresh_drift``.
        lift_predicted_overlap: predicted overlap of the masks that the last refresh skipped.
        lift_refresh_seconds: seconds of the last refresh (`LiftAdamW.last_refresh`), all masks.
        lift_grad_norm: norm of the gradient over trained entries, before clipping.
        lift_update_norm: norm of the change of the trained entries at this step.

    Attributes:
        figures: the figures that are logged next.

    Raises:
        ValueError: at the start of training, when the optimizer is not a LiftAdamW.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._trainer: Any = None
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, indices and values before the step

    @classmethod
    def attach(cls, trainer: Any) -> LiftCallback:
        """Create a callback and add it to a Trainer, in front of all other callbacks."""
        callback = cls()
        callback._trainer = trainer
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return callback

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        lift = _unwrap(optimizer)
        if lift.max_grad_norm is None:
            lift.max_grad_norm = math.inf
        hook = self._trainer is not None and register_where_useful(lift, self._trainer.model_wrapped)
        if args.max_grad_norm and not hook:  # The hook leaves nothing but trained entries to a norm.
            logger.warning(
                "TrainingArguments(max_grad_norm=%s) clips by the norm of dense gradients, which is several times the "
                "norm over trained entries; set it to 0 and give max_grad_norm to LiftAdamW",
                args.max_grad_norm,
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        lift = _unwrap(optimizer)
        self._before = []
        if _will_log(args, state):
            for p, entry in lift.state.items():
                if "indices" in entry:
                    indices = entry["indices"].clone()  # a refresh at the end of this step overwrites the list
                    matrix = trainable_of(p).matrix.detach()
                    self._before.append((matrix, indices, packed_gather(matrix, indices)))

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        lift = _unwrap(optimizer)
        masks = {p: entry["indices"].numel() for p, entry in lift.state.items() if "indices" in entry}
        self.figures["lift_density"] = sum(masks.values()) / max(1, sum(trainable_of(p).matrix.numel() for p in masks))
        report = lift.last_refresh
        if report is not None and report.overlap is not None:
            self.figures["lift_mask_overlap"], self.figures["lift_refresh_seconds"] = report.overlap, report.seconds
        if report is not None and any(group["refresh_drift"] is not None for group in lift.param_groups):
            due = len(report.skipped) + len(report.matrices)
            self.figures["lift_refresh_skipped"] = len(report.skipped) / max(1, due)
            if report.predicted_overlap is not None:
                self.figures["lift_predicted_overlap"] = report.predicted_overlap
        if self._before:
            changes = [
                torch.linalg.vector_norm(packed_gather(matrix, indices).float() - old.float())
                for matrix, indices, old in self._before
            ]
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
    """Return the LiftAdamW inside the wrapper of accelerate."""
    while not isinstance(optimizer, LiftAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    require(
        isinstance(optimizer, LiftAdamW),
        f"LiftCallback needs LiftAdamW as optimizer, got {type(optimizer).__name__}; give Trainer "
        "optimizer_cls_and_kwargs=(LiftAdamW, {...}) or optimizers=(optimizer, scheduler)",
    )
    return optimizer


def _will_log(args: Any, state: Any) -> bool:
    """Return whether the Trainer will log the coming step, or may log it."""
    step = state.global_step + 1
    if args.logging_strategy != "steps":
        return True
    return step % max(1, int(state.logging_steps or 1)) == 0 or (step == 1 and args.logging_first_step)
