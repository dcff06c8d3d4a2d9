"""Every public op: its schema, its fake, its argument checks and the choice of a backend. No
kernels. The step is defined in `step_op`, the ops of a refresh in `mask_ops`; both are named here.

An op writes only to tensors that its schema marks, so autograd's version counters,
functionalization and `torch.compile` see every mutation. Arena arguments (``indices``, moments,
``master``, ``births``) hold the segments of many matrices: matrix i owns
``offsets[i] .. offsets[i] + counts[i]``. Index lists are trusted unless ``validate=True``;
`PackedState` checks them once, where they enter. Ops never wait for the device, apart from
``validate`` and the reference backend.

A fake checks its arguments like the op itself: a single meta tensor among them sends a call there,
where it would otherwise do nothing and say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import check_index_list
from . import dispatch, reference
from .checks import check_gather, check_migrate, check_norm, check_scatter, check_segments
from .eager import row_major


def packed_gather(
    source: Tensor,
    indices: Tensor,
    *,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The k entries of ``source`` (any shape, fp32/bf16/fp16) at the flat int32 ``indices``: a
    vector of ``dtype``.

    A source that is not contiguous is copied first. Out-of-range indices are undefined unless
    ``validate=True``.
    """
    return torch.ops.lift_kernels.packed_gather(source, indices, dtype=dtype, validate=validate, backend=backend)


@torch.library.custom_op(
    "lift_kernels::packed_gather",
    mutates_args=(),
    schema="(Tensor source, Tensor indices, *, ScalarType? dtype=None, bool validate=False, str? backend=None) "
    "-> Tensor",
)
def _packed_gather_op(source, indices, *, dtype=None, validate=False, backend=None):
    dtype = dtype or source.dtype
    check_gather(source, indices, dtype)
    if validate:
        check_index_list(indices, source.numel(), "indices")
    name = dispatch.choose(backend, indices.device, "packed_gather")
    if name == "reference":
        return reference.packed_gather_ref(source, indices, dtype)
    out = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    _kernel(name, "packed_gather")(source.contiguous(), indices, out)
    return out


@_packed_gather_op.register_fake
def _(source, indices, *, dtype=None, validate=False, backend=None):
    check_gather(source, indices, dtype or source.dtype)
    return torch.empty(indices.shape, dtype=dtype or source.dtype, device=indices.device)


def packed_scatter_(
    dest: Tensor, indices: Tensor, values: Tensor, *, validate: bool = False, backend: str | None = None
) -> Tensor:
    """Write the k ``values`` into contiguous ``dest`` at the flat int32 ``indices``, rounded to
    nearest even; returns ``dest``.
    """
    torch.ops.lift_kernels.packed_scatter_(dest, indices, values, validate=validate, backend=backend)
    return dest


@torch.library.custom_op(
    "lift_kernels::packed_scatter_",
    mutates_args=("dest",),
    schema="(Tensor(a!) dest, Tensor indices, Tensor values, *, bool validate=False, str? backend=None) -> ()",
)
def _packed_scatter_op(dest, indices, values, *, validate=False, backend=None):
    check_scatter(dest, indices, values)
    if validate:
        check_index_list(indices, dest.numel(), "indices")
    name = dispatch.choose(backend, indices.device, "packed_scatter_")
    if name == "reference":
        return reference.packed_scatter_ref(dest, indices, values)
    _kernel(name, "packed_scatter_")(dest, indices, values.contiguous())


@_packed_scatter_op.register_fake
def _(dest, indices, values, *, validate=False, backend=None):
    check_scatter(dest, indices, values)


def packed_migrate(
    values: Tensor,
    old_indices: Tensor,
    new_indices: Tensor,
    *,
    fill: float = 0.0,
    fill_values: Tensor | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Carry ``values`` (k_old; fp32, bf16 or int32) of one sorted index list over to another: a
    vector of k_new values.

    Entries in both lists keep their value to the bit; entering ones get ``fill`` or their place in
    ``fill_values`` (k_new, same dtype). A merge of the two lists: no dense buffer.
    """
    return torch.ops.lift_kernels.packed_migrate(
        values, old_indices, new_indices, fill_values, fill=fill, validate=validate, backend=backend
    )


@torch.library.custom_op(
    "lift_kernels::packed_migrate",
    mutates_args=(),
    schema="(Tensor values, Tensor old_indices, Tensor new_indices, Tensor? fill_values=None, *, float fill=0.0, "
    "bool validate=False, str? backend=None) -> Tensor",
)
def _packed_migrate_op(values, old_indices, new_indices, fill_values=None, *, fill=0.0, validate=False, backend=None):
    check_migrate(values, old_indices, new_indices, fill_values)
    if validate:
        check_index_list(old_indices, 2**31, "old_indices")
        check_index_list(new_indices, 2**31, "new_indices")
    name = dispatch.choose(backend, values.device, "packed_migrate")
    if name == "reference":
        return reference.packed_migrate_ref(values, old_indices, new_indices, fill, fill_values)
    if fill_values is not None:
        out = fill_values.clone(memory_format=torch.contiguous_format)
    else:
        out = torch.full(new_indices.shape, fill, dtype=values.dtype, device=values.device)
    _kernel(name, "packed_migrate")(values.contiguous(), old_indices, new_indices, out)
    return out


@_packed_migrate_op.register_fake
def _(values, old_indices, new_indices, fill_values=None, *, fill=0.0, validate=False, backend=None):
    check_migrate(values, old_indices, new_indices, fill_values)
    return torch.empty(new_indices.shape, dtype=values.dtype, device=values.device)


def packed_l2_norm(
    grads: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    *,
    packed_grads: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Euclidean norm over the selected entries of n gradients together: a 0-dim fp32 tensor on
    their device.

    Deterministic, without a host synchronization. Gradients as in `sparse_adamw_`.
    """
    return torch.ops.lift_kernels.packed_l2_norm(
        grads, indices, offsets, counts, packed_grads=packed_grads, validate=validate, backend=backend
    )


@torch.library.custom_op(
    "lift_kernels::packed_l2_norm",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor indices, int[] offsets, int[] counts, *, bool packed_grads=False, bool "
    "validate=False, str? backend=None) -> Tensor",
)
def _packed_l2_norm_op(grads, indices, offsets, counts, *, packed_grads=False, validate=False, backend=None):
    check_norm(grads, indices, offsets, counts, packed_grads)
    if validate and not packed_grads:
        check_segments(grads, indices, offsets, counts)
    name = dispatch.choose(backend, indices.device, "packed_l2_norm")
    if name == "reference" or not grads:
        return reference.packed_l2_norm_ref(grads, indices, offsets, counts, packed_grads)
    partials = _kernel(name, "packed_square_sums")(
        [row_major(g) for g in grads], indices, offsets, counts, packed_grads
    )
    return partials.sum(dtype=torch.float64).sqrt().float()


@_packed_l2_norm_op.register_fake
def _(grads, indices, offsets, counts, *, packed_grads=False, validate=False, backend=None):
    check_norm(grads, indices, offsets, counts, packed_grads)
    return torch.empty((), dtype=torch.float32, device=indices.device)


def _kernel(backend: str, stem: str):
    """The function that fills the outputs of op ``stem``: a private native op, or a Triton launcher
    with the same arguments.
    """
    if backend == "triton":
        from .triton import packed_ops

        return getattr(packed_ops, f"{stem.rstrip('_')}_triton")
    return getattr(torch.ops.lift_kernels_native, stem)
