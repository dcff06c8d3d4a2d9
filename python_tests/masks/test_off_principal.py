"""The selection of entries outside the principal weights, against a dense computation."""

from __future__ import annotations

import pytest
import torch
from helpers.optimizers import set_gradients, train
from helpers.small_models import TwoLinears
from helpers.spectra import truncated, whole_factors
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.masks.selection import SelectionRequest, make_masks, off_principal_mask

BF16 = torch.bfloat16
ROW_BLOCKS = [3 * 2**30, 16 * 53 * 20, 1]
"""Memory budgets: all rows at once, 20 rows of 53 columns, one row."""


def random_matrix(m: int = 37, n: int = 53, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(3)).to(dtype)


def densely(weight: torch.Tensor, product: torch.Tensor, k: int) -> torch.Tensor:
    """The k entries of least |product| outside the 2k largest of |W|, by two full sorts."""
    largest = weight.abs().flatten().argsort(descending=True, stable=True)[: 2 * k]
    size = product.abs().flatten().double()
    size[largest] = torch.inf
    return size.argsort(stable=True)[:k].sort().values.int()


@pytest.mark.parametrize("memory_budget", ROW_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("k", [1, 98, 653])
def test_the_least_of_the_approximation_outside_the_largest_weights(k, dtype, memory_budget):
    weight = random_matrix(dtype=dtype)
    mask = off_principal_mask(weight, 5, k, "w", memory_budget=memory_budget)
    assert mask.indices.dtype == torch.int32 and mask.method == "off_principal" and mask.converged
    assert torch.equal(mask.indices, densely(weight, truncated(weight.float(), 5), k))


@pytest.mark.parametrize("memory_budget", ROW_BLOCKS)
@pytest.mark.parametrize("k", [1, 7, 350])
def test_equal_entries_are_taken_in_order(k, memory_budget):
    """Of small whole numbers most are equal, and at full rank the approximation is exact."""
    left, right = whole_factors(37, 53, 2, top=1)
    weight = left @ right.T + torch.eye(37, 53)
    assert weight.unique().numel() < 10
    found = off_principal_mask(weight, 37, k, "w", memory_budget=memory_budget).indices
    assert torch.equal(found, densely(weight, weight, k))


def test_a_matrix_of_zeros_gives_the_entries_behind_the_largest():
    found = off_principal_mask(torch.zeros(6, 5), 5, 10, "w", memory_budget=1).indices
    assert found.tolist() == list(range(20, 30))


def test_entries_of_large_weight_are_left_out_though_their_approximation_is_small():
    """A rank-1 approximation hardly shows a single large entry."""
    weight = torch.outer(torch.arange(1.0, 21), torch.arange(1.0, 21))
    weight[0, 0] = 200.0
    magnitude = truncated(weight, 1).abs().flatten()
    assert int((magnitude < magnitude[0]).sum()) < 60
    found = off_principal_mask(weight, 1, 60, "w").indices
    assert len(found) == 60 and 0 not in found.tolist()


def test_a_density_above_a_third_is_refused_before_anything_is_made():
    message = (
        r"selection='off_principal' leaves out the 2k largest weights, so it cannot choose k = 41 of 120 entries "
        r"\(density 0\.342\); lower density to at most 1/3, or budget_rank"
    )
    request = SelectionRequest(torch.ones(10, 12), None, 3, 41, "up.weight", 0, {})
    with pytest.raises(ValueError, match=f"up.weight: {message}"):
        make_masks([request], selection="off_principal", seed=0)
    make_masks([request._replace(k=40)], selection="off_principal", seed=0)
    weight, bias = nn.Parameter(torch.ones(10, 12)), nn.Parameter(torch.ones(7))
    named = [("up.weight", weight), ("up.bias", bias)]
    with pytest.raises(ValueError, match=f"up.weight: {message}"):
        LiftAdamW(named, density=0.342, selection="off_principal")
    with pytest.raises(ValueError, match=r"k = 66 of 120 .*density 0\.55"):
        LiftAdamW(named, budget_rank=3, selection="off_principal")
    model = TwoLinears()
    with pytest.raises(ValueError, match="up.weight: selection='off_principal'"):
        pack_gradients(model, density=0.5, selection="off_principal")
    assert type(model.up) is nn.Linear
    LiftAdamW([{"params": named, "lift": False}], density=1.0, selection="off_principal")  # trains no mask


def test_weights_that_are_not_finite_are_refused_by_name():
    weight = nn.Parameter(random_matrix())
    optimizer = LiftAdamW([("up.weight", weight)], rank=4, selection="off_principal")
    with torch.no_grad():
        weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="up.weight: 1 non-finite weights, the first at flat index 109"):
        optimizer.refresh()


