"""Device functions for 8-bit codes of moments, and for low halves of masters.

`lift_kernels.ops.state_formats` specifies both. The arithmetic here is in the same order, so that
equal numbers get equal codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(32)
"""Entries that share a scale."""
FIRST_CUBE, ROOT_CUBE = tl.constexpr(127.0**3), tl.constexpr(255.0**3)
"""Cubes of the largest codes."""
_THIRD, _FOUR_THIRDS = tl.constexpr(1 / 3), tl.constexpr(4 / 3)
_FLOOR = tl.constexpr(2.0**-60)


@triton.jit
def decode(codes, scale):
    """Return what codes stand for, in fp32. ``scale`` has one for each entry."""
    code = codes.to(tl.float32)
    return code * code * code * scale


@triton.jit
def spread(numbers, BLOCK: tl.constexpr):
    """Give each entry of a block the number of its group."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(numbers, 1), (BLOCK // GROUP, GROUP)), (BLOCK,))


@triton.jit
def group_scales(start, count, BLOCK: tl.constexpr):
    """Return the places of a block's scales, and which of them belong to its ``count`` entries.

    ``start`` is a multiple of `GROUP` in the arena.
    """
    group = tl.arange(0, BLOCK // GROUP)
    return start // GROUP + group, group * GROUP < count


@triton.jit
def encode_first(moment, real, BLOCK: tl.constexpr):
    """Return int8 codes of first moments, and the scales of their groups.

    Entries that are not ``real`` have no part in the scales, and their codes mean nothing.
    """
    scaled, scales = _scaled(tl.abs(moment), real, FIRST_CUBE, BLOCK)
    code = (_cube_root(scaled) + 0.5).to(tl.int32)
    return tl.where(moment < 0, -code, code).to(tl.int8), scales


@triton.jit
def encode_root(root, up, real, BLOCK: tl.constexpr):
    """Return uint8 codes of roots, and the scales of their groups.

    A root at the share s of the way to the next code is rounded up where ``s + up >= 1``.
    """
    scaled, scales = _scaled(root, real, ROOT_CUBE, BLOCK)
    code = _cube_root(scaled).to(tl.int32)
    below = code.to(tl.float32)
    distance = 3.0 * below * (below + 1.0) + 1.0
    code += (scaled - below * below * below >= (1.0 - up) * distance).to(tl.int32)
    code = tl.minimum(tl.maximum(code, 1), 255)
    return tl.where(root > 0, code, 0).to(tl.uint8), scales


@triton.jit
def dither(position, step):
    """Return fp32 numbers in [0, 1) for uint32 arena positions and the step count of a matrix."""
    word = position * 0xC13FA9A9 + step.to(tl.uint32) * 0x91E10DA5
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def join_master(pattern, low):
    """Return the fp32 masters of bf16 patterns and low halves, both int16."""
    distance = low.to(tl.int32)
    distance = tl.where(distance == -0x8000, 0x8000, distance)
    distance = tl.where((pattern & 0x7FFF) == 0, tl.maximum(distance, 0), distance)  # a zero from outside
    return ((pattern.to(tl.int32) << 16) + distance).to(tl.float32, bitcast=True)


@triton.jit
def low_half(master):
    """Return the low halves that are kept of fp32 masters, int16."""
    pattern = master.to(tl.uint32, bitcast=True)
    pattern += ((pattern & 0x1FFFF) == 0x18000).to(tl.uint32)  # the weight lies above the middle
    return pattern.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _scaled(magnitude, real, CUBE: tl.constexpr, BLOCK: tl.constexpr):
    """Return magnitudes on the scale of cubes of codes, and the scales of the groups.

    Nothing is below 2^-60, which has code 0 like all smaller numbers and like NaN. The cube root of
    0 would be NaN.
    """
    # As integers, the bits of magnitudes have the same order, and NaN is above all.
    pattern = tl.where(real, magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest_bits = tl.max(tl.reshape(pattern, (BLOCK // GROUP, GROUP)), axis=1)
    largest = largest_bits.to(tl.float32, bitcast=True)
    coded = largest >= 7.888609052210118e-31  # 2^-100
    scales = tl.where(coded, largest * (1.0 / CUBE), 0.0)
    scales = tl.where(largest_bits < 0x7F800000, scales, float("nan"))
    factor = tl.where(coded, tl.div_rn(CUBE, largest), 0.0)
    scaled = magnitude * spread(factor, BLOCK)
    return tl.where(scaled >= _FLOOR, scaled, _FLOOR), scales


@triton.jit
def _cube_root(x):
    """Return the cube roots of fp32 ``x``, 2^-60 to 2^24."""
    guess = 0x54A2FA8C - (x.to(tl.int32, bitcast=True).to(tl.float32) * _THIRD).to(tl.int32)
    root = guess.to(tl.float32, bitcast=True)
    third = x * _THIRD
    root = root * (_FOUR_THIRDS - third * (root * root * root))
    root = root * (_FOUR_THIRDS - third * (root * root * root))
    return x * (root * root)
