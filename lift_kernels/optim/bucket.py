"""One fused optimizer launch per arena, group and gradient format, and gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import ops
from ..validation import check_gradient, require
from .matrix_ref import MatrixRef
from .matrix_table import MatrixTable
from .offload import HostState
from .packed_state import PackedState


class Bucket:
    """The matrices of one launch. They share arena, group, and form and dtype of gradients.

    Attributes:
        refs: the matrices.
        grads: their present gradients.
        packed: whether these hold the trained entries alone.
        arena, rows: where the state is.
        group: the options.
        hooked: the matrices whose gradient a hook has packed.
    """

    def __init__(self, refs: list[MatrixRef], packed: bool) -> None:
        arena = refs[0].arena
        assert arena is not None
        self.arena: PackedState = arena
        self.refs, self.packed, self.group = refs, packed, refs[0].group
        self.rows = [ref.row for ref in refs]
        self.grads: list[Tensor] = []
        self.hooked = [ref for ref in refs if packed and ref.trainable.hooked]
        self._values = [ref.parameter for ref in refs if ref.trainable.packed]
        self._weights = [arena.weights[row] for row in self.rows]
        self._segments = [arena.offsets[row] for row in self.rows], [arena.counts[row] for row in self.rows]
        self._steps: Tensor | None = None

    def begin(self, found_inf: Tensor | None) -> None:
        """Prepare the step (`PackedState.begin_step`). ``found_inf`` may be on another device."""
        self._steps = self.arena.begin_step(self.rows, self._here(found_inf))

    def norm(self, backend: str | None) -> Tensor:
        """Euclidean norm of the gradients at the trained entries, 0-dim fp32."""
        return ops.packed_l2_norm(
            self.grads, self.arena.indices, *self._segments, packed_grads=self.packed, backend=backend
        )

    def step(self, inv_scale: Tensor | None, found_inf: Tensor | None, seed: int, backend: str | None) -> None:
        """The fused update of these matrices, after `begin`."""
        arena, group, steps = self.arena, self.group, self._steps
        assert steps is not None
        options: dict[str, Any] = dict(betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
        options |= dict(inv_scale=self._here(inv_scale), found_inf=self._here(found_inf), packed_grads=self.packed)
        options |= dict(maximize=group["maximize"], stochastic=group["rounding"] == "stochastic")
        options |= dict(seed=seed, backend=backend)
        if isinstance(arena, HostState):
            arena.step(self._weights, self.grads, *self._segments, steps, group["lr"], **options)
        else:
            ops.sparse_adamw_(
                self._weights,
                self.grads,
                arena.indices,
                *self._segments,
                arena.exp_avg,
                arena.exp_avg_sq,
                steps,
                group["lr"],
                master=arena.master,
                births=arena.births,
                exp_avg_scale=arena.exp_avg_scale,
                exp_avg_sq_scale=arena.exp_avg_sq_scale,
                **options,
            )
        arena.end_step(self.rows, steps)
        increment_version(self._values)  # They are views of the master with counters of their own.
        for ref in self.hooked:
            ref.trainable.clear()  # model.zero_grad() would not clear it.
        self.release()

    def release(self) -> None:
        """Drop what belongs to one step."""
        self.grads, self._steps = [], None

    def _here(self, number: Tensor | None) -> Tensor | None:
        """A 0-dim number on the device of the weights."""
        if number is None:
            return None
        return number.to(self.arena.indices.device, non_blocking=True).reshape(())


class Sweep:
    """The gradients of a step, in one pass over the parameters, and the buckets they belong to.

    Buckets are kept until the table of matrices or the form of the gradients changes.
    """

    def __init__(self) -> None:
        self._version: tuple[int, ...] | None = None  # of the table that the buckets were made from
        self._form: list[Any] = []  # of the last gradients
        self._grads: list[Tensor | None] = []
        self._packed: list[bool] = []
        self._buckets: list[tuple[Bucket, list[int]]] = []  # with the places of their gradients in the pass
        self._dense: list[tuple[dict[str, Any], list[Tensor]]] = []

    def collect(self, table: MatrixTable) -> None:
        """Take the present gradients.

        Raises, naming the parameter, for a gradient that cannot be used.
        """
        grads, packed = [p.grad for p in table.parameters], table.packed.copy()
        for ref in table.hooked:
            grads[ref.number], packed[ref.number] = ref.trainable.gradient(ref.name)
        every = [*grads, *[p.grad for p, _, _ in table.dense]]
        # torch checks the device of a gradient when it is assigned, and ops check it again.
        form = [packed, [g is not None and g.dtype for g in every], [g is not None and g.layout for g in every]]
        form.append([g is not None and g.shape for g in every])
        if form != self._form:
            self._version = None
            self._check(table, grads)
        self._grads, self._packed, self._form = grads, packed, form

    def trained(self) -> list[bool]:
        """Whether each parameter has a gradient: the matrices, then the others."""
        return [dtype is not False for dtype in self._form[1]]

    def buckets(self, table: MatrixTable) -> list[Bucket]:
        """The launches of the matrices that have a gradient, all of which have a mask."""
        if table.version != self._version:
            self._sort(table)
            self._version = table.version
        for bucket, places in self._buckets:
            bucket.grads = [self._grads[i] for i in places]  # type: ignore[misc]
        self._grads = []  # A bucket drops its gradients when it has used them.
        return [bucket for bucket, _ in self._buckets]

    def release(self) -> None:
        """Drop the gradients of a step, also of one that raised."""
        self._grads = []
        for bucket, _ in self._buckets:
            bucket.release()

    def dense(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The other parameters that have a gradient, by group."""
        return self._dense

    @staticmethod
    def _check(table: MatrixTable, grads: list[Tensor | None]) -> None:
        for ref, grad in zip(table.refs, grads):
            if grad is not None and grad is ref.parameter.grad:
                check_gradient(grad, ref.parameter, ref.name)
        for p, _, name in table.dense:
            if p.grad is not None:
                check_gradient(p.grad, p, name, sparse=False)
                require(
                    not table.has_mask(p),
                    f"{name} has a mask, and its group says lift=False now; make another optimizer to train all of it",
                    RuntimeError,
                )

    def _sort(self, table: MatrixTable) -> None:
        places: dict[tuple, list[int]] = {}
        for i, (ref, grad) in enumerate(zip(table.refs, self._grads)):
            if grad is not None:
                key = id(ref.arena), id(ref.group), grad.dtype, self._packed[i]
                places.setdefault(key, []).append(i)
        self._buckets = [(Bucket([table.refs[i] for i in of_one], key[-1]), of_one) for key, of_one in places.items()]
        dense: dict[int, tuple[dict[str, Any], list[Tensor]]] = {}
        for p, group, _ in table.dense:
            if p.grad is not None:
                dense.setdefault(id(group), (group, []))[1].append(p)
        self._dense = list(dense.values())


