"""Loads and stores of data that a kernel touches once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_stream(start, count, BLOCK: tl.constexpr):
    """Load ``count`` values from ``start`` on, and zeros behind them.

    Whole blocks take no mask, so that their loads are 128 bits wide.
    """
    lanes = tl.arange(0, BLOCK)
    if count >= BLOCK:
        x = tl.load(start + lanes)
    else:
        x = tl.load(start + lanes, mask=lanes < count, other=0)
    return x


@triton.jit
def store_stream(start, x, count, BLOCK: tl.constexpr):
    """Store the first ``count`` values of a block from ``start`` on, as `load_stream` loads."""
    lanes = tl.arange(0, BLOCK)
    if count >= BLOCK:
        tl.store(start + lanes, x)
    else:
        tl.store(start + lanes, x, mask=lanes < count)
