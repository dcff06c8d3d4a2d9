"""Argument checks of the ops.

Each check raises before anything is changed. Its message names the argument, its value and what is
needed. Only `check_segments` reads the contents of a tensor, so only it waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import MAX_ENTRIES, MOMENT_DTYPES, WEIGHT_DTYPES, check_index_list, require


def describe(tensor: Tensor) -> str:
    """Return the dtype, shape, strides and device of a tensor, for an error message."""
    layout = f"strides {tensor.stride()}" if tensor.layout == torch.strided else f"layout {tensor.layout}"
    return f"{tensor.dtype} {tuple(tensor.shape)}, {layout}, on {tensor.device}"


def check_index_vector(indices: Tensor, label: str = "indices") -> None:
    """Check that an index list is a contiguous int32 vector."""
    if indices.dtype != torch.int32:
        raise TypeError(f"{label} must be int32, got {indices.dtype}")
    if indices.dim() != 1 or not indices.is_contiguous():
        raise ValueError(f"{label} must be a contiguous vector, got {tuple(indices.shape)}")


def check_pair(
    tensor: Tensor, indices: Tensor, label: str, index_label: str = "indices", dtypes: tuple = WEIGHT_DTYPES
) -> None:
    """Check for a tensor of a supported dtype and an index list on one device."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{label} must be dense (strided), got layout {tensor.layout}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{label} must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    check_index_vector(indices, index_label)
    require(tensor.device == indices.device, f"{label} is on {tensor.device}, {index_label} on {indices.device}")


def check_same_shape(tensor: Tensor, label: str, expected: Tensor, expected_label: str) -> None:
    """Check that two arguments have one shape."""
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{label} has shape {tuple(tensor.shape)}, {expected_label} {tuple(expected.shape)}: they must be equal"
        )


