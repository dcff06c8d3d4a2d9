"""The public op behind the backward pass of a packed layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..validation import check_index_list
from . import dispatch, reference
from .checks import check_weight_grad
from .dispatch import native_op
from .eager import active_modes, skips_dispatcher
from .packed_ops import kernel


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
    """Compute selected entries of the weight gradient of a linear layer.

    The gradient is ``grad_output^T @ input``, of which only k entries are kept. On the CPU each
    thread keeps a scratch buffer of at most 4 MiB, or of one row if that is larger. On a GPU one
    dense gradient exists within a call.

    Args:
        grad_output: (t, m) float32, bfloat16 or float16, for t >= 0 tokens. Any strides.
        input: (t, n) of the same dtype. Any strides.
        indices: (k,) int32, contiguous, sorted flat positions in the m x n weight, with
            m * n < 2^31.
        dtype: of the result, float32, bfloat16 or float16. None is float32.
        fused: only for the Triton backend. One kernel keeps the selected entries of each tile of
            the product, in place of torch's product and a gather. It needs no dense gradient, only
            a bit for each entry of the weight, and does not round to the dtype of ``input`` in
            between.
        validate: check that ``indices`` is sorted, unique and in range, which waits for the device.
            Without it, positions out of range are undefined behavior.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        (k,) vector of ``dtype``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: an argument has a wrong shape, layout or device, or ``fused`` is set and another
            backend than Triton runs the op.
        IndexError: ``validate`` found a position out of range.
        RuntimeError: the backend cannot run here.
    """
    ordinary = backend is None and not fused and not validate and type(grad_output) is Tensor is type(indices)
    if ordinary and indices.is_cpu and not torch.is_grad_enabled() and not is_compiling() and active_modes() == 0:
        if native := native_op("packed_weight_grad"):
            # The usual backward pass on a CPU runs no Python code of another module but the checks.
            dtype = dtype or torch.promote_types(grad_output.dtype, torch.float32)
            check_weight_grad(grad_output, input, indices, dtype, None)
            out = torch.empty(indices.shape, dtype=dtype, device=indices.device)
            native(grad_output, input, indices, out)
            return out
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
            f"fused=True needs the triton backend, but the {name} backend runs on these {indices.device.type} "
            "tensors; pass fused=False"
        )
    if name == "reference":
        return reference.packed_weight_grad_ref(grad_output, input, indices, dtype)
    out = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    if fused:
        from .triton.packed_weight_grad import packed_weight_grad_triton

        packed_weight_grad_triton(grad_output, input, indices, out)
    elif name == "triton":
        _product_and_gather(grad_output, input, indices, out, backend)
    else:
        torch.ops.lift_kernels_native.packed_weight_grad.default(grad_output, input, indices, out)
    return out


def _product_and_gather(grad_output: Tensor, input: Tensor, indices: Tensor, out: Tensor, backend: str | None) -> None:
    """Fill ``out`` from torch's dense product, without changing a bit.

    The allocator hands the memory of the product on to the next layer.
    """
    if indices.numel() == 0:
        return
    gather = kernel(dispatch.choose(backend, indices.device, "packed_gather"), "packed_gather")
    gather(torch.mm(grad_output.t(), input), indices, out)
