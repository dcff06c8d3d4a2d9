"""Checks of the options of a fine-tuning run, before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError

if TYPE_CHECKING:
    from .config import Settings

PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml"}
"""Packages of trackers that have another name."""


def check_settings(settings: Settings, choices: Mapping[str, Sequence[str | None]], sparse: Sequence[str]) -> None:
    """Raise UserError, naming option, value and remedy, for an option that cannot work.

    Args:
        settings: the options.
        choices: by option, the values that it may have.
        sparse: methods that train chosen entries of matrices.
    """
    _check_choices(settings, choices)
    _check_numbers(settings)
    _check_data(settings)
    _check_patterns(settings, sparse)
    _check_training(settings)
    _check_launch(settings)


def _check_choices(settings: Settings, choices: Mapping[str, Sequence[str | None]]) -> None:
    for field, allowed in choices.items():
        if getattr(settings, field) not in allowed:
            names = ", ".join(choice for choice in allowed if choice is not None)
            raise UserError(f"unknown {field} {getattr(settings, field)!r}; use one of {names}")


def _check_numbers(settings: Settings) -> None:
    least_one = ("rank", "steps", "batch_size", "accumulation", "max_length", "eval_problems", "budget_rank")
    for field in least_one:
        value = getattr(settings, field)
        if value is not None and value < 1:
            raise UserError(f"{field} is {value}; it must be at least 1")
    for field in ("refresh_interval", "seed", "save_steps", "shots"):
        value = getattr(settings, field)
        if value is not None and value < 0:
            raise UserError(f"{field} is {value}; it must not be negative")
    if settings.seed >= 2**32:
        raise UserError(f"seed is {settings.seed}; it must be below 2^32")
    if not 0 < settings.density <= 1:
        raise UserError(f"density is {settings.density}; it must be above 0 and at most 1")
    if not 0 <= settings.refresh_drift <= 1:
        raise UserError(f"refresh_drift is {settings.refresh_drift}; it must be at least 0 and at most 1")
    for field in ("lr", "epochs"):
        value = getattr(settings, field)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{field} is {value}; it must be a positive number")


def _check_data(settings: Settings) -> None:
    if settings.data and settings.problems != "plain":
        raise UserError(
            f"problems is {settings.problems!r}, and data is {settings.data[0]!r}, which has problems of its own; "
            "leave out --problems or --data"
        )
    if not settings.data and settings.split != "train":
        raise UserError(
            f"split is {settings.split!r}, and generated problems have no splits; leave it out or give --data"
        )
    if settings.packing and settings.shots:
        raise UserError(
            f"shots is {settings.shots}, and packing keeps the samples of a sequence apart; leave out --shots or "
            "--packing"
        )


def _check_patterns(settings: Settings, sparse: Sequence[str]) -> None:
    if settings.extra is not None and settings.method not in sparse:
        raise UserError(
            f"extra is {settings.extra!r}, and method {settings.method} has no use for it; leave out --extra"
        )
    for field in ("include", "exclude", "extra"):
        pattern = getattr(settings, field)
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UserError(f"{field} is {pattern!r}, no regular expression: {error}; correct --{field}") from error


def _check_training(settings: Settings) -> None:
    if settings.steps is not None and settings.epochs is not None:
        raise UserError(f"steps is {settings.steps} and epochs is {settings.epochs:g}; leave out --steps or --epochs")
    if settings.batch_size % settings.accumulation:
        raise UserError(
            f"accumulation is {settings.accumulation}, which does not divide a batch of {settings.batch_size} samples; "
            "give an --accumulation that divides --batch-size"
        )
    if settings.autocast and settings.dtype != "float32":
        raise UserError(
            f"autocast runs the forward passes of float32 weights in bfloat16, and dtype is {settings.dtype}; leave "
            "out --autocast, or take --dtype float32"
        )
    _check_state(settings)
    check_tracker(settings.report_to)


def _check_state(settings: Settings) -> None:
    """Check the forms in which gradients, moments and masters are kept."""
    packed = settings.gradients == "packed"
    if settings.master == "split" and settings.dtype != "bfloat16":
        raise UserError(
            f"master is 'split', which keeps the low halves of masters beside bfloat16 weights, and dtype is "
            f"{settings.dtype}; take --dtype bfloat16, or leave out --master"
        )
    if settings.master == "none" and packed and settings.grad_dtype == "float32":
        raise UserError(
            "master is 'none', and float32 packed gradients come with float32 values, which are masters; take "
            "--grad-dtype bfloat16, or leave out --master"
        )
    if settings.grad_dtype != "float32" and not packed:
        raise UserError(
            f"grad_dtype is {settings.grad_dtype}, and gradients are dense, which have the dtype of the weights; leave "
            "out --grad-dtype or --gradients"
        )


def check_tracker(name: str) -> None:
    """Raise UserError unless transformers knows a tracker and its package is installed."""
    if name == "none":
        return
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        [callback] = get_reporting_integration_callbacks([name])
    except ValueError as error:  # its message lists the others
        raise UserError(f"unknown report_to: {error} Leave out --report-to for none") from error
    try:
        callback()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"report_to is {name}, and its package is missing; run `pip install {PACKAGES.get(name, name)}`, or leave "
            "out --report-to"
        ) from error


def _check_launch(settings: Settings) -> None:
    """Check the device, the run's name, and how the ranks were started."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch sees no CUDA device; use --device cpu")
    name = settings.name
    if name is not None and (Path(name).name != name or name == ".."):
        raise UserError(f"name {name!r} must be a plain directory name; choose its parent directory with --output")
    ranks = os.environ.get("WORLD_SIZE")
    if settings.parallel == "ddp" and ranks is None:
        raise UserError(
            "parallel is ddp, and no launcher has started ranks; run `torchrun --nproc-per-node N -m lift_kernels "
            "finetune --parallel ddp`, or with --resume DIR in place of --parallel ddp"
        )
    if settings.parallel == "none" and int(ranks or 1) > 1:
        raise UserError(
            f"a launcher has started {ranks} processes, and each would do the whole run; share it out with "
            "--parallel ddp, or start one process"
        )
