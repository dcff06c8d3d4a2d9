"""Training of a tiny model on the data of some settings, without the measurements of a run."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM

from lift_kernels import LiftAdamW, lift_param_groups
from lift_kernels.checkpoint import load_checkpoint
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import RunData, prepare_data
from lift_kernels.finetune.parallel import Ranks
from lift_kernels.finetune.run_dir import CHECKPOINT
from lift_kernels.finetune.timing import Clock
from lift_kernels.finetune.training import train


def trained(settings: Settings, tokenizer, folder: Path, steps: int, resumed: bool = False):
    """Train the model of the settings.

    Args:
        settings: options; the model is a folder.
        tokenizer: its tokenizer.
        folder: where the checkpoint is.
        steps: optimizer steps.
        resumed: continue from the checkpoint in the folder.

    Returns:
        The model, the losses of all steps, and the data.
    """
    transformers.set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model)
    data: RunData = prepare_data(settings, tokenizer, model)
    optimizer = LiftAdamW(lift_param_groups(model), lr=5e-3, rank=4, density=0.2, refresh_interval=2)
    clock = Clock(model.device)
    checkpoint = load_checkpoint(folder / CHECKPOINT) if resumed else None
    options = {"clock": clock, "ranks": Ranks(), "folder": folder, "checkpoint": checkpoint}
    return model, train(model, tokenizer, optimizer, data, steps, settings, **options), data
