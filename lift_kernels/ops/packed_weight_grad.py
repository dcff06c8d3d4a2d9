"""The op behind the backward pass of a packed layer: k entries of a linear layer's weight
gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..validation import check_index_list
from . import dispatch, reference
from .checks import check_weight_grad
from .eager import skips_dispatcher


def packed_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    indices: Tensor,
    *,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The k entries at ``indices`` of a linear layer's weight gradient ``grad_output^T @ input``: a
    vector of ``dtype``.

    Args:
        grad_output: (t, m), input: (t, n), of one dtype (fp32, bf16, fp16); any strides. t may be
            0.
        indices: sorted flat positions in the m x n weight, int32; undefined out of range unless
            ``validate=True``.
        dtype: of the result, fp32 unless given.
        fused: Triton only: a product whose epilogue keeps the selected entries of each tile, in
            place of torch's product into a scratch buffer and a gather. Nothing is rounded to the
            dtype of the input in between.

    Scratch: at most 4 MiB (or one row) on the CPU, kept by each thread; on a GPU one dense
    gradient, in a buffer that all layers share on a stream. Raises ValueError, TypeError or
    IndexError with the argument's name and value.
    """
    if skips_dispatcher(grad_output, indices):
        return _weight_grad(grad_output, input, indices, dtype, fused, validate, backend)
    return torch.ops.lift_kernels.packed_weight_grad(
        grad_output, input, indices, dtype=dtype, fused=fused, validate=validate, backend=backend
    )


@torch.library.custom_op(
    "lift_kernels::packed_weight_grad",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor input, Tensor indices, *, ScalarType? dtype=None, bool fused=False, "
    "bool validate=False, str? backend=None) -> Tensor",
)
def _packed_weight_grad_op(grad_output, input, indices, *, dtype=None, fused=False, validate=False, backend=None):
    return _weight_grad(grad_output, input, indices, dtype, fused, validate, backend)


@_packed_weight_grad_op.register_fake
def _(grad_output, input, indices, *, dtype=None, fused=False, validate=False, backend=None):
    dtype = dtype or torch.promote_types(grad_output.dtype, torch.float32)
    check_weight_grad(grad_output, input, indices, dtype, backend)
    return torch.empty(indices.shape, dtype=dtype, device=indices.device)


def _weight_grad(grad_output, input, indices, dtype, fused, validate, backend):
    dtype = dtype or torch.promote_types(grad_output.dtype, torch.float32)
    check_weight_grad(grad_output, input, indices, dtype, backend)
    if validate:
        check_index_list(indices, grad_output.shape[1] * input.shape[1], "indices")
    name = dispatch.choose(backend, indices.device, "packed_weight_grad")
    if fused and name != "triton":
        raise ValueError(
            f"fused=True is a Triton kernel, and the {name} backend serves these {indices.device.type} tensors"
        )
    if name == "reference":
        return reference.packed_weight_grad_ref(grad_output, input, indices, dtype)
    out = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    if name == "triton":
        from .triton import packed_weight_grad

        way = packed_weight_grad.packed_weight_grad_triton if fused else packed_weight_grad.product_and_gather
        way(grad_output, input, indices, out)
    else:
        _native_weight_grad()(grad_output, input, indices, out)
    return out


@functools.cache
def _native_weight_grad():
    """The private op itself: looking it up by name takes as long as all else that happens here."""
    return torch.ops.lift_kernels_native.packed_weight_grad.default
