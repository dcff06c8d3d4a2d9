"""Fine-tuning runs that stop before a chosen step."""

import pytest

from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.run import run
from lift_kernels.finetune.trainer import AnswerTrainer


def interrupted(monkeypatch, settings: Settings, after: int, resumed: bool = False) -> None:
    """Run and stop in the forward pass that follows step ``after``."""
    original = AnswerTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if len(self.losses) == after:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "compute_loss", compute_loss)
        with pytest.raises(KeyboardInterrupt):
            run(settings, resumed)
