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
        clock = self.clock
        times = {"forward_backward": clock.forward_backward, "steps": clock.steps, "refreshes": clock.refreshes}
        return {"losses": self.losses, **times}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        self.losses, clock = progress["losses"], self.clock
        clock.forward_backward, clock.steps, clock.refreshes = (
            progress[key] for key in ("forward_backward", "steps", "refreshes")
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, count = evaluation.answer_loss(model, inputs)
        loss = total / count
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise UserError(f"the loss is {self.losses[-1]} at step {len(self.losses)}; choose a lower --lr")
        return loss
