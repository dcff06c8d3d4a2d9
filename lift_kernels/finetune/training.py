"""The training of a run by transformers' Trainer: its arguments, and what goes with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import UserError
from ..optim.lift_adamw import LiftAdamW
from . import prompts
from .config import CLIP_NORM, Settings
from .data import RunData
from .parallel import Ranks
from .precision import autocast
from .timing import Clock
from .trainer import AnswerTrainer

WARMUP = 0.03  # share of the steps


def check_batch(settings: Settings, data: RunData, ranks: Ranks) -> None:
    """Raise UserError unless a batch has enough sequences for all backward passes and ranks."""
    if data.rows % settings.accumulation:
        fits = [n for n in range(1, data.rows + 1) if data.rows % n == 0]
        raise UserError(
            f"a batch of {settings.batch_size} samples makes {data.rows} sequences, which {settings.accumulation} "
            f"passes cannot share; take --accumulation {' or '.join(map(str, fits))}, or a larger --batch-size"
        )
    rows, each = data.rows // settings.accumulation, settings.batch_size // data.rows
    if rows < ranks.count:
        passes = f" in each of {settings.accumulation} passes" if settings.accumulation > 1 else ""
        raise UserError(
            f"a batch of {settings.batch_size} samples makes {rows} sequences{passes}, too few for {ranks.count} "
            f"ranks; take at most {rows} ranks, or --batch-size {each * ranks.count * settings.accumulation}"
        )


def steps_of(epochs: float, data: RunData) -> int:
    """Return how many steps so many passes over the data take. The last batch may be small."""
    each = math.ceil(len(data.sequences) / data.rows)
    return max(1, math.ceil(epochs * each - 1e-9))  # 0.1 x 30 is 3.0000000000000004


def train(
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    data: RunData,
    steps: int,
    settings: Settings,
    *,
    clock: Clock,
    ranks: Ranks,
    folder: Path,
    identity: dict[str, str] | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> list[float]:
    """Train a model and return the loss of every step, in nats per labelled token.

    Args:
        model: the model that `methods.prepare` has returned; it is changed in place.
        tokenizer: its tokenizer.
        optimizer: optimizer of its trained parameters.
        data: the training sequences.
        steps: optimizer steps, those of ``checkpoint`` among them.
        settings: options of the run.
        clock: receives durations.
        ranks: the ranks that train together.
        folder: where checkpoints go, every ``settings.save_steps`` steps.
        identity: fingerprints that are saved in a checkpoint (`run_dir.identity`).
        checkpoint: state of an interrupted run, or None at the start.

    Raises:
        UserError: when the loss is not finite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=data.rows // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
        train_sampling_strategy="group_by_length",
        learning_rate=optimizer.param_groups[0]["lr"],
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(WARMUP * steps)),
        # LiftAdamW clips by the norm over its own entries. The norm over dense gradients is larger
        # and would clip harder.
        max_grad_norm=0.0 if isinstance(optimizer, LiftAdamW) else CLIP_NORM,
        logging_steps=10 if settings.report_to == "none" else 1,
        save_strategy="no",  # AnswerTrainer saves
        report_to=settings.report_to,
        run_name=folder.name,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        log_level_replica="error",
        average_tokens_across_devices=False,  # AnswerTrainer counts the tokens of the batch
        ddp_find_unused_parameters=True,  # such as those of an expert that no token of this rank chose
        ddp_broadcast_buffers=False,  # a rank may run more forward passes than another (`row_losses`)
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one GPU: DataParallel would give every replica its own weights
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=data.sequences,
        data_collator=lambda batch: prompts.collate(batch, tokenizer.pad_token_id),
        optimizers=(optimizer, None),
        clock=clock,
        ranks=ranks,
        precision=autocast(settings, model.device),
        save_steps=settings.save_steps,
        identity=identity,
    )
    try:
        trainer.train_from(checkpoint)
    except Exception:
        trainer.callback_handler.on_train_end(arguments, trainer.state, trainer.control)  # closes the progress bar
        raise
    clock.separate_refreshes()
    return trainer.losses
