"""Argument checks that several rooms share. Each raises before anything is changed, names the
value, says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import MAX_ENTRIES, MOMENT_DTYPES, WEIGHT_DTYPES, check_index_list, require


def check_pair(
    tensor: Tensor, indices: Tensor, label: str, index_label: str = "indices", dtypes: tuple = WEIGHT_DTYPES
) -> None:
    """A tensor of a supported dtype and a contiguous int32 vector on one device."""
    require(tensor.layout == torch.strided, f"{label} must be dense (strided), got layout {tensor.layout}")
    require(
        tensor.dtype in dtypes, f"{label} must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}", TypeError
    )
    require(indices.dtype == torch.int32, f"{index_label} must be int32, got {indices.dtype}", TypeError)
    require(
        indices.dim() == 1 and indices.is_contiguous(),
        f"{index_label} must be a contiguous vector, got {tuple(indices.shape)}",
    )
    require(tensor.device == indices.device, f"{label} is on {tensor.device}, {index_label} on {indices.device}")


def check_gather(source: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
    """What `packed_gather` can check without reading a tensor."""
    check_pair(source, indices, "source")
    require(dtype in WEIGHT_DTYPES, f"dtype must be float32, bfloat16 or float16, got {dtype}", TypeError)


def check_scatter(dest: Tensor, indices: Tensor, values: Tensor) -> None:
    """What `packed_scatter_` can check without reading a tensor."""
    check_pair(dest, indices, "dest")
    check_pair(values, indices, "values")
    require(dest.is_contiguous(), f"dest must be contiguous, got strides {dest.stride()}")
    require(values.shape == indices.shape, f"values has shape {tuple(values.shape)}, indices {tuple(indices.shape)}")


def check_migrate(values: Tensor, old_indices: Tensor, new_indices: Tensor, fill_values: Tensor | None) -> None:
    """What `packed_migrate` can check without reading a tensor."""
    supported = (*MOMENT_DTYPES, torch.int32)
    check_pair(values, old_indices, "values", "old_indices", supported)
    check_pair(values, new_indices, "values", "new_indices", supported)
    require(
        values.shape == old_indices.shape,
        f"values has shape {tuple(values.shape)}, old_indices {tuple(old_indices.shape)}",
    )
    if fill_values is not None:
        check_pair(fill_values, new_indices, "fill_values", "new_indices", (values.dtype,))
        require(
            fill_values.shape == new_indices.shape,
            f"fill_values has shape {tuple(fill_values.shape)}, new_indices {tuple(new_indices.shape)}",
        )


def check_weight_grad(
    grad_output: Tensor, input: Tensor, indices: Tensor, dtype: torch.dtype, backend: str | None
) -> None:
    """What `packed_weight_grad` can check without reading a tensor. float64 is for the reference
    alone.
    """
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
        return  # as in every backward pass: the messages below take longer to build than all checks
    dtypes = (*WEIGHT_DTYPES, torch.float64) if backend == "reference" else WEIGHT_DTYPES
    check_pair(grad_output, indices, "grad_output", dtypes=dtypes)
    check_pair(input, indices, "input", dtypes=(grad_output.dtype,))
    require(
        grad_output.dim() == 2 and input.dim() == 2 and grad_output.shape[0] == input.shape[0],
        f"grad_output and input must be matrices of as many rows, got {tuple(grad_output.shape)} and "
        f"{tuple(input.shape)}",
    )
    entries = grad_output.shape[1] * input.shape[1]
    require(entries <= MAX_ENTRIES, f"a weight may have up to 2^31-1 entries, got {entries} (int32 index lists)")
    require(indices.numel() <= entries, f"indices has {indices.numel()} entries, the weight only {entries}")
    require(dtype in dtypes, f"dtype must be one of {', '.join(map(str, dtypes))}, got {dtype}", TypeError)


def check_norm(
    grads: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int], packed_grads: bool
) -> None:
    """What `packed_l2_norm` can check without reading a tensor."""
    check_arena(grads, indices, offsets, counts, "grads")
    check_grads(grads, grads, counts, packed_grads)
    for grad in grads[:1]:
        require(grad.device == indices.device, f"gradient 0 is on {grad.device}, indices on {indices.device}")


def check_topk(left: Tensor, right: Tensor, k: int, bracket: Tensor | None) -> None:
    """What `lowrank_topk` can check without reading a tensor."""
    for label, factor in (("left", left), ("right", right)):
        require(
            factor.dim() in (2, 3) and factor.dtype == torch.float32 and factor.is_contiguous(),
            f"{label} must be a contiguous float32 matrix or a batch of them, got {factor.dtype} {tuple(factor.shape)}",
        )
    require(
        left.shape[:-2] == right.shape[:-2] and left.shape[-1] == right.shape[-1] and left.shape[-1] >= 1,
        f"left and right must share a rank of at least 1, and the batch, got {tuple(left.shape)} and "
        f"{tuple(right.shape)}",
    )
    require(left.device == right.device, f"left is on {left.device}, right on {right.device}")
    m, n = left.shape[-2], right.shape[-2]
    require(m * n <= MAX_ENTRIES, f"the product may have up to 2^31-1 entries, got {m} x {n}")
    require(1 <= k <= m * n, f"k must be from 1 to {m * n}, got {k}")
    if bracket is not None:
        shape = (*left.shape[:-2], 2)
        require(
            bracket.shape == shape
            and bracket.is_contiguous()
            and bracket.dtype == torch.float32
            and bracket.device == left.device,
            f"bracket must be two float32 numbers a matrix, {shape} on {left.device}, got {tuple(bracket.shape)} "
            f"{bracket.dtype} on {bracket.device}",
        )


def check_sketch(block: Tensor, seed: int, first: int) -> None:
    """What `gaussian_sketch` can check without reading a tensor."""
    require(
        block.dtype in (torch.float32, torch.bfloat16), f"a sketch is float32 or bfloat16, got {block.dtype}", TypeError
    )
    require(
        block.dim() == 3 and block.is_contiguous(),
        f"a sketch is a contiguous (b, n, l) tensor, got {tuple(block.shape)}",
    )
    check_counter(seed, first)


def check_counter(seed: int, first: int) -> None:
    """Seed and number of the first matrix of a sketch fit the schema and the generator."""
    for label, number in (("seed", seed), ("first", first)):
        require(
            isinstance(number, int) and 0 <= number < 2**63,
            f"{label} must be an integer from 0 to 2^63-1, got {number!r}",
        )


def check_qr(block: Tensor, other: Tensor | None, rounds: int) -> None:
    """What `cholesky_qr_` can check without reading a tensor."""
    for label, x in (("block", block), ("other", other)):
        if x is None:
            continue
        require(x.dtype == torch.float32, f"{label} must be float32, got {x.dtype}", TypeError)
        require(
            x.dim() == 3 and x.is_contiguous(),
            f"{label} must be contiguous (b, n, l), got {tuple(x.shape)}, {x.stride()}",
        )
        require(x.device == block.device, f"{label} is on {x.device}, block on {block.device}")
    require(
        block.shape[1] >= block.shape[2] >= 1,
        f"{block.shape[2]} columns of {block.shape[1]} rows cannot be orthonormal: "
        "block must be (b, n, l) with n >= l >= 1",
    )
    require(
        other is None or (other.shape[0] == block.shape[0] and other.shape[2] == block.shape[2]),
        f"other must share the batch and the columns of block {tuple(block.shape)}, "
        f"got {None if other is None else tuple(other.shape)}",
    )
    require(rounds in (1, 2), f"rounds must be 1 or 2, got {rounds!r}")


def check_bitmaps(bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int) -> None:
    """What `bitmap_to_indices` can check without reading a tensor."""
    given = {
        "bitmaps": (bitmaps, torch.int32, 3),
        "candidates": (candidates, torch.int64, 2),
        "counts": (counts, torch.int32, 2),
    }
    for label, (x, dtype, dim) in given.items():
        require(x.dtype == dtype, f"{label} must be {dtype}, got {x.dtype}", TypeError)
        require(
            x.dim() == dim and x.is_contiguous(),
            f"{label} must be contiguous of {dim} dimensions, got {tuple(x.shape)}, strides {x.stride()}",
        )
        require(x.device == bitmaps.device, f"{label} is on {x.device}, bitmaps on {bitmaps.device}")
    batch, rows, words = bitmaps.shape
    require(
        isinstance(columns, int) and columns >= 1 and words == -(-columns // 32),
        f"bitmaps of {columns!r} columns must be (b, m, columns / 32, rounded up), got {tuple(bitmaps.shape)}",
    )
    require(rows * columns <= MAX_ENTRIES, f"a matrix may have up to 2^31-1 entries, got {rows} x {columns}")
    require(len(candidates) == batch, f"candidates of {batch} matrices are needed, got {tuple(candidates.shape)}")
    require(counts.shape == (batch, 2), f"counts must be ({batch}, 2), got {tuple(counts.shape)}")
    require(isinstance(k, int) and 1 <= k <= rows * columns, f"k must be from 1 to {rows * columns}, got {k!r}")


def check_edge(product: Tensor, block: Tensor, previous: Tensor | None, edge: Tensor) -> None:
    """What `chebyshev_step_` can check beyond `check_qr`."""
    for label, x in (("product", product), ("previous", previous)):
        good = x is None or (
            x.shape == block.shape and x.dtype == torch.float32 and x.is_contiguous() and x.device == block.device
        )
        require(
            good,
            f"{label} must be contiguous float32 {tuple(block.shape)} on {block.device} like block, "
            f"got {None if x is None else (x.dtype, tuple(x.shape), str(x.device))}",
        )
    require(
        edge.shape == block.shape[:1]
        and edge.dtype == torch.float32
        and edge.device == block.device
        and edge.is_contiguous(),
        f"edge must be contiguous float32 ({len(block)},) on {block.device}, "
        f"got {edge.dtype} {tuple(edge.shape)}, strides {edge.stride()}, on {edge.device}",
    )


def check_arena(
    tensors: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int], label: str
) -> None:
    """Segments, one per tensor, that lie within an int32 arena."""
    require(
        len(tensors) == len(offsets) == len(counts),
        f"{label}, offsets and counts must be equally long, got {len(tensors)}, {len(offsets)}, {len(counts)}",
    )
    require(indices.dtype == torch.int32, f"indices must be int32, got {indices.dtype}", TypeError)
    require(
        indices.dim() == 1 and indices.is_contiguous(),
        f"indices must be a contiguous vector, got {tuple(indices.shape)}",
    )
    size = indices.numel()
    for i, (offset, count) in enumerate(zip(offsets, counts)):
        if offset < 0 or count < 0 or offset + count > size:
            raise IndexError(f"segment {i} ({offset} + {count}) does not fit in an arena of {size} entries")


def check_segments(matrices: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int]) -> None:
    """Every segment is an index list of its matrix and no one else's. Waits for the device."""
    end = 0
    for offset, count, i in sorted(zip(offsets, counts, range(len(counts)))):
        require(
            count == 0 or offset >= end, f"segment {i} ({offset} + {count}) begins before its neighbour ends at {end}"
        )
        end = max(end, offset + count)
    for i, (matrix, offset, count) in enumerate(zip(matrices, offsets, counts)):
        check_index_list(indices[offset : offset + count], matrix.numel(), f"matrix {i}")


