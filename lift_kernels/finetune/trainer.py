"""Trainer with a loss over answer tokens that resumes bit-exactly from its checkpoints.

The checkpoints of transformers are several files, some of them pickles, and a crash can leave them
incomplete. So Trainer saves none (``save_strategy="no"``), and a callback saves and loads.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoint.training_state import rng_state, save_checkpoint, set_rng_state
from ..errors import UserError
from . import evaluation
from .run_dir import CHECKPOINT, trained_weights
from .timing import Clock


class Checkpoints(TrainerCallback):
    """Saves training in a single file, and continues from it bit-exactly.

    Trainer skips the batches that a resumed run has seen. It draws the order of an epoch again for
    that, so a checkpoint holds the random state at the start of its epoch, too.

    Attributes:
        losses: of every step so far.
        clock: durations so far.
        every: steps between checkpoints, 0 for none. One more is saved at the end.
        identity: fingerprints that are saved in a checkpoint (`run_dir.identity`).
        loaded: the checkpoint that training continues from; None at the start and once it goes on.
        epoch_random: random state at the start of the current epoch.
    """

    def __init__(self, losses: list[float], clock: Clock, every: int, identity: dict[str, str]) -> None:
        self.losses, self.clock, self.every, self.identity = losses, clock, every, identity
        self.loaded: dict[str, Any] | None = None
        self.epoch_random: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.loaded is not None:
            load_training(self.loaded, kwargs["model"], kwargs["optimizer"])
            kwargs["lr_scheduler"].load_state_dict(self.loaded["scheduler"])

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.loaded is not None:
            between = float(state.epoch).is_integer()  # The checkpoint was saved after the last step of an epoch.
            set_rng_state(self.loaded["random" if between else "epoch_random"])
            self.loaded = None if between else self.loaded
        self.epoch_random = rng_state()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.loaded is not None:
            set_rng_state(self.loaded["random"])
            self.loaded = None

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if self.every and (last or state.global_step % self.every == 0):
            training = {
                "identity": self.identity,
                "step": state.global_step,
                "model": trained_weights(kwargs["model"]),
                "optimizer": kwargs["optimizer"].state_dict(),
                "scheduler": kwargs["lr_scheduler"].state_dict(),
                "trainer_state": as_json(state),
                "random": rng_state(),
                "epoch_random": self.epoch_random,
                "progress": {"losses": self.losses, **{name: getattr(self.clock, name) for name in self.clock.KEPT}},
            }
            save_checkpoint(Path(str(args.output_dir)) / CHECKPOINT, training)

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Continue the records of a checkpoint."""
        self.losses[:] = progress["losses"]
        for name in self.clock.KEPT:
            setattr(self.clock, name, progress[name])


def as_json(state: TrainerState) -> str:
    """Return the text of the file that Trainer reads its state from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TRAINER_STATE_NAME
        state.save_to_json(str(path))
        return path.read_text()


@torch.no_grad()
def load_training(checkpoint: dict[str, Any], model: Any, optimizer: Any) -> None:
    """Load the trained weights and the optimizer's state.

    Raises:
        UserError: when the checkpoint is of another model. Nothing is changed then.
    """
    saved, trained = checkpoint["model"], trained_weights(model)
    fits = trained.keys() == saved.keys() and all(p.shape == saved[name].shape for name, p in trained.items())
    if not fits:
        raise UserError(f"{CHECKPOINT} was saved for another model; start a new run")
    for name, p in trained.items():
        p.copy_(saved[name])
    optimizer.load_state_dict(checkpoint["optimizer"])


class AnswerTrainer(Trainer):
    """A Trainer on the mean loss over answer tokens.

    Attributes:
        losses: loss of every step in nats per token.
        checkpoints: saves and loads training.
    """

    def __init__(
        self, *args: Any, clock: Clock, save_steps: int = 0, identity: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        self.losses: list[float] = []
        self.checkpoints = Checkpoints(self.losses, clock, save_steps, identity or {})
        super().__init__(*args, **kwargs)
        self.add_callback(clock)
        self.add_callback(self.checkpoints)

    def train_from(self, checkpoint: dict[str, Any] | None) -> None:
        """Train to the end, from the start (None) or from a loaded checkpoint."""
        if checkpoint is None:
            self.train()
            return
        self.checkpoints.restore_progress(checkpoint["progress"])
        if checkpoint["step"] >= self.args.max_steps:
            load_training(checkpoint, self.model, self.optimizer)
            return
        self.checkpoints.loaded = checkpoint
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TRAINER_STATE_NAME).write_text(checkpoint["trainer_state"])
            self.train(resume_from_checkpoint=folder)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, count = evaluation.answer_loss(model, inputs)
        loss = total / count
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            other = ", or --dtype bfloat16, for float16 overflows easily" if model.dtype == torch.float16 else ""
            raise UserError(f"the loss is {self.losses[-1]} at step {len(self.losses)}; choose a lower --lr{other}")
        return loss

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because `Checkpoints` loads the model when training begins.

        Trainer has no public way to resume without a model file in the folder: its own method
        raises. A file for it would be a second copy of the whole model on the disk. Everything
        else that it looks for in the folder may be missing.
        """
