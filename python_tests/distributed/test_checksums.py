"""The digests of index lists that ranks compare."""

from __future__ import annotations

import torch

from lift_kernels.distributed.checksums import index_digests


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
