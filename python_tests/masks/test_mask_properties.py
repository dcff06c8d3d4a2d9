"""Properties that hold for any input, which hypothesis draws.

This is the only file of op tests that needs more than pytest.
"""

from __future__ import annotations

import torch
from helpers.bits import BF16, FP16, FP32, LAST, int32
from helpers.spectra import assert_principal, whole_factors, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_kernels import ops, principal_indices
from lift_kernels.masks import lowrank
from lift_kernels.ops.reference import lowrank_topk_ref

DTYPES = (FP32, BF16, FP16)
SHARP = settings(max_examples=25, derandomize=True, deadline=None, database=None)
index_lists = st.sets(st.integers(0, 60) | st.integers(LAST - 60, LAST), max_size=40).map(sorted)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), part=st.floats(0, 1), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_mask_property(m, n, part, share, seed):
    rank, k = 1 + round(part * (min(m, n) - 1)), 1 + round(share * (m * n - 1))
    spectrum = [1.0 + 0.1 * i for i in range(rank)] + [0.1 * 0.5**i for i in range(min(m, n) - rank)]
    weight = with_spectrum(m, n, spectrum, seed)
    assert_principal(principal_indices(weight, rank, k), weight, rank, k)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(data=st.data())
def test_lowrank_topk_property(data):
    """Shapes, ranks, k, ties and brackets are random.

    Native code and reference return the same positions.
    """
    m, n, rank = (data.draw(st.integers(1, high)) for high in (70, 150, 12))
    left, right = whole_factors(m, n, rank, seed=data.draw(st.integers(0, 10**6)), top=data.draw(st.integers(0, 4)))
    k = data.draw(st.integers(1, m * n))
    bracket = data.draw(st.none() | st.lists(st.floats(0, 60, width=32), min_size=2, max_size=2))
    expected, threshold = lowrank_topk_ref(left, right, k)
    bracket = None if bracket is None else torch.tensor(bracket)
    indices, found = ops.lowrank_topk(left, right, k, bracket=bracket, backend="native-cpu")
    assert torch.equal(indices, expected) and torch.equal(found, threshold)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data())
def test_principal_indices_property(data):
    m, n = (data.draw(st.integers(1, 60)) for _ in range(2))
    rank, k = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(1, m * n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    weight = torch.randn(m, n, generator=generator) * 10.0 ** data.draw(st.integers(-20, 20))
    if data.draw(st.booleans()):
        weight = (weight / weight.abs().max() * data.draw(st.integers(1, 3))).round()  # ties, zeros, deficient ranks
    method = data.draw(st.sampled_from(lowrank.METHODS))
    indices = principal_indices(weight, rank, k, method=method)
    assert len(indices) == k and indices[0] >= 0 and indices[-1] < m * n and bool((indices[1:] > indices[:-1]).all())


def test_packed_migrate_is_a_dictionary_lookup(backend):
    @SHARP
    @given(index_lists, index_lists)
    def check(old, new):
        values = torch.arange(len(old), dtype=torch.int32, device=backend.device) * 3 + 1
        known = dict(zip(old, values.tolist()))
        out = ops.packed_migrate(values, int32(old, backend), int32(new, backend), fill=-1, backend=backend.name)
        assert out.tolist() == [known.get(index, -1) for index in new]

    check()


def test_packed_scatter_then_gather_is_the_identity(backend):
    @SHARP
    @given(st.data(), st.integers(1, 6), st.integers(1, 6), st.sampled_from(DTYPES))
    def check(data, rows, columns, dtype):
        places = data.draw(st.sets(st.integers(0, rows * columns - 1)).map(sorted))
        number = st.floats(width=16, allow_nan=False)
        values = torch.tensor(
            data.draw(st.lists(number, min_size=len(places), max_size=len(places))), device=backend.device
        )
        dense = torch.full((rows, columns), 77.0, dtype=dtype, device=backend.device)
        ops.packed_scatter_(dense, int32(places, backend), values, backend=backend.name)
        gathered = ops.packed_gather(dense, int32(places, backend), dtype=FP32, backend=backend.name)
        assert torch.equal(gathered, values.to(dtype).float())
        assert dense.view(-1).tolist() == [
            values.to(dtype)[places.index(at)].item() if at in places else 77.0 for at in range(rows * columns)
        ]

    check()
