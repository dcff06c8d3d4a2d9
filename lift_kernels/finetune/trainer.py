"""Trainer with a loss over answer tokens that resumes bit-exactly from its checkpoints."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoint.training_state import rng_state, save_checkpoint, set_rng_state
from ..errors import UserError
from . import evaluation
from .run_dir import CHECKPOINT, trained_weights


class EpochStart(TrainerCallback):
    """Keeps the random state at the start of an epoch, from which its order is drawn.

    Attributes:
        random: state at the start of the current epoch.
        interrupted: state of an interrupted epoch, which the next epoch starts from.
    """

    def __init__(self) -> None:
        self.random: dict[str, Any] | None = None
        self.interrupted: dict[str, Any] | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.interrupted is not None:
            set_rng_state(self.interrupted)
            self.interrupted = None
        self.random = rng_state()


class Resumable(Trainer):
    """A Trainer with single-file checkpoints, from which it resumes bit-exactly.

    The checkpoints of transformers are several files, some of them pickles. A crash can leave them
    incomplete.

    Attributes:
        identity: fingerprints that are saved in a checkpoint (`run_dir.identity`).
        checkpoint: the loaded checkpoint that training continues from; empty at the start.
    """

    model: Any  # Trainer declares these three as optional; they exist once training or loading begins
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity: dict[str, str] = {}
        self.checkpoint: dict[str, Any] = {}
        self.epoch_start = EpochStart()
        self.add_callback(self.epoch_start)

    def progress(self) -> dict[str, Any]:
        """Return the records of the run so far, as plain values for a checkpoint."""
        return {}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Restore the records that `progress` returned."""

    def train_from(self, checkpoint: dict[str, Any] | None) -> None:
        """Train to the end, from the start (None) or from a loaded checkpoint."""
        if checkpoint is None:
            self.train()
            return
        self.checkpoint = checkpoint
        self.restore_progress(checkpoint["progress"])
        if checkpoint["step"] >= self.args.max_steps:
            self._load_from_checkpoint("")
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            return
        self.epoch_start.interrupted = checkpoint["epoch_random"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TRAINER_STATE_NAME).write_text(checkpoint["trainer_state"])
            self.train(resume_from_checkpoint=folder)

    # Methods of transformers.Trainer that this class replaces.

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TRAINER_STATE_NAME
            self.state.save_to_json(str(path))
            trainer_state = path.read_text()
        state = {
            "identity": self.identity,
            "step": self.state.global_step,
            "model": trained_weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "trainer_state": trainer_state,
            "random": rng_state(),
            "epoch_random": self.epoch_start.random,
            "progress": self.progress(),
        }
        save_checkpoint(Path(str(self.args.output_dir)) / CHECKPOINT, state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        saved = self.checkpoint["model"]
        trained = trained_weights(self.model)
        fits = trained.keys() == saved.keys() and all(p.shape == saved[name].shape for name, p in trained.items())
        if not fits:
            raise UserError(f"{CHECKPOINT} was saved for another model; start a new run")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(self.checkpoint["optimizer"])
            self.lr_scheduler.load_state_dict(self.checkpoint["scheduler"])

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            set_rng_state(self.checkpoint["random"])


class AnswerTrainer(Resumable):
    """A Trainer on the mean loss over answer tokens.

    Attributes:
        losses: loss of every step in nats per token.
        clock: durations of the parts of every step.
    """

    def __init__(self, *args: Any, clock: Any, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[clock], **kwargs)
        self.losses: list[float] = []
        self.clock = clock

    def progress(self) -> dict[str, Any]:
        return {"losses": self.losses, **{name: getattr(self.clock, name) for name in self.clock.KEPT}}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        self.losses = progress["losses"]
        for name in self.clock.KEPT:
            setattr(self.clock, name, progress[name])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, count = evaluation.answer_loss(model, inputs)
        loss = total / count
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise UserError(f"the loss is {self.losses[-1]} at step {len(self.losses)}; choose a lower --lr")
        return loss
