"""Options of a fine-tuning run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError

METHODS = ("lift", "full", "lora", "random")
LEARNING_RATES = {"lift": 1e-3, "random": 1e-3, "lora": 1e-3, "full": 1e-4}
"""Default peak learning rate of each method."""
GRADIENTS = ("packed", "dense")
PARALLEL = ("none", "ddp")
PROBLEMS = ("plain", "hard")
LOSSES = ("answers", "all")
METRICS = ("number", "exact", "choice", "none")
STEPS = 60
REFRESH_DRIFT = 0.03
"""Default of ``refresh_drift``; docs/guide.md says what it was measured on."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Options of a fine-tuning run; ``python -m lift_kernels finetune --help`` lists them too.

    Attributes:
        model: directory, GGUF file or hub id; None is the bundled model.
        data: files, folders and hub ids that hold the samples; none generates word problems.
        split: split of data that has several, such as that of the hub.
        problems: level of the generated word problems, one of PROBLEMS.
        loss: one of LOSSES: on answers only, or on all tokens.
        shots: worked examples in front of a question, and the most samples that a training sequence
            joins; None takes 4 for question/answer data whose answers are numbers, else 0.
        packing: join samples into sequences of max_length tokens that do not see each other.
        truncate: cut samples that have more than max_length tokens, in place of leaving them out.
        metric: one of METRICS; None chooses one from the answers.
        neutral: text files whose loss is measured beside the built-in neutral text.
        method: one of METHODS.
        gradients: one of GRADIENTS, for methods lift and random.
        density: share of each matrix that is trained.
        rank: rank of the approximation that selects the entries.
        budget_rank: train (rows + columns) x budget_rank entries per matrix, in place of density.
        include, exclude: regular expressions; linear layers whose names match are trained, or not.
        extra: regular expression; weights outside linear layers whose names match are trained too.
            None trains stacks of matrices (3-D), such as experts; "" trains none.
        refresh_interval: steps between mask refreshes; 0 for none.
        refresh_drift: a mask is refreshed when this share of its entries would change, by
            prediction; 0 refreshes every mask. Method random has no drift.
        steps: optimizer steps; None takes 60, or as many as epochs need.
        epochs: passes over the training data, in place of steps.
        lr: peak learning rate; None takes the method's default.
        batch_size: samples per step.
        accumulation: backward passes per step; each sees its part of the batch.
        checkpointing: compute activations again in the backward pass, in place of keeping them.
        max_length: longest sample in tokens.
        dtype: dtype of the weights, a key of DTYPES.
        autocast: run forward passes in bfloat16 where the operations allow it.
        device: auto, cpu or cuda.
        seed: seed of problems, order and random masks.
        eval_problems: number of held-out problems.
        save_steps: steps between checkpoints; 0 for none.
        name: directory of the run inside output; None takes method and time.
        output: directory of all runs.
        parallel: one of PARALLEL. "ddp" shares each batch out among the ranks that a launcher, such
            as torchrun, has started.
        report_to: a tracker that transformers knows, such as tensorboard, or none.

    Raises:
        UserError: for a value that is not allowed.
    """

    model: str | None = None
    data: tuple[str, ...] = ()
    split: str = "train"
    problems: str = "plain"
    loss: str = "answers"
    shots: int | None = None
    packing: bool = False
    truncate: bool = False
    metric: str | None = None
    neutral: tuple[str, ...] = ()
    method: str = "lift"
    gradients: str = "packed"
    density: float = 0.05
    rank: int = 64
    budget_rank: int | None = None
    include: str | None = None
    exclude: str | None = None
    extra: str | None = None
    refresh_interval: int = 25
    refresh_drift: float = REFRESH_DRIFT
    steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    max_length: int = 512
    dtype: str = "float32"
    autocast: bool = False
    device: str = "auto"
    seed: int = 0
    eval_problems: int = 100
    save_steps: int = 20
    name: str | None = None
    output: str = "runs"
    parallel: str = "none"
    report_to: str = "none"

    def __post_init__(self) -> None:
        for field in ("data", "neutral"):  # one name may come alone, and JSON has lists
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value or ()))
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", STEPS)
        known: dict[str, tuple] = {
            "method": METHODS,
            "gradients": GRADIENTS,
            "dtype": tuple(DTYPES),
            "device": ("auto", "cpu", "cuda"),
        }
        known |= {"parallel": PARALLEL, "problems": PROBLEMS, "loss": LOSSES, "metric": (None, *METRICS)}
        for field, choices in known.items():
            if getattr(self, field) not in choices:
                raise UserError(f"unknown {field} {getattr(self, field)!r}; use one of {', '.join(choices)}")
        for field in ("rank", "steps", "batch_size", "max_length", "eval_problems", "budget_rank"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} is {value}; it must be at least 1")
        for field in ("refresh_interval", "seed", "save_steps"):
            if getattr(self, field) < 0:
                raise UserError(f"{field} is {getattr(self, field)}; it must not be negative")
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; it must be below 2^32")
        if not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}; it must be above 0 and at most 1")
        if not 0 <= self.refresh_drift <= 1:
            raise UserError(f"refresh_drift is {self.refresh_drift}; it must be at least 0 and at most 1")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UserError(f"lr is {self.lr}; it must be a positive number")
        if self.extra is not None and self.method not in ("lift", "random"):
            raise UserError(f"extra is {self.extra!r}, and method {self.method} has no use for it; leave out --extra")
        try:
            re.compile(self.extra or "")
        except re.error as error:
            raise UserError(f"extra is {self.extra!r}, no regular expression: {error}; correct --extra") from error
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but PyTorch sees no CUDA device; use --device cpu")
        if self.name is not None and (Path(self.name).name != self.name or self.name == ".."):
            raise UserError(
                f"name {self.name!r} must be a plain directory name; choose its parent directory with --output"
            )
        ranks = os.environ.get("WORLD_SIZE")
        if self.parallel == "ddp" and ranks is None:
            raise UserError(
                "parallel is ddp, and no launcher has started ranks; run `torchrun --nproc-per-node N -m lift_kernels "
                "finetune --parallel ddp`, or with --resume DIR in place of --parallel ddp"
            )
        if self.parallel == "none" and int(ranks or 1) > 1:
            raise UserError(
                f"a launcher has started {ranks} processes, and each would do the whole run; share it out with "
                "--parallel ddp, or start one process"
            )
