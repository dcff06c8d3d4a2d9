"""The digests of index lists that ranks compare."""

from __future__ import annotations

import pytest
import torch

from lift_kernels.distributed.checksums import index_digests, weight_digests


def digest_of(*lists):
    return index_digests({"w": [torch.tensor(entries, dtype=torch.int32) for entries in lists]})["w"]


def test_digests_tell_index_lists_apart():
    base = list(range(0, 4000, 7))
    seen = {digest_of(base)}
    for change in (
        [],
        base[:-1],
        base[1:],
        [*base[:-1], base[-1] + 1],
        [*base, 2**31 - 1],
        [base[0], base[1] + 1, *base[2:]],
    ):
        seen.add(digest_of(change))
    seen |= (
        {digest_of([i]) for i in range(2000)} | {digest_of([i, i + 1]) for i in range(2000)} | {digest_of(base, base)}
    )
    assert len(seen) == 7 + 4000 + 1
    assert digest_of([1, 2], [3]) != digest_of([1], [2, 3])


def test_digests_are_exact_sums_in_chunks(monkeypatch):
    """Pieces of any size give the same digest.

    It is the sum modulo 2^64, which plain integers confirm.
    """
    from lift_kernels.distributed import checksums

    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(2**20, generator=generator)[:3001].sort().values.int()
    whole = index_digests({"w": [indices]})["w"]
    for chunk in (1, 7, 3001, 5000):
        monkeypatch.setattr(checksums, "_CHUNK", chunk)
        assert index_digests({"w": [indices]})["w"] == whole
    total = 0
    for entry in indices.tolist():
        for factor in checksums._FACTORS:
            entry = (entry + 1) * factor % 2**64
            shifted = entry >> 32 if entry < 2**63 else (entry - 2**64) >> 32
            entry ^= shifted % 2**64
        total += entry
    assert whole == f"{3001:x}.{total % 2**64:016x};"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_digests_see_every_change(dtype):
    """One bit of one entry, two entries that change places, rows, a sign of zero, NaN."""
    torch.manual_seed(0)
    weight = torch.randn(40, 30).to(dtype)
    weight[0, 0] = 0.0
    seen = {weight_digests([weight])[0]}
    assert weight_digests([weight.clone(), weight.T.contiguous().T]) == [*seen, *seen]
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    for place in range(0, weight.numel(), 7):
        changed = weight.clone()
        changed.view(bits).view(-1)[place] ^= 1 << (place % 8 * dtype.itemsize - 1 if place % 8 else 0)
        seen.add(weight_digests([changed])[0])
    for first, second in ((5, 6), (5, 700), (0, 1199)):
        changed = weight.clone()
        flat = changed.view(-1)
        flat[first], flat[second] = weight.view(-1)[second].clone(), weight.view(-1)[first].clone()
        seen.add(weight_digests([changed])[0])
    negative, nan = weight.clone(), weight.clone()
    negative[0, 0], nan[3, 3] = -0.0, float("nan")
    seen |= set(weight_digests([negative, nan, weight.roll(1, 0), weight.T.contiguous()]))
    assert len(seen) == 1 + 172 + 3 + 4


def test_weight_digests_are_exact_sums_in_chunks(monkeypatch):
    from lift_kernels.distributed import checksums

    torch.manual_seed(0)
    weight = torch.randn(37, 11)
    monkeypatch.setattr(checksums, "_CPU_PART", 100)
    total = 0
    bits = weight.view(torch.int32).view(-1).tolist()
    for start in range(0, len(bits), 100):
        part = [entry * (checksums._FACTORS[0] * i % 2**64 | 1) for i, entry in enumerate(bits[start : start + 100])]
        total = (total * checksums._FACTORS[1] + sum(part)) % 2**64
    assert weight_digests([weight]) == [f"{total:016x}"]


def test_no_weights_have_no_digests():
    assert weight_digests([]) == []
