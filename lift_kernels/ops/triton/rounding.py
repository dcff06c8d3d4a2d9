"""Device functions that widen storage formats to fp32 and round fp32 to them.

A format is named by the element type of its pointer: ``tl.float32``, ``tl.float16``, or
``tl.int16`` for bf16 patterns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor as kernels take it: bf16 as int16 bit patterns, others unchanged."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def widen(x):
    """Return the exact fp32 values of a block in any storage format."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, FORMAT: tl.constexpr):
    """Round fp32 ``x`` to nearest even in a storage format.

    In bf16 any NaN becomes the quiet NaN 0x7FC0, as in torch.
    """
    if FORMAT == tl.int16:
        pattern = x.to(tl.uint32, bitcast=True)
        pattern = tl.where(x == x, (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16, 0x7FC0)
        return pattern.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return x.to(FORMAT)


@triton.jit
def narrow_stochastic(x, noise, FORMAT: tl.constexpr):
    """Round fp32 ``x`` down or up to bf16 or fp16 by uniform uint32 ``noise``.

    Values that are not finite are rounded to nearest.
    """
    pattern = x.to(tl.uint32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    if FORMAT == tl.int16:
        rounded = ((pattern + (noise & 0xFFFF)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        return tl.where(finite, rounded, narrow(x, FORMAT))
    else:
        normal = ((pattern + (noise & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 fp16 is a fixed-point format with quantum 2^-24. There x * 2^24 is exact.
        magnitude = tl.abs(x)
        scaled = tl.floor(magnitude * 16777216.0 + (noise >> 8).to(tl.float32) * 5.9604644775390625e-08)
        scaled = scaled * 5.9604644775390625e-08
        signed = (scaled.to(tl.uint32, bitcast=True) | (pattern & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(magnitude < 6.103515625e-05, signed, normal)
        return tl.where(finite, rounded, x).to(FORMAT)


@triton.jit
def counter_hash(x):
    """Mix uint32 counters with the bits of `lift_kernels.ops.reference.counter_hash`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
