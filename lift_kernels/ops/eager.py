"""What ops share when they run eagerly: a dispatcher bypass and row-major gradients."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.compiler import is_compiling

logger = logging.getLogger("lift_kernels")

_strided_logged = False

active_modes = torch._C._len_torch_dispatch_stack  # of tracers, such as make_fx; not a Python function


def row_major(grad: Tensor) -> Tensor:
    """Return ``grad`` in row-major order, copied if necessary. The first copy is logged."""
    if grad.is_contiguous():
        return grad
    global _strided_logged
    if not _strided_logged:
        _strided_logged = True
        logger.warning(
            "a gradient of shape %s has strides %s: it is copied to row-major order at every step",
            tuple(grad.shape),
            grad.stride(),
        )
    return grad.contiguous()


def skips_dispatcher(*tensors: Tensor) -> bool:
    """Return whether a call may skip the dispatcher.

    It may when all tensors are plain and nothing is recorded, traced or transformed. The
    dispatcher's Python layers cost 0.1 to 0.3 ms per call when the caches are cold.
    """
    if torch.is_grad_enabled() or is_compiling() or active_modes() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors)
