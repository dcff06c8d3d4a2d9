"""bench/refresh_cost.py: what it counts."""

from __future__ import annotations

import pytest
import torch

from bench import refresh_cost
from bench.refresh_cost import Cost, Counting


def test_calls_are_counted_and_views_are_not():
    cost = Cost()
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Counting(cost, numel=1000):
        a @ b.T.T  # 3 x 4 x 5, 12 + 20 + 15 numbers
    with Counting(cost, numel=12):
        a + 1
    assert cost == {
        ("tall blocks", "launches"): 1,
        ("tall blocks", "bytes"): 4 * 47,
        ("tall blocks", "fp32_flops"): 120,
        ("whole matrices", "launches"): 1,
        ("whole matrices", "bytes"): 4 * 24,
        ("whole matrices", "fp32_flops"): 0,
    }


def test_the_cost_of_a_helper_is_that_of_its_kernels():
    """A Chebyshev step on a block of 1024 x 256: tiles (0,0), (0,1), (1,1) over two slabs, two
    blocks times R^-1.
    """
    cost = Cost()
    refresh_cost.op_cost(cost, 1024, 256, blocks_read=3, multiplied=2)
    block, tile, square = 4 * 1024 * 256, 4 * 128 * 128, 4 * 256 * 256
    moved = 4 * block + 6 * tile + 6 * tile + square / 2 + 3 * square + 2 * (2 * block + square)
    assert cost["tall blocks", "bytes"] == moved and cost["tall blocks", "launches"] == 5
    products = 3 * (2 * 128 * 128 * 1024)
    assert cost["tall blocks", "fp32_flops"] == pytest.approx(3 * products + 2 * 256**3 / 3)


def test_helpers_move_less_in_fewer_launches():
    before, after = (refresh_cost.model_cost(128, 16, with_cuda) for with_cuda in (False, True))
    for quantity in ("launches", "bytes"):
        assert after["tall blocks", quantity] < 0.8 * before["tall blocks", quantity]
        assert after["whole matrices", quantity] == before["whole matrices", quantity]
    assert before["whole matrices", "tf32_flops"] > 0 and after["eigenproblems", "launches"] == 4 + 6 + 3  # one a batch
