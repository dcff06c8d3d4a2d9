"""torch's own AdamW for the parameters that LIFT does not train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def dense_adamw_(
    parameters: Sequence[Tensor],
    state: dict[Tensor, dict[str, Any]],
    group: dict[str, Any],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of torch's AdamW on parameters that have a gradient; fused where torch has that.

    Args:
        state: by parameter; it is filled when it is empty.
        inv_scale: 0-dim factor of the gradients, which are multiplied in a copy; None for 1.
        found_inf: a non-zero number leaves everything as it was.
    """
    for p in parameters:
        if not state[p]:
            moments = {
                key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in ("exp_avg", "exp_avg_sq")
            }
            state[p].update(step=torch.zeros((), dtype=torch.float32, device=p.device), **moments)
    grads: list[Any] = [p.grad for p in parameters]
    if inv_scale is not None:
        grads = [_scaled(grad, inv_scale) for grad in grads]
    states = [state[p] for p in parameters]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    adamw(
        list(parameters),
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=fused,
        foreach=False,
        capturable=group["capturable"],
        grad_scale=None,
        found_inf=found_inf if fused else None,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """The product, formed in fp32 at least. In fp16 a factor of 2^-16 has few digits left."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * factor.to(grad.device)).to(grad.dtype)
