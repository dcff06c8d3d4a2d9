"""`bitmap_to_indices`: sorted lists of exactly k entries, for a batch.

The entries are set bits and the largest candidates. A status says why there is no list.
"""

from __future__ import annotations

import pytest
import torch
from helpers.backends import backend_of
from helpers.bitmap_cases import CASES, LAST, random_keys, selection

from lift_kernels import ops


def run(backend, *arguments):
    return ops.bitmap_to_indices(*arguments, backend=backend_of(backend, "bitmap_to_indices"))


@pytest.mark.parametrize("name", CASES)
def test_bitmap_to_indices(backend, name):
    """The result equals a sort of all keys to the bit, and no argument is changed."""
    call = CASES[name]()
    arguments = call.arguments(backend.device)
    indices, thresholds, status = run(backend, *arguments)
    assert (indices.dtype, thresholds.dtype, status.dtype) == (torch.int32, torch.float32, torch.int32)
    assert torch.equal(status.cpu(), call.status)
    assert torch.equal(indices.cpu(), call.indices)
    assert torch.equal(thresholds.view(torch.int32).cpu(), call.thresholds)
    for tensor, given in zip(arguments[:3], (call.bitmaps, call.candidates, call.counts)):
        assert torch.equal(tensor.cpu(), given)


def test_bitmap_to_indices_in_several_blocks(backend):
    """There are more words than a block lists and more candidates than a block reads at once.

    Matrices begin at odd addresses.
    """
    call = selection(random_keys(2, 131, 1025), 50000, 2**30, 2**30 + 2**29)
    indices, _, status = run(backend, *call.arguments(backend.device))
    assert status.tolist() == [0, 0] and torch.equal(indices.cpu(), call.indices)


def test_bitmap_to_indices_whatever_the_order_of_candidates(backend):
    call = selection(random_keys(2, 20, 50, top=40), 500, 10, 30)
    expected = [result.cpu() for result in run(backend, *call.arguments(backend.device))]
    for seed in range(3):
        candidates = call.candidates.clone()
        for i, near in enumerate(call.counts[:, 1].tolist()):
            candidates[i, :near] = candidates[i, torch.randperm(near, generator=torch.Generator().manual_seed(seed))]
        found = run(
            backend, call.bitmaps.to(backend.device), candidates.to(backend.device), *call.arguments(backend.device)[2:]
        )
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))


BITS, NOTES, COUNTS = (
    torch.zeros(2, 3, 2, dtype=torch.int32),
    torch.zeros(2, 5, dtype=torch.int64),
    torch.zeros(2, 2).int(),
)
GOOD = {"bitmaps": BITS, "candidates": NOTES, "counts": COUNTS, "columns": 40, "k": 7}


def moved(x, device):
    """A copy on a device with the same strides. `Tensor.to` makes a tensor with gaps contiguous."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": 0}, ValueError, "k must be from 1 to 120, got 0"),
        ({"k": 121}, ValueError, "k must be from 1 to 120, got 121"),
        (
            {"columns": 32},
            ValueError,
            r"bitmaps of 32 columns must be \(b, m, ceil\(columns / 32\)\), got \(2, 3, 2\)",
        ),
        ({"columns": 65}, ValueError, "bitmaps of 65 columns"),
        ({"columns": 0}, ValueError, "bitmaps of 0 columns"),
        ({"bitmaps": BITS.long()}, TypeError, "bitmaps must be torch.int32, got torch.int64"),
        ({"bitmaps": BITS[0]}, ValueError, r"bitmaps must be contiguous with 3 dimensions, got \(3, 2\)"),
        ({"bitmaps": BITS.mT.contiguous().mT}, ValueError, r"bitmaps must be contiguous .*strides \(6, 1, 3\)"),
        ({"bitmaps": BITS[:, :0]}, ValueError, "k must be from 1 to 0, got 7"),
        ({"bitmaps": torch.zeros(0, 3, 2).int()}, ValueError, r"candidates must be \(0, capacity\), got \(2, 5\)"),
        (
            {"bitmaps": torch.zeros(1, 1, 1).int().expand(0, 2**27, 2**5), "columns": 1024},
            ValueError,
            "up to 2\\^31-1 entries, got 134217728 x 1024",
        ),
        ({"candidates": NOTES.int()}, TypeError, "candidates must be torch.int64, got torch.int32"),
        ({"candidates": NOTES[:1]}, ValueError, r"candidates must be \(2, capacity\), got \(1, 5\)"),
        ({"candidates": NOTES.to("meta")}, ValueError, "candidates is on meta, bitmaps on"),
        ({"candidates": torch.zeros(2, 10, dtype=torch.int64)[:, ::2]}, ValueError, "candidates must be contiguous"),
        ({"counts": COUNTS.long()}, TypeError, "counts must be torch.int32"),
        ({"counts": COUNTS[:, :1].contiguous()}, ValueError, r"counts must be \(2, 2\), got \(2, 1\)"),
    ],
)
def test_bitmap_to_indices_bad_input(backend, change, error, message):
    arguments = {
        name: moved(x, backend.device) if isinstance(x, torch.Tensor) and not x.is_meta else x
        for name, x in (GOOD | change).items()
    }
    with pytest.raises(error, match=message):
        run(backend, *arguments.values())


def test_bitmap_to_indices_without_candidates(backend):
    """The capacity is zero and there are only bits.

    k bits alone are not a bracket that holds the k-th magnitude.
    """
    call = selection(random_keys(1, 5, 40), 10, LAST, LAST)
    none, counts = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[10, 0]], dtype=torch.int32)
    indices, thresholds, status = run(backend, *(x.to(backend.device) for x in (call.bitmaps, none, counts)), 40, 10)
    assert status.tolist() == [1] and indices.unique().tolist() == [-1] and bool(thresholds.isnan().all())
