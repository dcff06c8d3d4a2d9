"""Selections of blocks and runs, against loops over the blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.optimizers import train
from helpers.small_models import TwoLinears
from helpers.spectra import truncated
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.masks.block_selections import principal_blocks, principal_runs, random_runs


def random_matrix(m: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(dtype)


def blocks_of(m: int, n: int, rows: int, columns: int) -> list[list[int]]:
    """The flat positions of each block, row by row."""
    return [
        [i * n + j for i in range(top, min(m, top + rows)) for j in range(left, min(n, left + columns))]
        for top in range(0, m, rows)
        for left in range(0, n, columns)
    ]


def best_blocks(product: torch.Tensor, k: int, rows: int, columns: int) -> list[int]:
    """Entries of the blocks of largest sum; the last block is cut."""
    size = product.abs().flatten()
    ordered = sorted(blocks_of(*product.shape, rows, columns), key=lambda block: -float(size[block].sum()))
    return sorted([entry for block in ordered for entry in block][:k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 16, 61, 18 * 31])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (1, 1), (40, 40)])
def test_blocks_of_largest_sum(shape, k, dtype):
    weight = random_matrix(18, 31, dtype)
    found = principal_blocks(5, shape)(weight, k)
    assert found.dtype == torch.int32
    assert found.tolist() == best_blocks(truncated(weight.float(), 5), k, *shape)


@pytest.mark.parametrize("k", [1, 32, 100])
@pytest.mark.parametrize("length", [16, 5])
def test_runs_of_largest_sum(length, k):
    weight = random_matrix(18, 31)
    found = principal_runs(5, length)(weight, k)
    assert found.tolist() == best_blocks(truncated(weight, 5), k, 1, length)


def test_of_equal_blocks_the_first_go_first():
    """At full rank the approximation is exact. The edge blocks of ones have smaller sums."""
    weight = torch.ones(6, 10)
    expected = sorted([*range(0, 4), *range(10, 14), *range(20, 24), *range(30, 34), 4, 5, 6, 7, 14])
    assert principal_blocks(10)(weight, 21).tolist() == expected


@pytest.mark.parametrize("k", [1, 48, 50, 18 * 35])
@pytest.mark.parametrize("length", [16, 7, 1])
def test_random_runs_are_whole_but_for_the_last(length, k):
    found = set(random_runs(3, length)(torch.zeros(18, 35), k).tolist())
    runs = blocks_of(18, 35, 1, length)
    taken = [len(found & set(run)) for run in runs]
    cut = [i for i, count in enumerate(taken) if 0 < count < len(runs[i])]
    assert sum(taken) == len(found) == k and len(cut) <= 1
    for i in cut:
        assert found & set(runs[i]) == set(runs[i][: taken[i]])


def test_random_runs_choose_every_run_equally_often():
    counts = torch.zeros(32)
    for seed in range(400):
        counts[random_runs(seed, 16)(torch.zeros(8, 64), 128).long().unique() // 16] += 1
    assert counts.sum() == 400 * 8
    assert counts.min() > 60 and counts.max() < 140  # 100 expected; the deviation is 8.7


def test_a_random_draw_belongs_to_the_seed_and_the_number_of_a_matrix():
    weight, chosen = torch.zeros(40, 64), random_runs(5)
    first = chosen(weight, 100)
    assert torch.equal(first, chosen(weight + 1, 100)) and torch.equal(first, random_runs(5)(weight, 100, number=0))
    assert not torch.equal(first, chosen(weight, 100, number=1))
    assert not torch.equal(first, random_runs(6)(weight, 100))


@pytest.mark.parametrize("schedule", ["all", "spread"])
def test_an_optimizer_keeps_the_random_runs_at_every_refresh(schedule):
    """They differ between matrices of one shape, and are those of a second optimizer."""
    weights = [nn.Parameter(random_matrix(20, 48)) for _ in range(3)]
    options = dict(lr=0.1, density=0.1, selection=random_runs(4), refresh_interval=3, refresh_schedule=schedule)
    optimizer = LiftAdamW(weights, **options)
    train(optimizer, range(1))
    first = [optimizer.state[w]["indices"].clone() for w in weights]
    assert not any(torch.equal(first[i], first[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    train(optimizer, range(1, 7))
    assert all(torch.equal(optimizer.state[w]["indices"], mask) for w, mask in zip(weights, first))
    again = LiftAdamW(weights, **options)
    again.refresh()
    assert all(torch.equal(again.state[w]["indices"], mask) for w, mask in zip(weights, first))


@pytest.mark.parametrize("selection", [principal_blocks(3), principal_runs(3, 4), random_runs(7, 4)])
def test_packed_gradients_have_the_entries_of_the_optimizer(selection):
    packed, plain = TwoLinears(), TwoLinears()
    pack_gradients(packed, density=0.2, selection=selection)
    optimizer = LiftAdamW(lift_param_groups(plain), density=0.2, selection=selection)
    optimizer.refresh()
    assert optimizer.last_refresh.matrices[0].method == selection.__name__
    for name in ("up", "down"):
        weight = plain.get_submodule(name).weight
        assert torch.equal(packed.get_submodule(name).indices, optimizer.state[weight]["indices"])


def test_each_matrix_of_a_stack_has_its_own_runs():
    stack = nn.Parameter(torch.zeros(2, 20, 48))
    optimizer = LiftAdamW([{"params": [stack], "lift": True}], density=0.1, selection=random_runs(4))
    optimizer.refresh()
    first, second = optimizer.state[stack]["indices"].view(2, 96)
    assert int(second.min()) >= 960 and not torch.equal(first, second - 960)


def test_names_say_the_arguments_and_copies_choose_the_same():
    for selection, name in [
        (principal_blocks(32), "principal_blocks(rank=32, shape=(4, 4))"),
        (principal_runs(32), "principal_runs(rank=32, length=16)"),
        (random_runs(1), "random_runs(seed=1, length=16)"),
    ]:
        assert selection.__name__ == name
        for copied in (copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
            assert copied.__name__ == name and copied.numbered == selection.numbered
            assert torch.equal(copied(random_matrix(40, 40), 30), selection(random_matrix(40, 40), 30))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: principal_blocks(0), ValueError, "rank must be an integer of at least 1, got 0"),
        (lambda: principal_blocks(4, (4, 0)), ValueError, "each side of shape must be an integer of at least 1, got 0"),
        (lambda: principal_blocks(4, 4), ValueError, r"shape must be \(rows, columns\) of a block, got 4"),
        (lambda: principal_runs(4, 1.5), ValueError, "length must be an integer of at least 1, got 1.5"),
        (lambda: random_runs(0.5), TypeError, "seed must be an integer, got 0.5"),
        (lambda: random_runs(0, -1), ValueError, "length must be an integer of at least 1, got -1"),
        (lambda: random_runs(0)(torch.zeros(3, 4), 13), ValueError, "k must be from 1 to the 12 entries .* got 13"),
        (lambda: principal_runs(2)(torch.full((3, 4), torch.nan), 1), ValueError, "non-finite weights"),
    ],
)
def test_arguments_that_cannot_work_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
