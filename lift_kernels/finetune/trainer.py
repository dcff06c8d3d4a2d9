"""Trainer with a loss over answer tokens that resumes bit-exactly from its checkpoints.

The checkpoints of transformers are several files, some of them pickles, and a crash can leave them
incomplete. So Trainer saves none (``save_strategy="no"``), and a callback saves and loads.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoint.training_state import rng_state, save_checkpoint, set_rng_state
from ..errors import UserError
from ..optim.ddp_hook import register_where_useful
from ..optim.lift_adamw import LiftAdamW
from . import evaluation
from .forward import base_of
from .parallel import Ranks
from .prompts import IGNORE, take_rows
from .run_dir import CHECKPOINT, trained_weights
from .timing import Clock


class Diverged(UserError):
    """The loss of a step is not finite."""


class Checkpoints(TrainerCallback):
    """Saves training in a single file, and continues from it bit-exactly.

    Trainer skips the batches that a resumed run has seen. It draws the order of an epoch again for
    that, so a checkpoint holds the random state at the start of its epoch, too. The first rank
    saves, with the random states of all ranks: weights and optimizer state are equal on all.

    Attributes:
        trainer: the trainer whose training is saved.
        clock: durations so far.
        every: steps between checkpoints, 0 for none. One more is saved at the end.
        identity: fingerprints that are saved in a checkpoint (`run_dir.identity`).
        loaded: the checkpoint that training continues from; None at the start and once it goes on.
        epoch_random: random state at the start of the current epoch.
    """

    def __init__(self, trainer: AnswerTrainer, clock: Clock, every: int, identity: dict[str, str]) -> None:
        self.trainer, self.clock, self.every, self.identity = trainer, clock, every, identity
        self.loaded: dict[str, Any] | None = None
        self.epoch_random: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        optimizer = getattr(kwargs["optimizer"], "optimizer", None)  # accelerate has wrapped it
        if isinstance(optimizer, LiftAdamW):
            register_where_useful(optimizer, self.trainer.model_wrapped)
        if self.loaded is not None:
            load_training(self.loaded, kwargs["model"], kwargs["optimizer"])
            kwargs["lr_scheduler"].load_state_dict(self.loaded["scheduler"])

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.loaded is not None:
            between = float(state.epoch).is_integer()  # The checkpoint was saved after the last step of an epoch.
            set_rng_state(self.loaded["random" if between else "epoch_random"][self.trainer.ranks.number])
            self.loaded = None if between else self.loaded
        # This generator draws the order of the epoch, which is the same on all ranks.
        torch.set_rng_state(self.trainer.ranks.first(torch.get_rng_state))
        self.epoch_random = rng_state()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.loaded is not None:
            set_rng_state(self.loaded["random"][self.trainer.ranks.number])
            self.loaded = None

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if self.every and (last or state.global_step % self.every == 0):
            ranks = self.trainer.ranks
            random = {"random": ranks.gather(rng_state()), "epoch_random": ranks.gather(self.epoch_random)}
            ranks.first(lambda: self._save(Path(str(args.output_dir)), state, random, **kwargs))

    def _save(self, folder, state, random, model, optimizer, lr_scheduler, **kwargs):
        training = {
            "identity": self.identity,
            "step": state.global_step,
            "model": trained_weights(model),
            "optimizer": optimizer.state_dict(),
            "scheduler": lr_scheduler.state_dict(),
            "trainer_state": as_json(state),
            **random,
            "progress": {
                "losses": self.trainer.losses,
                **{name: getattr(self.clock, name) for name in self.clock.KEPT},
            },
        }
        save_checkpoint(folder / CHECKPOINT, training)

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Continue the records of a checkpoint."""
        self.trainer.losses[:] = progress["losses"]
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
    """A Trainer on the mean loss over the labelled tokens of a step.

    Every rank reads whole batches, all in the same order, and computes its own rows. So several
    ranks train the batches of a single one, and each knows the number of labelled tokens of a step.
    The backward passes of a step add up their parts of its gradient, so that each token counts
    the same, however many there are in a pass.

    Attributes:
        losses: loss of every step in nats per token, over the batches of all ranks.
        ranks: the ranks that train together.
        precision: context of the forward passes (`precision.autocast`).
        checkpoints: saves and loads training.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(
        self,
        *args: Any,
        clock: Clock,
        ranks: Ranks,
        precision: torch.autocast,
        save_steps: int = 0,
        identity: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.losses: list[float] = []
        self.ranks, self.precision = ranks, precision
        self._passes, self._tokens = 1, 0  # of the present step
        self._totals: list[torch.Tensor] = []  # summed losses of its passes so far, of this rank
        self.checkpoints = Checkpoints(self, clock, save_steps, identity or {})
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # says what loss_is_scaled_for_ga does to older transformers
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

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of all ranks. Trainer's own method would deal batches out to them."""
        args = self.args
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=args.train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the batches of a step, one a backward pass, and their labelled tokens."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._passes, self._tokens = len(batches), sum(int((b["labels"] != IGNORE).sum()) for b in batches)
        self._totals = []
        return batches, self._tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = range(len(inputs["labels"]))
        own = self.ranks.own(rows)
        # The last batch of an epoch may be smaller. A rank without a row takes part by a loss of 0.
        with self.precision:
            total, _ = evaluation.answer_loss(model, take_rows(inputs, own or rows[:1]))
        total = total * bool(own)
        self._totals.append(total.detach())
        if len(self._totals) == self._passes:
            self._note_loss()
        # DistributedDataParallel averages the gradients of the ranks.
        return total * self.ranks.count / self._tokens

    def _note_loss(self) -> None:
        """Append the loss of a step to ``losses``, at its last pass.

        Raises:
            Diverged: on every rank, when it is not finite. No weight has changed then.
        """
        self.losses.append((self.ranks.sum(torch.stack(self._totals).sum()) / self._tokens).item())
        if not math.isfinite(self.losses[-1]):
            float16 = base_of(self.model).dtype == torch.float16
            other = ", or --dtype bfloat16, for float16 overflows easily" if float16 else ""
            raise Diverged(f"the loss is {self.losses[-1]} at step {len(self.losses)}; choose a lower --lr{other}")

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because `Checkpoints` loads the model when training begins.

        Trainer has no public way to resume without a model file in the folder: its own method
        raises. A file for it would be a second copy of the whole model on the disk. Everything
        else that it looks for in the folder may be missing.
        """