def check_float32(tensor: Tensor, label: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Check for a contiguous float32 tensor of the given shape and device."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(f"{label} must be contiguous float32 {tuple(shape)} on {device}, got {describe(tensor)}")


def check_block(block: Tensor, label: str) -> None:
    """Check for a contiguous batch of matrices."""
    if block.dim() != 3 or not block.is_contiguous():
        raise ValueError(f"{label} must be contiguous (b, n, l), got {describe(block)}")


def check_gather(source: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
    """Check the arguments of `packed_gather`."""
    check_pair(source, indices, "source")
    require(dtype in WEIGHT_DTYPES, f"dtype must be float32, bfloat16 or float16, got {dtype}", TypeError)


def check_scatter(dest: Tensor, indices: Tensor, values: Tensor) -> None:
    """Check the arguments of `packed_scatter_`."""
    check_pair(dest, indices, "dest")
    check_pair(values, indices, "values")
    require(dest.is_contiguous(), f"dest must be contiguous, got strides {dest.stride()}")
    check_same_shape(values, "values", indices, "indices")


def check_migrate(values: Tensor, old_indices: Tensor, new_indices: Tensor, fill_values: Tensor | None) -> None:
    """Check the arguments of `packed_migrate`."""
    supported = (*MOMENT_DTYPES, torch.int32)
    check_pair(values, old_indices, "values", "old_indices", supported)
    check_pair(values, new_indices, "values", "new_indices", supported)
    check_same_shape(values, "values", old_indices, "old_indices")
    if fill_values is not None:
        check_pair(fill_values, new_indices, "fill_values", "new_indices", (values.dtype,))
        check_same_shape(fill_values, "fill_values", new_indices, "new_indices")


def check_weight_grad(
    grad_output: Tensor, input: Tensor, indices: Tensor, dtype: torch.dtype, backend: str | None
) -> None:
    """Check the arguments of `packed_weight_grad`. Only the reference backend takes float64."""
    if (
        grad_output.dtype == input.dtype
        and grad_output.dtype in WEIGHT_DTYPES
        and dtype in WEIGHT_DTYPES
        and grad_output.layout == input.layout == torch.strided
        and grad_output.dim() == 2 == input.dim()
        and indices.dtype == torch.int32
        and indices.dim() == 1
        and indices.is_contiguous()
        and grad_output.device == input.device == indices.device
        and grad_output.shape[0] == input.shape[0]
        and indices.numel() <= grad_output.shape[1] * input.shape[1] <= MAX_ENTRIES
    ):
        return  # the usual case: building the messages below would take longer than all the checks
    dtypes = (*WEIGHT_DTYPES, torch.float64) if backend == "reference" else WEIGHT_DTYPES
    check_pair(grad_output, indices, "grad_output", dtypes=dtypes)
    check_pair(input, indices, "input", dtypes=(grad_output.dtype,))
    require(
        grad_output.dim() == 2 and input.dim() == 2 and grad_output.shape[0] == input.shape[0],
        f"grad_output and input must be matrices with the same number of rows, got {tuple(grad_output.shape)} "
        f"and {tuple(input.shape)}",
    )
    entries = grad_output.shape[1] * input.shape[1]
    require(entries <= MAX_ENTRIES, f"a weight may have up to 2^31-1 entries, got {entries} (int32 index lists)")
    require(indices.numel() <= entries, f"indices has {indices.numel()} entries, the weight only {entries}")
    require(dtype in dtypes, f"dtype must be one of {', '.join(map(str, dtypes))}, got {dtype}", TypeError)


def check_norm(
    grads: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int], packed_grads: bool
) -> None:
    """Check the arguments of `packed_l2_norm`."""
    check_arena(grads, indices, offsets, counts, "grads")
    check_grads(grads, grads, counts, packed_grads)
    for grad in grads[:1]:
        require(grad.device == indices.device, f"gradient 0 is on {grad.device}, indices on {indices.device}")


def check_topk(left: Tensor, right: Tensor, k: int, bracket: Tensor | None) -> None:
    """Check the arguments of `lowrank_topk`."""
    for label, factor in (("left", left), ("right", right)):
        if factor.dim() not in (2, 3) or factor.dtype != torch.float32 or not factor.is_contiguous():
            raise ValueError(f"{label} must be a contiguous float32 matrix or a batch of them, got {describe(factor)}")
    require(
        left.shape[:-2] == right.shape[:-2] and left.shape[-1] == right.shape[-1] and left.shape[-1] >= 1,
        f"left and right must have the same batch size and the same rank of at least 1, got {tuple(left.shape)} "
        f"and {tuple(right.shape)}",
    )
    require(left.device == right.device, f"left is on {left.device}, right on {right.device}")
    m, n = left.shape[-2], right.shape[-2]
    require(m * n <= MAX_ENTRIES, f"the product may have up to 2^31-1 entries, got {m} x {n}")
    require(1 <= k <= m * n, f"k must be from 1 to {m * n}, got {k}")
    if bracket is not None:
        check_float32(bracket, "bracket", (*left.shape[:-2], 2), left.device)


def check_sketch(block: Tensor, seed: int, first: int) -> None:
    """Check the arguments of `gaussian_sketch_`."""
    if block.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the dtype of a sketch must be float32 or bfloat16, got {block.dtype}")
    check_block(block, "block")
    check_counter(seed, first)


def check_counter(seed: int, first: int) -> None:
    """Check that the seed and the first matrix number of a sketch fit the schema and Philox."""
    for label, number in (("seed", seed), ("first", first)):
        require(
            isinstance(number, int) and 0 <= number < 2**63,
            f"{label} must be an integer from 0 to 2^63-1, got {number!r}",
        )


def check_qr(block: Tensor, other: Tensor | None, rounds: int) -> None:
    """Check the arguments of `cholesky_qr_`."""
    for label, x in (("block", block), ("other", other)):
        if x is None:
            continue
        require(x.dtype == torch.float32, f"{label} must be float32, got {x.dtype}", TypeError)
        check_block(x, label)
        require(x.device == block.device, f"{label} is on {x.device}, block on {block.device}")
    require(
        block.shape[1] >= block.shape[2] >= 1,
        f"{block.shape[2]} columns of {block.shape[1]} rows cannot be orthonormal: "
        "block must be (b, n, l) with n >= l >= 1",
    )
    require(
        other is None or (other.shape[0] == block.shape[0] and other.shape[2] == block.shape[2]),
        f"other must have the batch size and the columns of block {tuple(block.shape)}, "
        f"got {None if other is None else tuple(other.shape)}",
    )
    require(rounds in (1, 2), f"rounds must be 1 or 2, got {rounds!r}")


def check_bitmaps(bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int) -> None:
    """Check the arguments of `bitmap_to_indices`."""
    given = {
        "bitmaps": (bitmaps, torch.int32, 3),
        "candidates": (candidates, torch.int64, 2),
        "counts": (counts, torch.int32, 2),
    }
    for label, (x, dtype, dim) in given.items():
        require(x.dtype == dtype, f"{label} must be {dtype}, got {x.dtype}", TypeError)
        require(
            x.dim() == dim and x.is_contiguous(),
            f"{label} must be contiguous with {dim} dimensions, got {tuple(x.shape)}, strides {x.stride()}",
        )
        require(x.device == bitmaps.device, f"{label} is on {x.device}, bitmaps on {bitmaps.device}")
    batch, rows, words = bitmaps.shape
    require(
        isinstance(columns, int) and columns >= 1 and words == -(-columns // 32),
        f"bitmaps of {columns!r} columns must be (b, m, ceil(columns / 32)), got {tuple(bitmaps.shape)}",
    )
    require(rows * columns <= MAX_ENTRIES, f"a matrix may have up to 2^31-1 entries, got {rows} x {columns}")
    require(len(candidates) == batch, f"candidates must be ({batch}, capacity), got {tuple(candidates.shape)}")
    require(counts.shape == (batch, 2), f"counts must be ({batch}, 2), got {tuple(counts.shape)}")
    require(isinstance(k, int) and 1 <= k <= rows * columns, f"k must be from 1 to {rows * columns}, got {k!r}")


def check_edge(product: Tensor, block: Tensor, previous: Tensor | None, edge: Tensor) -> None:
    """Check the arguments of `chebyshev_step_` that `check_qr` does not cover."""
    check_float32(product, "product", block.shape, block.device)
    if previous is not None:
        check_float32(previous, "previous", block.shape, block.device)
    check_float32(edge, "edge", block.shape[:1], block.device)


def check_arena(
    tensors: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int], label: str
) -> None:
    """Check that there is one segment per tensor and that each lies within an int32 arena."""
    require(
        len(tensors) == len(offsets) == len(counts),
        f"{label}, offsets and counts must be equally long, got {len(tensors)}, {len(offsets)}, {len(counts)}",
    )
    check_index_vector(indices)
    size = indices.numel()
    for i, (offset, count) in enumerate(zip(offsets, counts)):
        if offset < 0 or count < 0 or offset + count > size:
            raise IndexError(f"segment {i} ({offset} + {count}) does not fit in an arena of {size} entries")


def check_segments(matrices: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int]) -> None:
    """Check that segments do not overlap and hold index lists. Waits for the device."""
    end = 0
    for offset, count, i in sorted(zip(offsets, counts, range(len(counts)))):
        require(
            count == 0 or offset >= end, f"segment {i} ({offset} + {count}) overlaps the segment that ends at {end}"
        )
        end = max(end, offset + count)
    for i, (matrix, offset, count) in enumerate(zip(matrices, offsets, counts)):
        check_index_list(indices[offset : offset + count], matrix.numel(), f"matrix {i}")


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


