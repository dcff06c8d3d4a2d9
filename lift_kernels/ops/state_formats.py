"""How moments and masters are stored in fewer bytes: 8-bit codes, and low halves of masters.

Like `reference`, this is specification: plain PyTorch, slow and obvious. Each kernel does the same
arithmetic in fp32 in the same order, so it writes the same codes.

*8-bit moments.* A group is 32 entries in a row, from the start of a matrix's segment on. It has one
fp32 scale for each moment. The first moment is ``code**3 * scale`` with codes of -127 to 127. The
*root* of the second moment, its square root, is ``code**3 * scale`` with codes of 0 to 255. The
entry that is largest in its group has the largest code, so it keeps its value. Cubes give small
entries almost the relative precision of large ones: rows of one matrix may differ in scale by a
hundred, and an entry that has just come in has a hundredth of the others' second moment.

- A root that is not zero never gets code 0. Decoded to zero, it would divide by eps.
- Roots are rounded up or down by a `dither`. With a beta2 of 0.999 a root changes by a twentieth of
  the distance of two codes in a step. Rounded to nearest, it would never change at all.
- A group in which something is not finite gets the scale NaN, so that all of it becomes NaN.

*Split masters.* A bf16 weight is its fp32 master rounded to nearest even. So the weight and the low
16 bits of the master give the master back, see `join_master`.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Entries that share a scale."""
FIRST_TOP, ROOT_TOP = 127, 255
"""The largest codes of first moments and of roots. Their cubes are exact in fp32."""
_SMALLEST = 2.0**-100  # the largest entry of a group below which its codes are all 0
_MASK32 = 0xFFFFFFFF


def encode_first(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (k,) int8 and scales (groups,) fp32 of first moments (k,) fp32.

    Each is rounded to the nearest code.
    """
    scaled, scales = _scaled(moment.abs(), FIRST_TOP)
    code = (cube_root(scaled) + 0.5).int()
    return torch.where(moment < 0, -code, code).to(torch.int8), scales


def encode_root(root: Tensor, up: Tensor | float = 0.5) -> tuple[Tensor, Tensor]:
    """Return codes (k,) uint8 and scales (groups,) fp32 of roots (k,) fp32.

    Args:
        up: numbers in [0, 1), (k,) or one for all. A root at the share s of the way from one code
            to the next is rounded up where ``s + up >= 1``.
    """
    scaled, scales = _scaled(root, ROOT_TOP)
    code = cube_root(scaled).int()
    below = code.float()
    distance = 3.0 * below * (below + 1.0) + 1.0  # to the next cube
    code = code + (scaled - below * below * below >= (1.0 - up) * distance).int()
    code = torch.where(root > 0, code.clamp(1, ROOT_TOP), torch.zeros_like(code))
    return code.to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return what codes (k,) and their scales (groups,) stand for, (k,) fp32: moments or roots."""
    code = codes.float()
    return code * code * code * scales.repeat_interleave(GROUP)[: codes.numel()]


def groups_of(entries: int) -> int:
    """Return the number of groups of a segment."""
    return (entries + GROUP - 1) // GROUP


def dither(positions: Tensor, step: int) -> Tensor:
    """Return fp32 numbers in [0, 1) for arena positions (k,) int64 and a step count.

    They are the fractional parts of a R2 sequence (M. Roberts 2018). Those of one position are
    spread more evenly over the steps than random ones, so that rounding errors hardly add up.
    """
    word = (positions * 0xC13FA9A9 + step * 0x91E10DA5) & _MASK32
    return (word >> 8).float() * 2.0**-24


def cube_root(x: Tensor) -> Tensor:
    """Return the cube roots of fp32 ``x``, 2^-60 to 2^24, with a relative error below 2^-14.

    An integer operation on the bits guesses the reciprocal root, and two Newton steps follow. There
    is no division.
    """
    root = (0x54A2FA8C - (x.view(torch.int32).float() * (1 / 3)).int()).view(torch.float32)
    third = x * (1 / 3)
    for _ in range(2):
        root = root * (4 / 3 - third * (root * root * root))
    return x * (root * root)


def _scaled(magnitude: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return magnitudes on the scale of cubes of codes, and the scales of the groups."""
    cube, k = top**3, magnitude.numel()
    padded = magnitude.new_zeros(groups_of(k) * GROUP)
    padded[:k] = magnitude
    largest = padded.view(-1, GROUP).amax(1)
    coded = largest >= _SMALLEST
    scales = torch.where(coded, largest * (1 / cube), 0.0)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    factor = torch.where(coded, torch.full_like(largest, cube) / largest, 0.0)  # rounded once
    scaled = magnitude * factor.repeat_interleave(GROUP)[:k]
    # What is smaller or NaN has code 0 or 1 anyway. The cube root of 0 would overflow to NaN.
    return torch.where(scaled > 2.0**-60, scaled, 2.0**-60), scales


def split_master(master: Tensor) -> Tensor:
    """Return the low halves (k,) int16 that are kept of fp32 masters (k,) beside bf16 weights.

    Where the low half is 0x8000, the master lies in the middle of two bf16 values, and both of its
    neighbors round to the even one. So the half says which: 0x8000 that the weight is below. Where
    it is above, 0x8001 is kept, and the master has grown by one fp32 ulp.
    """
    bits = master.view(torch.int32)
    low, above = bits & 0xFFFF, bits >> 16 & 1 == 1
    low = torch.where((low == 0x8000) & above, 0x8001, low)
    return torch.where(low >= 0x8000, low - 0x10000, low).to(torch.int16)


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 masters (k,) of bf16 weights (k,) and their low halves (k,) int16.

    A weight that was set to zero from outside may have a low half that says below. The master is
    zero then.
    """
    # A low half above 0x8000 belongs to a master below its weight. As int16 it is negative.
    signed = torch.where(low == -0x8000, 0x8000, low.int())
    signed = torch.where(weight == 0, signed.clamp(min=0), signed)
    return ((weight.view(torch.int16).int() << 16) + signed).view(torch.float32)