def check_grads(grads: Sequence[Tensor], weights: Sequence[Tensor], counts: Sequence[int], packed_grads: bool) -> None:
    """Gradients of one dtype on one device: dense and shaped like the weights, or vectors as long
    as the index lists.
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
    """Contiguous weights of one dtype, on the arenas' device like their gradients."""
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
    """Whether `check_grads` and `check_weights` would pass, in a fifth of their time; in doubt
    False.

    Hundreds of matrices pass at every step, and Python is slow when the caches are full of
    gradients.
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
    """Everything `sparse_adamw_` can check without reading a tensor."""
    require(len(grads) == len(weights), f"got {len(weights)} weights and {len(grads)} gradients")
    check_arena(weights, indices, offsets, counts, "weights")
    if not fast_check(weights, grads, counts, packed_grads, indices.device):
        check_grads(grads, weights, counts, packed_grads)
        check_weights(weights, grads, indices.device)
    require(
        exp_avg.dtype == exp_avg_sq.dtype and exp_avg.dtype in MOMENT_DTYPES,
        f"moments must both be float32 or bfloat16, got {exp_avg.dtype} and {exp_avg_sq.dtype}",
        TypeError,
    )
    arenas = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master": master, "births": births}
    for label, arena in arenas.items():
        if arena is not None:
            require(
                arena.shape == indices.shape and arena.is_contiguous() and arena.device == indices.device,
                f"{label} must be a contiguous arena of shape {tuple(indices.shape)} on {indices.device}, "
                f"got {tuple(arena.shape)} on {arena.device}",
            )
    for label, tensor, dtype in (
        ("master", master, torch.float32),
        ("births", births, torch.int32),
        ("inv_scale", inv_scale, torch.float32),
        ("found_inf", found_inf, torch.float32),
    ):
        if tensor is not None:
            require(tensor.dtype == dtype, f"{label} must be {dtype}, got {tensor.dtype}", TypeError)
    for label, number in (("inv_scale", inv_scale), ("found_inf", found_inf)):
        if number is not None:
            require(
                number.numel() == 1 and number.device == indices.device,
                f"{label} must be one number on {indices.device}, got {tuple(number.shape)} on {number.device}",
            )
    require(
        lr.numel() == 1 and lr.device.type in (indices.device.type, "cpu"),
        f"lr must be one number on {indices.device} or the CPU, got {tuple(lr.shape)} on {lr.device}",
    )
    require(
        steps.shape == (len(weights),) and steps.dtype == torch.float32 and steps.device == indices.device,
        f"steps must be ({len(weights)},) float32 on {indices.device}, got {tuple(steps.shape)} {steps.dtype} "
        f"on {steps.device}",
    )
    if stochastic and weights:
        require(
            master is None and weights[0].dtype != torch.float32,
            "stochastic rounding needs bfloat16 or float16 weights and no master",
        )
