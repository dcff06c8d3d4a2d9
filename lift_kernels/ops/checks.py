"""Argument checks of the ops.

Each check raises before anything is changed. Its message names the argument, its value and what is
needed. No check here reads the contents of a tensor. `arena_checks` has the checks of the ops that
work on the arenas of many matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import MAX_ENTRIES, MOMENT_DTYPES, WEIGHT_DTYPES, require


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


def check_topk(left: Tensor, right: Tensor, k: int, bracket: Tensor | None) -> None:
    """Check the arguments of `lowrank_topk`."""
    for label, factor in (("left", left), ("right", right)):
        if factor.dim() not in (2, 3) or factor.dtype != torch.float32 or not factor.is_contiguous():
            raise ValueError(f"{label} must be a contiguous float32 matrix or a batch of them, got {describe(factor)}")
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-1] or left.shape[-1] < 1:
        raise ValueError(
            f"left and right must have the same batch size and the same rank of at least 1, got {tuple(left.shape)} "
            f"and {tuple(right.shape)}"
        )
    if left.device != right.device:
        raise ValueError(f"left is on {left.device}, right on {right.device}")
    m, n = left.shape[-2], right.shape[-2]
    if m * n > MAX_ENTRIES:
        raise ValueError(f"the product may have up to 2^31-1 entries, got {m} x {n}")
    if not 1 <= k <= m * n:
        raise ValueError(f"k must be from 1 to {m * n}, got {k}")
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
