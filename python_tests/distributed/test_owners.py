"""Work is shared out by its cost."""

from __future__ import annotations

import random

import pytest

from lift_kernels.distributed.owners import share_out
from lift_kernels.masks.costs import mask_cost


def loads(costs, ranks):
    owners = share_out(costs, ranks)
    assert len(owners) == len(costs) and all(0 <= owner < ranks for owner in owners)
    return [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [
        ([], 2, []),
        ([5.0], 3, [0]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1, 0, 1]),
        ([3.0, 3.0, 2.0, 2.0, 2.0], 2, [0, 1, 0, 1, 0]),
        ([1.0, 9.0, 1.0, 1.0], 2, [1, 0, 1, 1]),
        ([0.0, 0.0], 2, [0, 0]),
    ],
)
def test_the_costliest_come_first(costs, ranks, expected):
    assert share_out(costs, ranks) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_rank_has_much_more_than_its_share(ranks):
    draw = random.Random(0)
    costs = [draw.uniform(1, 10) ** 3 for _ in range(210)]
    assert max(loads(costs, ranks)) <= 1.02 * sum(costs) / ranks


@pytest.mark.parametrize(("warm", "device"), [(False, "cpu"), (True, "cpu"), (False, "cuda"), (True, "cuda")])
def test_the_layers_of_a_model_are_shared_out_evenly(warm, device):
    """Llama-3-8B: 32 layers with matrices of four shapes."""
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336)] * 32
    costs = [mask_cost(shape, 128, warm=warm, device=device) for shape in shapes]
    assert max(loads(costs, 8)) <= 1.03 * sum(costs) / 8
