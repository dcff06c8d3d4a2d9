"""One fused optimizer launch per arena, group and gradient format, and gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..nn import trainable
from ..validation import require
from .packed_state import PackedState


class Bucket(NamedTuple):
    """The matrices of one launch. They share arena, group, and form and dtype of their
    gradients.
    """

    arena: PackedState
    group: dict[str, Any]
    packed: bool
    rows: list[int]
    parameters: list[Tensor]
    grads: list[Tensor]

    def segments(self) -> tuple[list[int], list[int]]:
        """Offsets and counts of the matrices in the arena."""
        return [self.arena.offsets[row] for row in self.rows], [self.arena.counts[row] for row in self.rows]

    def norm(self, backend: str | None) -> Tensor:
        """Euclidean norm of the gradients at the trained entries, 0-dim fp32."""
        offsets, counts = self.segments()
        return ops.packed_l2_norm(
            self.grads, self.arena.indices, offsets, counts, packed_grads=self.packed, backend=backend
        )

    def step(
        self, steps: Tensor, inv_scale: Tensor | None, found_inf: Tensor | None, seed: int, backend: str | None
    ) -> None:
        """The fused update of these matrices. ``steps`` (n,) fp32 counts this one, too."""
        arena, group, (offsets, counts) = self.arena, self.group, self.segments()
        ops.sparse_adamw_(
            [arena.weights[row] for row in self.rows],
            self.grads,
            arena.indices,
            offsets,
            counts,
            arena.exp_avg,
            arena.exp_avg_sq,
            steps,
            group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            master=arena.master,
            births=arena.births,
            inv_scale=inv_scale,
            found_inf=found_inf,
            packed_grads=self.packed,
            maximize=group["maximize"],
            stochastic=group["rounding"] == "stochastic",
            seed=seed,
            backend=backend,
        )


def any_infinite(
    buckets: Sequence[Bucket], flag: Tensor | None, scale: Tensor | None, backend: str | None
) -> Tensor | None:
    """GradScaler's ``flag``, raised also for packed gradients, which it cannot see.

    None without a scaler.
    """
    hooked = [bucket for bucket in buckets if any(trainable.hooked_gradient(p) is not None for p in bucket.parameters)]
    if flag is None or not hooked:
        return flag
    require(
        scale is not None,
        "scaler.unscale_ does not reach packed gradients p.lift_grad; leave it out and clip by max_grad_norm=",
        RuntimeError,
    )
    for bucket in hooked:
        flag = flag + (~bucket.norm(backend).isfinite()).float()
    return flag


def clipping(
    buckets: Sequence[Bucket],
    dense: Sequence[Tensor],
    inv_scale: Tensor | None,
    max_grad_norm: float,
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The factor of all gradients that clips them, and their norm before.

    The norm is over trained entries and the ``dense`` parameters together. Without any gradient
    ``inv_scale`` comes back, and no norm. Nothing waits for the host.
    """
    norms = [bucket.norm(backend) for bucket in buckets]
    norms += [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in dense if p.grad is not None]
    if not norms:
        return inv_scale, None
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, non_blocking=True) for n in norms]))
    scale = None if inv_scale is None else inv_scale.to(norm.device, non_blocking=True)
    norm = norm if scale is None else norm * scale
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    return factor if scale is None else factor * scale, norm