@pytest.mark.parametrize("method", ["auto", "svd", "chebyshev"])
def test_training_moves_the_chosen_entries_and_a_refresh_chooses_again(method):
    weight = nn.Parameter(random_matrix())
    optimizer = LiftAdamW(
        [weight], lr=0.05, rank=5, density=0.1, selection="off_principal", mask_method=method, refresh_interval=3
    )
    start, first = weight.detach().clone(), densely(weight.detach(), truncated(weight.detach(), 5), 196)
    train(optimizer, range(2))
    assert torch.equal(optimizer.state[weight]["indices"], first)
    assert torch.equal((weight.detach() != start).flatten().nonzero().flatten().int(), first)
    train(optimizer, range(2, 3))
    again = densely(weight.detach(), truncated(weight.detach(), 5), 196)
    chosen = optimizer.state[weight]["indices"]
    assert torch.equal(chosen, again) or (method == "chebyshev" and torch.isin(chosen, again).double().mean() > 0.95)
    report = optimizer.last_refresh.matrices[0]
    assert report.method == "off_principal" and report.overlap == torch.isin(chosen, first).double().mean() < 1
    assert "basis" not in optimizer.state[weight]


def test_a_stack_is_done_matrix_by_matrix():
    stack = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(1))
    (mask,) = make_masks([SelectionRequest(stack, None, 4, 50, "experts", 0, {})], selection="off_principal", seed=0)
    expected = [densely(matrix, truncated(matrix, 4), 50) + 600 * i for i, matrix in enumerate(stack)]
    assert torch.equal(mask.indices, torch.cat(expected))


def test_packed_gradients_train_the_entries_of_the_optimizer():
    packed, plain = TwoLinears(), TwoLinears()
    options = dict(rank=3, density=0.2, selection="off_principal")
    groups = pack_gradients(packed, **options)
    optimizers = [LiftAdamW(g, lr=0.01, refresh_interval=2, **options) for g in (groups, lift_param_groups(plain))]
    for name in ("up", "down"):
        weight = plain.get_submodule(name).weight.detach()
        expected = densely(weight, truncated(weight, 3), round(0.2 * weight.numel()))
        assert torch.equal(packed.get_submodule(name).indices, expected)
    for _ in range(4):
        for model, optimizer in zip((packed, plain), optimizers):
            model(torch.linspace(-1, 1, 48).view(4, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("up", "down"):
        layer, weight = packed.get_submodule(name), plain.get_submodule(name).weight
        assert torch.equal(layer.indices, optimizers[1].state[weight]["indices"])
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-6)


def test_a_saved_state_continues_with_the_same_bits():
    def run(resume: bool) -> torch.Tensor:
        weight = nn.Parameter(random_matrix())
        make = lambda: LiftAdamW([weight], lr=0.05, rank=5, selection="off_principal", refresh_interval=2)  # noqa: E731
        optimizer = make()
        for step in range(6):
            if resume and step == 3:
                state, optimizer = optimizer.state_dict(), make()
                optimizer.load_state_dict(state)
            set_gradients([weight], step)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(True), run(False))
