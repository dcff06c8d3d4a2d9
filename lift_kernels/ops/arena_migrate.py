"""The public op that gives matrices new index lists and moves their optimizer state along.

`lift_kernels.ops` describes what all ops have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ..validation import require
from . import dispatch, reference
from .arena_checks import check_arena_migrate, check_migrated_segments
from .dispatch import native_op
from .eager import active_modes, skips_dispatcher


def arena_migrate_(
    weights: Sequence[Tensor],
    new_indices: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    *,
    master: Tensor | None = None,
    births: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Give n matrices new index lists and carry their state over, in place.

    This is what a refresh does (LIFT, arXiv 2506.00772, section 3.2). Each old list is merged with
    its new one once. Entries in both keep their state to the bit, but for 8-bit moments, which get
    new codes: other entries share their scales now. Entries that enter start with zero moments, the
    weight's value as master, and the matrix's step count as birth. Positions of the arenas outside
    the new segments keep their bits, also where a segment shrinks.

    Args:
        weights: n contiguous tensors of one dtype (float32, bfloat16, float16), only read.
        new_indices: n new lists, (k_i,) int32, contiguous, sorted and unique. They must not share
            memory with the arenas, which are written while the lists are read.
        indices: int32 arena of the sorted flat positions. It gets the new lists.
        offsets: where the segment of each matrix starts in the arenas, before and after.
        counts: entries that each segment has now. Afterwards it has those of its new list, and
            neither may reach another segment.
        exp_avg: arena of the first moments, float32, bfloat16 or int8 codes.
        exp_avg_sq: arena of the second moments, of the same dtype, or uint8 codes.
        steps: (n,) float32, the updates of each matrix so far.
        master: float32 arena of master weights, or int16 arena of their low halves.
        births: int32 arena, the step count at which each entry was selected.
        exp_avg_scale, exp_avg_sq_scale: of `sparse_adamw_`.
        validate: check all lists, and that segments do not overlap, which waits for the device.
            Without it, positions out of range are undefined behavior.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        (n,) int64 on the device of the arenas: the entries of each new list that the old one had.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout or device, or ``validate`` found disorder
            or segments that overlap.
        IndexError: an old or a new segment does not fit in the arena, or ``validate`` found a
            position out of range.
        RuntimeError: the backend cannot run here, or a CUDA graph is being captured.

        Every error is raised before anything is written.
    """
    arena = weights, new_indices, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    optional = master, births, exp_avg_scale, exp_avg_sq_scale
    ordinary = backend is None and not validate and type(indices) is Tensor and indices.is_cpu
    if ordinary and not torch.is_grad_enabled() and not is_compiling() and active_modes() == 0:
        if native := native_op("arena_migrate_"):
            # The usual refresh on a CPU runs no Python code of another module.
            try:
                kept = native(*arena, *optional)
            except (RuntimeError, ValueError, TypeError):
                kept = None  # Fall through: the Python path below raises the detailed error.
            if kept is not None:
                increment_version(_written(indices, exp_avg, exp_avg_sq, *optional))
                return kept
    op = _arena_migrate_op if skips_dispatcher(indices) else torch.ops.lift_kernels.arena_migrate_.default
    return op(*arena, *optional, validate=validate, backend=backend)


def _written(*arenas: Tensor | None) -> list[Tensor]:
    return [arena for arena in arenas if arena is not None]


def _arena_migrate_op(
    weights,
    new_indices,
    indices,
    offsets,
    counts,
    exp_avg,
    exp_avg_sq,
    steps,
    master=None,
    births=None,
    exp_avg_scale=None,
    exp_avg_sq_scale=None,
    *,
    validate=False,
    backend=None,
):
    arena = weights, new_indices, indices, offsets, counts, exp_avg, exp_avg_sq
    optional = master, births, exp_avg_scale, exp_avg_sq_scale
    check_arena_migrate(*arena, steps, *optional)
    if validate:
        check_migrated_segments(*arena[:5])
    name = dispatch.choose(backend, indices.device, "arena_migrate_")
    if indices.is_cuda and dispatch.capturing():
        raise RuntimeError(
            "arena_migrate_ cannot be captured in a CUDA graph: its tables change with every list; call it between "
            "the replays, which see the new lists at the same addresses"
        )
    if not weights:
        return torch.zeros(0, dtype=torch.int64, device=indices.device)
    state = *arena, steps.contiguous(), *optional
    increment_version(_written(indices, exp_avg, exp_avg_sq, *optional))
    if name == "reference":
        return reference.arena_migrate_ref(*state)
    if name == "triton":
        from .triton.arena_migrate import arena_migrate_triton

        return arena_migrate_triton(*state)
    kept = torch.ops.lift_kernels_native.arena_migrate_.default(*state)
    require(
        kept is not None, "internal error: the native migration rejected arguments that passed the checks", RuntimeError
    )
    return kept


def _arena_migrate_fake(
    weights,
    new_indices,
    indices,
    offsets,
    counts,
    exp_avg,
    exp_avg_sq,
    steps,
    master=None,
    births=None,
    exp_avg_scale=None,
    exp_avg_sq_scale=None,
    *,
    validate=False,
    backend=None,
):
    arena = weights, new_indices, indices, offsets, counts, exp_avg, exp_avg_sq, steps
    check_arena_migrate(*arena, master, births, exp_avg_scale, exp_avg_sq_scale)
    return torch.empty(len(weights), dtype=torch.int64, device=indices.device)


# As in sparse_adamw.py: custom_op would add two Python layers, and the op bumps the version
# counters of what it writes.
_library = torch.library.Library("lift_kernels", "FRAGMENT")
_library.define(
    "arena_migrate_(Tensor[] weights, Tensor[] new_indices, Tensor(a!) indices, int[] offsets, int[] counts, "
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor steps, Tensor(d!)? master=None, Tensor(e!)? births=None, "
    "Tensor(f!)? exp_avg_scale=None, Tensor(g!)? exp_avg_sq_scale=None, *, bool validate=False, "
    "str? backend=None) -> Tensor"
)
_library.impl("arena_migrate_", _arena_migrate_op, "CompositeExplicitAutograd")
torch.library.register_fake("lift_kernels::arena_migrate_", _arena_migrate_fake, lib=_library)
