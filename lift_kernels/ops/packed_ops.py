"""Public ops that move entries between dense tensors and packed vectors.

Gather, scatter, migration to a new index list, and the norm of the selected entries. Each op has
its schema, fake, argument checks and choice of backend here. `lift_kernels.ops` describes what all
ops have in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ..validation import check_index_list, require
from . import dispatch, reference
from .arena_checks import check_norm, check_segments
from .checks import check_gather, check_migrate, check_scatter
from .dispatch import native_op
from .eager import active_modes, row_major, skips_dispatcher


def packed_gather(
    source: Tensor,
    indices: Tensor,
    *,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Gather the entries of a tensor at flat positions.

    Args:
        source: tensor of any shape, float32, bfloat16 or float16. It is copied first if it is not
            contiguous.
        indices: (k,) int32, contiguous, flat positions in ``source``.
        dtype: of the result, float32, bfloat16 or float16. None keeps the dtype of ``source``. A
            narrower dtype is rounded to nearest even.
        validate: check that ``indices`` is sorted, unique and in range, which waits for the device.
            Without it, positions out of range are undefined behavior.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        (k,) vector of ``dtype`` on the device of ``source``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout or device.
        IndexError: ``validate`` found a position out of range.
        RuntimeError: the backend cannot run here.
    """
    if skips_dispatcher(source, indices):
        return _gather(source, indices, dtype, validate, backend)
    return torch.ops.lift_kernels.packed_gather(source, indices, dtype=dtype, validate=validate, backend=backend)


@torch.library.custom_op(
    "lift_kernels::packed_gather",
    mutates_args=(),
    schema="(Tensor source, Tensor indices, *, ScalarType? dtype=None, bool validate=False, str? backend=None) "
    "-> Tensor",
)
def _packed_gather_op(source, indices, *, dtype=None, validate=False, backend=None):
    return _gather(source, indices, dtype, validate, backend)


@_packed_gather_op.register_fake
def _(source, indices, *, dtype=None, validate=False, backend=None):
    check_gather(source, indices, dtype or source.dtype)
    return torch.empty(indices.shape, dtype=dtype or source.dtype, device=indices.device)


def _gather(source, indices, dtype, validate, backend):
    dtype = dtype or source.dtype
    check_gather(source, indices, dtype)
    if validate:
        check_index_list(indices, source.numel(), "indices")
    name = dispatch.choose(backend, indices.device, "packed_gather")
    if name == "reference":
        return reference.packed_gather_ref(source, indices, dtype)
    out = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    kernel(name, "packed_gather")(source.contiguous(), indices, out)
    return out


def packed_scatter_(
    dest: Tensor, indices: Tensor, values: Tensor, *, validate: bool = False, backend: str | None = None
) -> Tensor:
    """Write values into a tensor at flat positions, in place.

    All other entries keep their bits.

    Args:
        dest: contiguous tensor of any shape, float32, bfloat16 or float16.
        indices: (k,) int32, contiguous, flat positions in ``dest``.
        values: (k,) float32, bfloat16 or float16. They are rounded to nearest even where ``dest``
            is narrower.
        validate: check that ``indices`` is sorted, unique and in range, which waits for the device.
            Without it, positions out of range are undefined behavior.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        ``dest``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout or device.
        IndexError: ``validate`` found a position out of range.
        RuntimeError: the backend cannot run here.
    """
    if skips_dispatcher(dest, indices, values):
        _scatter(dest, indices, values, validate, backend)
        increment_version(dest)  # otherwise the dispatcher does
    else:
        torch.ops.lift_kernels.packed_scatter_(dest, indices, values, validate=validate, backend=backend)
    return dest


@torch.library.custom_op(
    "lift_kernels::packed_scatter_",
    mutates_args=("dest",),
    schema="(Tensor(a!) dest, Tensor indices, Tensor values, *, bool validate=False, str? backend=None) -> ()",
)
def _packed_scatter_op(dest, indices, values, *, validate=False, backend=None):
    _scatter(dest, indices, values, validate, backend)


@_packed_scatter_op.register_fake
def _(dest, indices, values, *, validate=False, backend=None):
    check_scatter(dest, indices, values)


