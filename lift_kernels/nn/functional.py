"""The autograd Function of a packed linear layer.

Its backward computes only the k selected entries of the weight gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .. import ops

_NO_SECOND = (
    "the backward pass of a LiftLinear cannot be differentiated again or transformed (create_graph=True, torch.func); "
    "lift_kernels.unpack(model) gives the plain model, which can"
)


class LiftLinearFunction(torch.autograd.Function):
    """y = x W^T + b with a packed weight gradient.

    Differentiable in x (..., n), values (k,) and bias (m,). ``values`` only receives a gradient:
    its numbers are not read. ``weight`` is (m, n), or (n, m) with ``transposed``, and is cast to
    the dtype ``compute``.
    """

    # One function and no setup_context: torch would bind the arguments by their signature at every
    # call, which takes longer than the product of a small layer.
    @staticmethod
    def forward(ctx, x, values, weight, bias, indices, transposed, compute, backend):
        ctx.transposed, ctx.compute, ctx.backend, ctx.dtype = transposed, compute, backend, values.dtype
        if values.dtype != torch.float32:
            ctx.values = values
        needs_x, needs_values = ctx.needs_input_grad[:2]
        # Only what backward reads is saved. Autograd notices a refresh between the passes, because
        # the index list is among it.
        ctx.save_for_backward(
            x if needs_values else None, weight if needs_x else None, indices if needs_values else None
        )
        if weight.dtype != compute:
            weight = weight.to(compute)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(_NO_SECOND)
        x, weight, indices = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = weight if weight.dtype == ctx.compute else weight.to(ctx.compute)
            weight = weight.t() if ctx.transposed else weight
            grad_x = torch.mm(grad, weight).view(*grad_output.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            flat = x.reshape(-1, x.shape[-1])
            rows, columns = (flat, grad) if ctx.transposed else (grad, flat)
            dtype = ctx.dtype if ctx.dtype == torch.float32 else _sum_dtype(ctx.values)
            grad_values = ops.packed_weight_grad(rows, columns, indices, dtype=dtype, backend=ctx.backend)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, None, grad_bias, None, None, None, None


def _sum_dtype(values: Tensor) -> torch.dtype:
    """The dtype of the next gradient of bf16 ``values``.

    A first gradient is bf16. Further ones are added to it in fp32, and it becomes fp32 for that.
    DistributedDataParallel takes gradients of the dtype of its buckets alone.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if values.grad is None or several or torch.compiler.is_compiling():
        return values.dtype
    values.grad = values.grad.float()
    return torch.float32


def lift_linear(
    x: Tensor,
    values: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x W^T + b, whose weight gradient is computed at the k trained entries only.

    Honours autocast.

    Args:
        x: (..., n).
        values: (k,) fp32 or bf16; it receives the gradient, and its numbers are not read.
        weight: (m, n), which holds the values at ``indices``; (n, m) with ``transposed``.
        indices: (k,) int32, sorted flat positions; trusted, as everywhere in a step.
        bias: (m,), or None.
        transposed: compute x W + b, as transformers' Conv1D does.
        backend: of the weight gradient; None for the fastest usable one.

    Returns:
        (..., m), in the dtype of the weight or of autocast.

    Raises ValueError when ``values`` and ``indices`` are not equally long, and RuntimeError under
    forward-mode differentiation.
    """
    if values.shape != indices.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}, its index list {tuple(indices.shape)}")
    if not torch.compiler.is_compiling():
        # A custom jvp or vmap that raises would break torch.compile.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(_NO_SECOND)
    device = x.device.type
    compute = weight.dtype
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        compute = torch.get_autocast_dtype(device)
        x = x.to(compute)
        bias = bias if bias is None else bias.to(compute)
    return LiftLinearFunction.apply(x, values, weight, bias, indices, transposed, compute, backend)
