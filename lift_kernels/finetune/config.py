"""The options of a fine-tuning run and the error for a wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError

METHODS = ("lift", "full", "lora", "random")
GRADIENTS = ("packed", "dense")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Options of a run; see ``python -m lift_kernels finetune --help``. Bad values raise
    UserError.
    """

    model: str | None = None
    data: str | None = None
    method: str = "lift"
    gradients: str = "packed"
    density: float = 0.05
    rank: int = 64
    budget_rank: int | None = None
    refresh_interval: int = 25
    steps: int = 60
    lr: float | None = None
    batch_size: int = 8
    max_length: int = 512
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    eval_problems: int = 100
    save_steps: int = 20
    name: str | None = None
    output: str = "runs"

    def __post_init__(self) -> None:
        known = {"method": METHODS, "gradients": GRADIENTS, "dtype": tuple(DTYPES), "device": ("auto", "cpu", "cuda")}
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
        if not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}; it must be above 0 and at most 1")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UserError(f"lr is {self.lr}; it must be a positive number")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but PyTorch sees no CUDA device; use --device cpu")
        if self.name is not None and Path(self.name).name != self.name:
            raise UserError(f"name {self.name!r} must be a plain directory name; choose the place with --output")
