"""Derived scalars of an AdamW step, formed in fp64 and only then rounded to fp32.

Forming ``1 - beta2`` or a bias correction in fp32 would triple the error of a step. Everything here
is a tensor expression on the device that holds the step counts. So a step never waits for the host
and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .device_tables import DeviceTables, Table
from .stochastic_rounding import stochastic_key

MAX_AGE = 2**24
"""Largest bias-correction table, in steps. Betas beyond 0.999999 would need a larger one."""


def adamw_scalars(
    steps: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float, per_entry: bool
) -> Tensor:
    """Return the scalars of each matrix, (n, 3) fp32.

    The columns are the step size lr / bc1, 1 / sqrt(bc2) and the decay factor
    1 - lr * weight_decay. With ``per_entry`` the corrections come from `bias_table`, so the first
    two columns are lr and 1.
    """
    step, lr = steps.double(), lr.to(torch.float64).reshape(())
    table = torch.empty(steps.numel(), 3, dtype=torch.float32, device=steps.device)
    table[:, 0] = lr if per_entry else lr / (1 - beta1**step)
    table[:, 1] = 1.0 if per_entry else (1 - beta2**step).rsqrt()
    table[:, 2] = 1 - lr * weight_decay
    return table


def stochastic_keys(steps: Tensor, seed: int) -> Tensor:
    """Return the keys of the counter-based noise, (n,) int32 with the bits of uint32."""
    key = stochastic_key(steps, seed)
    return torch.where(key >= 2**31, key - 2**32, key).to(torch.int32)


def last_age(beta1: float, beta2: float) -> int:
    """Return the age from which both bias corrections are 1 in fp32.

    Raises:
        ValueError: the betas are so close to 1 that the age lies beyond `MAX_AGE`.
    """
    beta = max(beta1, beta2)
    age = 1 if beta == 0 else math.ceil(math.log(2.0**-26) / math.log(beta)) + 1
    if age > MAX_AGE:
        raise ValueError(
            f"bias_correction='per_entry' needs betas up to 0.999998, got ({beta1}, {beta2}); use 'global'"
        )
    return age


def bias_table(beta1: float, beta2: float, device: torch.device) -> Tensor:
    """Return 1 / bc1 and 1 / sqrt(bc2) for each age of an entry, (2, T + 1) fp32.

    Ages run from 0 to T, the `last_age`.

    Raises:
        ValueError: the betas are too close to 1.
        RuntimeError: a CUDA graph is being captured and no earlier step used these betas.
    """

    def build() -> Table:
        age = torch.arange(last_age(beta1, beta2) + 1, dtype=torch.float64, device="cpu")
        age[0] = 1  # age 0 never occurs in a step, and 1 keeps the table finite
        return Table(torch.stack([(1 - beta1**age).reciprocal(), (1 - beta2**age).rsqrt()]).float(), True)

    return _bias_tables.get((beta1, beta2), device, build).data


_bias_tables = DeviceTables("betas", 16, "run the step once before the capture with the same betas")
