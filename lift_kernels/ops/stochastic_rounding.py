"""Stochastic rounding of weights, by noise that is a function of seed, step and arena position.

Like `reference`, this is specification: plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def counter_hash(x: Tensor) -> Tensor:
    """Mix the bits of uint32 values, held in int64, by a bijection.

    The constants are those of C. Wellons' lowbias32. A product of two 32-bit numbers may wrap in
    int64, but only its low 32 bits are kept, and they stay right.
    """
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def stochastic_key(steps: Tensor, seed: int) -> Tensor:
    """Return one 32-bit key, held in int64, per step count.

    So the noise of a step is a function of seed, step and arena position alone.
    """
    return counter_hash(counter_hash(torch.full_like(steps, seed, dtype=torch.int64)) ^ steps.long())


def round_stochastic_ref(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 ``x`` down or up to bf16 or fp16, with probability by distance.

    ``noise`` is uniform uint32. Values that are not finite are rounded to nearest, so that NaN and
    infinity stay what they are.
    """
    bits = x.view(torch.int32).long() & _MASK32
    if dtype == torch.bfloat16:
        rounded = _from_bits(bits + (noise & 0xFFFF) & 0xFFFF0000)
    elif dtype == torch.float16:
        normal = _from_bits(bits + (noise & 0x1FFF) & 0xFFFFE000)
        # Below 2^-14 fp16 is a fixed-point format with quantum 2^-24. There x * 2^24 is exact.
        scaled = (x.abs() * 2.0**24 + (noise >> 8).float() * 2.0**-24).floor() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(scaled, x), normal)
    else:
        raise ValueError(f"stochastic rounding needs bfloat16 or float16 weights, got {dtype}")
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _from_bits(bits: Tensor) -> Tensor:
    """Return the fp32 values of uint32 bit patterns held in int64."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