def _scatter(dest, indices, values, validate, backend):
    check_scatter(dest, indices, values)
    if validate:
        check_index_list(indices, dest.numel(), "indices")
    name = dispatch.choose(backend, indices.device, "packed_scatter_")
    if name == "reference":
        reference.packed_scatter_ref(dest, indices, values)
        return
    kernel(name, "packed_scatter_")(dest, indices, values.contiguous())


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
    """Carry the values of one index list over to another.

    This is what a refresh does with the moments (LIFT, arXiv 2506.00772, section 3.2). Entries in
    both lists keep their value to the bit. The two sorted lists are merged, without a dense buffer.

    Args:
        values: (k_old,) float32, bfloat16 or int32.
        old_indices: (k_old,) int32, contiguous, sorted and unique.
        new_indices: (k_new,) int32, contiguous, sorted and unique.
        fill: value of the entries that are only in ``new_indices``.
        fill_values: (k_new,) of the dtype of ``values``. Given, an entering entry takes its value
            from here and not from ``fill``.
        validate: check that both lists are sorted and unique, which waits for the device.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        (k_new,) vector of the dtype of ``values``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout or device, or ``validate`` found disorder.
        IndexError: ``validate`` found a negative position.
        RuntimeError: the backend cannot run here.
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
    kernel(name, "packed_migrate")(values.contiguous(), old_indices, new_indices, out)
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
    """Compute the Euclidean norm over the selected entries of n gradients together.

    The result is deterministic, and the host does not wait for the device.

    Args:
        grads: n gradients of one dtype, as in `sparse_adamw_`.
        indices: int32 arena of the sorted flat positions.
        offsets: where the segment of each gradient starts in the arena.
        counts: entries of each segment.
        packed_grads: the gradients are vectors of ``counts[i]`` entries and not dense.
        validate: check the index lists of dense gradients, which waits for the device.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        0-dim float32 tensor on the device of ``indices``. Squares are summed in fp64.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout or device, or segments overlap.
        IndexError: a segment does not fit in the arena, or ``validate`` found a position out of
            range.
        RuntimeError: the backend cannot run here.
    """
    ordinary = backend is None and not validate and type(indices) is Tensor and indices.is_cpu
    if ordinary and not torch.is_grad_enabled() and not is_compiling() and active_modes() == 0:
        if native := native_op("packed_l2_norm", "packed_square_sums"):
            # The usual norm on a CPU runs no Python code of another module.
            try:
                partials = native(grads, indices, offsets, counts, packed_grads)
            except (RuntimeError, ValueError, TypeError):
                partials = None  # Fall through: the Python path below raises the detailed error.
            if partials is not None:
                return partials.sum(dtype=torch.float64).sqrt().float()
    if skips_dispatcher(indices, *grads):
        return _norm(grads, indices, offsets, counts, packed_grads, validate, backend)
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
    return _norm(grads, indices, offsets, counts, packed_grads, validate, backend)


@_packed_l2_norm_op.register_fake
def _(grads, indices, offsets, counts, *, packed_grads=False, validate=False, backend=None):
    check_norm(grads, indices, offsets, counts, packed_grads)
    return torch.empty((), dtype=torch.float32, device=indices.device)


def _norm(grads, indices, offsets, counts, packed_grads, validate, backend):
    check_norm(grads, indices, offsets, counts, packed_grads)
    if validate and not packed_grads:
        check_segments(grads, indices, offsets, counts)
    name = dispatch.choose(backend, indices.device, "packed_l2_norm")
    if name == "reference" or not grads:
        return reference.packed_l2_norm_ref(grads, indices, offsets, counts, packed_grads)
    ordered = [row_major(g) for g in grads]
    partials = kernel(name, "packed_square_sums")(ordered, indices, offsets, counts, packed_grads)
    require(
        partials is not None, "internal error: the native norm rejected arguments that passed the checks", RuntimeError
    )
    return partials.sum(dtype=torch.float64).sqrt().float()


@functools.cache
def kernel(backend: str, stem: str) -> Callable[..., Any]:
    """Return the function that fills the outputs of the op ``stem``.

    It is a private native op, or a Triton launcher with the same arguments.
    """
    if backend == "triton":
        from .triton import packed_ops

        return getattr(packed_ops, f"{stem.rstrip('_')}_triton")
    return getattr(torch.ops.lift_kernels_native, stem).default
