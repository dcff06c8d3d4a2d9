"""Index lists from outside: what is refused, with which message, and after how many waits."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.packed_training import MASK
from helpers.small_models import ThreeLinears
from helpers.tensor_accounts import Waits

from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.masks.selection import SelectionRequest, make_masks
from lift_kernels.optim.placeholders import without_placeholders
from lift_kernels.optim.state_dict import check_state_dict
from lift_kernels.validation import check_index_form, check_index_list, check_index_lists


def listed(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


GOOD = [(listed(), 0), (listed(0), 1), (listed(3, 7, 8), 9), (listed(0, 2**31 - 1), 2**31), (listed(5), 2**31 - 1)]
BAD = {
    "disorder": (listed(0, 5, 3, 2), 9, ValueError, "got 5 before 3 at position 1"),
    "twice": (listed(0, 5, 5), 9, ValueError, "got 5 before 5 at position 1"),
    "too large": (listed(0, 5, 9), 9, IndexError, "index 9 is out of range for 9 entries"),
    "negative": (listed(-4, 5), 9, IndexError, "index -4 is out of range for 9 entries"),
    "far apart": (listed(2**31 - 1, -(2**31)), 9, ValueError, "got 2147483647 before -2147483648 at position 0"),
}


def names(count: int) -> list[str]:
    return [f"w{i}" for i in range(count)]


def test_good_lists_cost_one_wait():
    lists, numels = zip(*GOOD)
    with Waits() as waits:
        check_index_lists(lists, numels, names(len(lists)), torch.device("cpu"))
    assert waits.count == 1
    with Waits() as waits:
        check_index_lists([], [], [])
    assert waits.count == 0


def test_one_good_list_costs_one_wait_and_its_form_none():
    with Waits() as waits:
        check_index_list(listed(3, 7, 8), 9, "w")
    assert waits.count == 1
    with Waits() as waits:
        check_index_form(listed(8, 3), "w", torch.device("cpu"))
    assert waits.count == 0


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_bad_list_among_good_ones_is_named(name, place):
    """The message is that of a single list."""
    indices, numel, error, message = BAD[name]
    pairs = [*GOOD]
    pairs.insert(place, (indices, numel))
    lists, numels = zip(*pairs)
    with pytest.raises(error, match=f"w{place}: .*{message}"):
        check_index_lists(lists, numels, names(len(lists)))
    with pytest.raises(error, match=f"w{place}: .*{message}"):
        check_index_list(indices, numel, f"w{place}")


def test_the_first_of_two_bad_lists_is_named():
    with pytest.raises(IndexError, match="w1: index 9"):
        check_index_lists([listed(1), listed(9), listed(2, 1)], [9, 9, 9], names(3))


def test_exactly_the_lists_out_of_order_or_range_are_refused():
    """Every list of up to three numbers."""
    for length in range(4):
        for numbers in itertools.product(range(-1, 4), repeat=length):
            good = list(numbers) == sorted(set(numbers)) and all(0 <= i < 3 for i in numbers)
            try:
                check_index_lists([listed(0), listed(*numbers)], [1, 3], names(2))
                accepted = True
            except (ValueError, IndexError):
                accepted = False
            assert accepted == good, numbers


@pytest.mark.parametrize(
    ("indices", "device", "error", "message"),
    [
        ([0, 1], None, TypeError, "must be a tensor, got list"),
        (torch.tensor([0, 1]), None, TypeError, "must be int32, got torch.int64"),
        (torch.zeros(1, 2, dtype=torch.int32), None, ValueError, r"one-dimensional, got shape \(1, 2\)"),
        (listed(0), torch.device("meta"), ValueError, "is on cpu, expected meta"),
    ],
)
def test_a_wrong_form_is_refused(indices, device, error, message):
    for check in (
        lambda: check_index_form(indices, "w1", device),
        lambda: check_index_list(indices, 9, "w1", device),
        lambda: check_index_lists([listed(0).to(device or "cpu"), indices], [9, 9], names(2), device),
    ):
        with pytest.raises(error, match=f"w1: .*{message}"):
            check()


def test_lists_of_a_callable_are_checked_together():
    """The rest of the waits is for the finite check of each matrix."""
    requests = [SelectionRequest(torch.randn(6, 5), None, 2, 4, f"w{i}", i, {}) for i in range(7)]
    with Waits() as waits:
        masks = make_masks(requests, selection=lambda w, k: torch.arange(k, dtype=torch.int32), seed=0)
    assert waits.count == 7 + 1 and all(mask.indices.tolist() == [0, 1, 2, 3] for mask in masks)
    stack = SelectionRequest(torch.randn(3, 6, 5), None, 2, 4, "experts", 0, {})
    lists = iter([listed(0), listed(30), listed(1, 0)])
    with pytest.raises(IndexError, match=r"experts\[1\]: index 30 is out of range for 30 entries"):
        make_masks([stack], selection=lambda w, k: next(lists), seed=0)


def test_lists_of_a_state_dict_are_checked_together():
    weights = [torch.nn.Parameter(torch.randn(12, 9)) for _ in range(6)]
    optimizer = LiftAdamW(weights, rank=3, density=0.2)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    saved = optimizer.state_dict()
    with Waits() as waits:
        check_state_dict(without_placeholders(saved), weights, [True] * 6, names(6))
    assert waits.count == 1
    saved["state"][4]["indices"][0] = -1
    with pytest.raises(IndexError, match="w4: index -1 is out of range for 108 entries"):
        check_state_dict(saved, weights, [True] * 6, names(6))


def test_packing_trusts_its_own_lists():
    """One wait a matrix, for the finite check."""
    model = ThreeLinears()
    with Waits() as waits:
        groups = pack_gradients(model, freeze_rest=True, selection="random", **MASK)
    assert waits.count == len(groups[0]["params"]) == 3