def check_scaler(hooked: Sequence[MatrixRef], found_inf: Tensor | int, scale: Tensor | None) -> None:
    """Raise RuntimeError, naming a matrix, if a GradScaler cannot serve gradients that hooks pack.

    Args:
        found_inf: what the scaler passes; the number 0 where it has seen no gradient at all.
        scale: the same; None after ``scaler.unscale_``.
    """
    ref = next((ref for ref in hooked if ref.trainable.pending), None)
    if ref is None:
        return
    require(
        isinstance(found_inf, Tensor),
        f"{ref.name}: GradScaler looks for infinities in p.grad alone, and hooks have packed every gradient of this "
        "step into p.lift_grad, so scaler.update() would fail; train in bf16 without a scaler, or unpack(model) and "
        "use matrix mode, or let the optimizer train some linear layer or norm too",
        RuntimeError,
    )
    require(
        scale is not None,
        f"{ref.name}: scaler.unscale_ does not reach packed gradients p.lift_grad; leave it out and clip by "
        "max_grad_norm=",
        RuntimeError,
    )


def any_infinite(buckets: Sequence[Bucket], flag: Tensor, backend: str | None) -> Tensor:
    """GradScaler's ``flag``, raised also for gradients that hooks pack, which it cannot see."""
    for bucket in [bucket for bucket in buckets if bucket.hooked]:
        flag = flag + (~bucket.norm(backend).isfinite()).float()
    return flag


def gradient_factor(
    buckets: Sequence[Bucket],
    dense: Sequence[tuple[dict[str, Any], list[Tensor]]],
    scale: Tensor | None,
    max_grad_norm: float | None,
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The factor of all gradients, and their norm before it is clipped to ``max_grad_norm``.

    The factor is the inverse of GradScaler's ``scale`` times the one that clips; None stands for 1.
    The norm is over trained entries and ``dense`` parameters together. It is None where nothing is
    clipped. Nothing waits for the host.
    """
    inv_scale = None if scale is None else scale.reshape(()).reciprocal().float()
    if max_grad_norm is None or not (buckets or dense):
        return inv_scale, None
    norms = [bucket.norm(backend) for bucket in buckets]
    norms += [
        torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.grad.dtype, torch.float32)).float()
        for _, parameters in dense
        for p in parameters
        if p.grad is not None
    ]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, non_blocking=True) for n in norms]))
    inv_scale = None if inv_scale is None else inv_scale.to(norm.device, non_blocking=True)
    norm = norm if inv_scale is None else norm * inv_scale
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    return factor if inv_scale is None else factor * inv_scale, norm
