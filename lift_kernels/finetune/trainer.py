"""Trainer of the main job: mean loss over answer tokens, checkpoints of ours."""

import math
from typing import Any

from . import evaluation, resume
from .settings import UserError


class AnswerTrainer(resume.Resumable):
    """Trainer on the mean loss over answer tokens; ``losses`` collects it step by step."""

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
