"""Argument checks of the ops that work on the arenas of many matrices.

As in `checks`, each raises before anything is changed. `check_segments` and
`check_migrated_segments` read the contents of tensors, so they wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import WEIGHT_DTYPES, check_index_list, require
from .checks import check_index_vector, describe
from .state_formats import GROUP, groups_of

_MOMENTS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.int8, torch.uint8),
)
"""Dtypes of the two moments."""


def check_norm(
    grads: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int], packed_grads: bool
) -> None:
    """Check the arguments of `packed_l2_norm`."""
    check_arena(grads, indices, offsets, counts, "grads")
    check_grads(grads, grads, counts, packed_grads)
    for grad in grads[:1]:
        require(grad.device == indices.device, f"gradient 0 is on {grad.device}, indices on {indices.device}")


def check_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: Tensor,
    master: Tensor | None,
    births: Tensor | None,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    packed_grads: bool,
    packed_weights: bool,
    stochastic: bool,
) -> None:
    """Check the arguments of `sparse_adamw_`."""
    device = indices.device
    require(packed_grads or not packed_weights, "packed_weights=True needs packed_grads=True")
    if len(grads) != len(weights):
        raise ValueError(f"every weight needs a gradient, got {len(weights)} weights and {len(grads)} gradients")
    check_arena(weights, indices, offsets, counts, "weights", listed=not packed_weights)
    if not fast_check(weights, grads, counts, packed_grads, device):
        check_grads(grads, weights, counts, packed_grads)
        check_weights(weights, grads, "gradient", device)
    for i, (weight, count) in enumerate(zip(weights, counts) if packed_weights else ()):
        if weight.numel() != count:
            raise ValueError(f"packed weight {i} has {weight.numel()} entries, its index list {count}")
    check_state(indices, exp_avg, exp_avg_sq, master, births)
    check_scales(indices, offsets, exp_avg, exp_avg_scale, exp_avg_sq_scale)
    check_master(weights, master)
    numbers = {"inv_scale": inv_scale, "found_inf": found_inf}
    for label, x in numbers.items():
        if x is not None and x.dtype != torch.float32:
            raise TypeError(f"{label} must be torch.float32, got {x.dtype}")
    for label, x in numbers.items():
        if x is not None and (x.numel() != 1 or x.device != device):
            raise ValueError(f"{label} must be one number on {device}, got {tuple(x.shape)} on {x.device}")
    require(
        lr.numel() == 1 and lr.device.type in (device.type, "cpu"),
        f"lr must be one number on {device} or the CPU, got {tuple(lr.shape)} on {lr.device}",
    )
    check_steps(steps, len(weights), device)
    if stochastic and weights and (master is not None or weights[0].dtype == torch.float32):
        raise ValueError("stochastic rounding needs bfloat16 or float16 weights and no master")


def check_arena_migrate(
    weights: Sequence[Tensor],
    new_indices: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    master: Tensor | None,
    births: Tensor | None,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
) -> None:
    """Check the arguments of `arena_migrate_`."""
    if len(new_indices) != len(weights):
        raise ValueError(f"every weight needs a list, got {len(weights)} weights and {len(new_indices)} new_indices")
    check_arena(weights, indices, offsets, counts, "weights")
    for i, (new, weight, offset) in enumerate(zip(new_indices, weights, offsets)):
        check_index_vector(new, f"new_indices {i}")
        if new.device != indices.device:
            raise ValueError(f"new_indices {i} is on {new.device}, indices on {indices.device}")
        if new.numel() > weight.numel():
            raise ValueError(f"new_indices {i} has {new.numel()} entries, its weight only {weight.numel()}")
        if new.numel() > indices.numel() - offset:
            raise IndexError(
                f"new_indices {i} ({offset} + {new.numel()}) does not fit in an arena of {indices.numel()} entries"
            )
    check_weights(weights, new_indices, "list", indices.device)
    check_state(indices, exp_avg, exp_avg_sq, master, births)
    check_scales(indices, offsets, exp_avg, exp_avg_scale, exp_avg_sq_scale)
    check_master(weights, master)
    check_steps(steps, len(weights), indices.device)


def check_migrated_segments(
    weights: Sequence[Tensor],
    new_indices: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
) -> None:
    """Check the lists before and after a migration, and that neither reach another segment.

    Waits for the device.
    """
    check_segments(weights, indices, offsets, counts)
    check_overlap(offsets, [max(count, new.numel()) for count, new in zip(counts, new_indices)])
    arena = indices.untyped_storage().data_ptr()
    for i, (weight, new) in enumerate(zip(weights, new_indices)):
        require(
            new.numel() == 0 or new.untyped_storage().data_ptr() != arena,
            f"new_indices {i} shares memory with the arena indices, which is written while it is read; clone it",
        )
        check_index_list(new, weight.numel(), f"new_indices {i}")


def check_arena(
    tensors: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    label: str,
    *,
    listed: bool = True,
) -> None:
    """Check that there is one segment per tensor and that each lies within an int32 arena.

    Where ``indices`` is not read (``listed`` is False), it may be one number that is expanded.
    """
    require(
        len(tensors) == len(offsets) == len(counts),
        f"{label}, offsets and counts must be equally long, got {len(tensors)}, {len(offsets)}, {len(counts)}",
    )
    check_index_vector(indices if listed or indices.dim() != 1 else indices[:0])
    size = indices.numel()
    for i, (offset, count) in enumerate(zip(offsets, counts)):
        if offset < 0 or count < 0 or offset + count > size:
            raise IndexError(f"segment {i} ({offset} + {count}) does not fit in an arena of {size} entries")


def check_segments(matrices: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int]) -> None:
    """Check that segments do not overlap and hold index lists. Waits for the device."""
    check_overlap(offsets, counts)
    for i, (matrix, offset, count) in enumerate(zip(matrices, offsets, counts)):
        check_index_list(indices[offset : offset + count], matrix.numel(), f"matrix {i}")


def check_overlap(offsets: Sequence[int], counts: Sequence[int]) -> None:
    """Check that segments do not overlap."""
    end = 0
    for offset, count, i in sorted(zip(offsets, counts, range(len(counts)))):
        require(
            count == 0 or offset >= end, f"segment {i} ({offset} + {count}) overlaps the segment that ends at {end}"
        )
        end = max(end, offset + count)


def check_grads(grads: Sequence[Tensor], weights: Sequence[Tensor], counts: Sequence[int], packed_grads: bool) -> None:
    """Check for gradients of one dtype on one device.

    Dense gradients have the shapes of their weights. Packed ones are as long as the index lists.
    """
    for i, (grad, weight, count) in enumerate(zip(grads, weights, counts)):
        if grad.layout != torch.strided:
            raise ValueError(f"gradient {i} must be dense (strided), got layout {grad.layout}")
        if grad.dtype not in WEIGHT_DTYPES or grad.dtype != grads[0].dtype:
            raise TypeError(f"gradient {i} must be float32, bfloat16 or float16 like the others, got {grad.dtype}")
        if grad.device != grads[0].device:
            raise ValueError(f"gradient {i} is on {grad.device}, gradient 0 on {grads[0].device}")
        if packed_grads and grad.numel() != count:
            raise ValueError(f"packed gradient {i} has {grad.numel()} entries, its index list {count}")
        if not packed_grads and grad.shape != weight.shape:
            raise ValueError(f"gradient {i} has shape {tuple(grad.shape)}, its weight {tuple(weight.shape)}")


def check_weights(weights: Sequence[Tensor], others: Sequence[Tensor], other: str, device: torch.device) -> None:
    """Check for contiguous weights of one dtype, on the device of the arenas.

    ``others`` has a tensor for each weight that must be there, too. ``other`` says what they are.
    """
    for i, (weight, beside) in enumerate(zip(weights, others)):
        if weight.layout != torch.strided:
            raise ValueError(f"weight {i} must be dense (strided), got layout {weight.layout}")
        if weight.dtype not in WEIGHT_DTYPES or weight.dtype != weights[0].dtype:
            raise TypeError(f"weight {i} must be float32, bfloat16 or float16 like the others, got {weight.dtype}")
        if not weight.is_contiguous():
            raise ValueError(f"weight {i} must be contiguous, got strides {weight.stride()}")
        if weight.device != device or beside.device != device:
            raise ValueError(f"weight {i} is on {weight.device}, its {other} on {beside.device}, indices on {device}")


def check_state(
    indices: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, births: Tensor | None
) -> None:
    """Check for moments, masters and births that are arenas of one length and of their dtypes."""
    device = indices.device
    if (exp_avg.dtype, exp_avg_sq.dtype) not in _MOMENTS:
        raise TypeError(
            "the moments exp_avg and exp_avg_sq must both be float32, both be bfloat16, or be int8 and uint8 codes, "
            f"got {exp_avg.dtype} and {exp_avg_sq.dtype}"
        )
    arenas = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master": master, "births": births}
    for label, x in arenas.items():
        if x is not None and not (x.shape == indices.shape and x.is_contiguous() and x.device == device):
            raise ValueError(
                f"{label} must be a contiguous arena of shape {tuple(indices.shape)} on {device}, got {describe(x)}"
            )
    if master is not None and master.dtype not in (torch.float32, torch.int16):
        raise TypeError(f"master must be torch.float32, or torch.int16 low halves, got {master.dtype}")
    if births is not None and births.dtype != torch.int32:
        raise TypeError(f"births must be torch.int32, got {births.dtype}")


def check_scales(
    indices: Tensor,
    offsets: Sequence[int],
    exp_avg: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
) -> None:
    """Check for scales of both moments where these are codes, and for none where they are not."""
    coded = exp_avg.dtype == torch.int8
    shape = (groups_of(indices.numel()),)
    for label, x in (("exp_avg_scale", exp_avg_scale), ("exp_avg_sq_scale", exp_avg_sq_scale)):
        if (x is not None) != coded:
            raise ValueError(f"{label} is needed for 8-bit moments, and for no others; the moments are {exp_avg.dtype}")
        if x is not None and not (x.shape == shape and x.is_contiguous() and x.device == indices.device):
            raise ValueError(f"{label} must be contiguous of shape {shape} on {indices.device}, got {describe(x)}")
        if x is not None and x.dtype != torch.float32:
            raise TypeError(f"{label} must be torch.float32, got {x.dtype}")
    for i, offset in enumerate(offsets if coded else ()):
        if offset % GROUP:
            raise ValueError(f"segment {i} starts at {offset}; with 8-bit moments it must be a multiple of {GROUP}")


def check_master(weights: Sequence[Tensor], master: Tensor | None) -> None:
    """Check that low halves of masters come with bfloat16 weights."""
    if master is not None and master.dtype == torch.int16 and weights and weights[0].dtype != torch.bfloat16:
        raise TypeError(f"a master of low halves needs bfloat16 weights, got {weights[0].dtype}")


def check_steps(steps: Tensor, n: int, device: torch.device) -> None:
    """Check for the step counts of ``n`` matrices."""
    if steps.shape != (n,) or steps.dtype != torch.float32 or steps.device != device:
        raise ValueError(f"steps must be float32 ({n},) on {device}, got {describe(steps)}")


def fast_check(
    weights: Sequence[Tensor], grads: Sequence[Tensor], counts: Sequence[int], packed_grads: bool, device: torch.device
) -> bool:
    """Return whether `check_grads` and `check_weights` would pass (in doubt, False).

    It takes a fifth of their time. Every step checks hundreds of matrices, and Python is slow when
    the caches are full of gradients.
    """
    if not weights or weights[0].dtype not in WEIGHT_DTYPES or grads[0].dtype not in WEIGHT_DTYPES:
        return False
    w_dtype, g_dtype = weights[0].dtype, grads[0].dtype
    return all(
        w.dtype is w_dtype
        and g.dtype is g_dtype
        and g.layout is torch.strided
        and w.device == device
        and g.device == device
        and w.is_contiguous()
        and (g.numel() == count if packed_grads else g.shape == w.shape)
        for w, g, count in zip(weights, grads, counts)
    )