def check_weights(weights: Sequence[Tensor], grads: Sequence[Tensor], device: torch.device) -> None:
    """Check for contiguous weights of one dtype, on the device of the arenas and gradients."""
    for i, (weight, grad) in enumerate(zip(weights, grads)):
        if weight.dtype not in WEIGHT_DTYPES or weight.dtype != weights[0].dtype:
            raise TypeError(f"weight {i} must be float32, bfloat16 or float16 like the others, got {weight.dtype}")
        if not weight.is_contiguous():
            raise ValueError(f"weight {i} must be contiguous, got strides {weight.stride()}")
        if weight.device != device or grad.device != device:
            raise ValueError(f"weight {i} is on {weight.device}, its gradient on {grad.device}, indices on {device}")


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
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    packed_grads: bool,
    stochastic: bool,
) -> None:
    """Check the arguments of `sparse_adamw_`."""
    device = indices.device
    if len(grads) != len(weights):
        raise ValueError(f"every weight needs a gradient, got {len(weights)} weights and {len(grads)} gradients")
    check_arena(weights, indices, offsets, counts, "weights")
    if not fast_check(weights, grads, counts, packed_grads, device):
        check_grads(grads, weights, counts, packed_grads)
        check_weights(weights, grads, device)
    if exp_avg.dtype != exp_avg_sq.dtype or exp_avg.dtype not in MOMENT_DTYPES:
        raise TypeError(
            f"the moments exp_avg and exp_avg_sq must both be float32 or both be bfloat16, got {exp_avg.dtype} "
            f"and {exp_avg_sq.dtype}"
        )
    arenas = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master": master, "births": births}
    for label, x in arenas.items():
        if x is not None and not (x.shape == indices.shape and x.is_contiguous() and x.device == device):
            raise ValueError(
                f"{label} must be a contiguous arena of shape {tuple(indices.shape)} on {device}, got {describe(x)}"
            )
    numbers = {"inv_scale": inv_scale, "found_inf": found_inf}
    for label, x in {"master": master, "births": births, **numbers}.items():
        dtype = torch.int32 if label == "births" else torch.float32
        if x is not None and x.dtype != dtype:
            raise TypeError(f"{label} must be {dtype}, got {x.dtype}")
    for label, x in numbers.items():
        if x is not None and (x.numel() != 1 or x.device != device):
            raise ValueError(f"{label} must be one number on {device}, got {tuple(x.shape)} on {x.device}")
    require(
        lr.numel() == 1 and lr.device.type in (device.type, "cpu"),
        f"lr must be one number on {device} or the CPU, got {tuple(lr.shape)} on {lr.device}",
    )
    if steps.shape != (len(weights),) or steps.dtype != torch.float32 or steps.device != device:
        raise ValueError(f"steps must be float32 ({len(weights)},) on {device}, got {describe(steps)}")
    if stochastic and weights and (master is not None or weights[0].dtype == torch.float32):
        raise ValueError("stochastic rounding needs bfloat16 or float16 weights and no master")
