"""Gather, scatter, migration and the packed norm on every backend, value by value."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, LAST, assert_same_bits, bits, int32, random_indices
from helpers.step_problems import GAP_INDEX, make_problem

from lift_kernels import ops

DTYPES = (FP32, BF16, FP16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
PAIR_IDS = [f"{str(a)[6:]}-to-{str(b)[6:]}" for a, b in PAIRS]

# Values that are hard to round: ties, the ends of each format, subnormals, infinities, NaN.
CORNERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.00390625,
    1.01171875,
    1 + 2**-11,
    1 + 3 * 2**-11,
    -1.00390625,
    65504.0,
    65519.996,
    65520.0,
    -65520.0,
    3.3895314e38,
    3.3961775e38,
    3.4028235e38,
    2**-14,
    2**-14 - 2**-26,
    2**-24,
    2**-25,
    3 * 2**-25,
    2**-25 + 2**-40,
    2**-26,
    -(2**-25),
    2**-126,
    2**-133,
    2**-149,
    2**-127 + 2**-135,
    float("inf"),
    float("-inf"),
    float("nan"),
]


def assert_rounded(actual, source, dtype):
    """Check that ``actual`` is ``source`` in ``dtype``.

    An unchanged format keeps the bits. Otherwise NaN stay NaN.
    """
    expected = source.to(dtype)
    assert actual.dtype == dtype and actual.shape == expected.shape
    number = ~source.isnan()
    assert torch.equal(bits(actual)[number], bits(expected)[number])
    assert actual[~number].isnan().all()
    if source.dtype == dtype:
        assert torch.equal(bits(actual), bits(source)), "not even the payload of a NaN may change"


def corner_values(dtype, backend):
    generator = torch.Generator().manual_seed(1)
    scales = 2.0 ** torch.randint(-30, 18, (5000,), generator=generator)
    wide = torch.randn(5000, generator=generator) * scales
    return torch.cat([torch.tensor(CORNERS), wide]).to(backend.device, dtype)


@pytest.mark.parametrize("source, out", PAIRS, ids=PAIR_IDS)
def test_packed_gather_dtypes(backend, source, out):
    values = corner_values(source, backend)
    dense = torch.full((2 * len(values), 3), float("nan"), dtype=source, device=backend.device)
    index = (torch.arange(len(values), device=backend.device) * 6 + 1).int()
    dense.view(-1)[index.long()] = values
    assert_rounded(ops.packed_gather(dense, index, dtype=out, backend=backend.name), values, out)


def test_packed_gather_of_any_layout(backend):
    """Positions count in row-major order of the values, whatever the strides.

    The dtype stays by default.
    """
    matrix = torch.arange(35.0, device=backend.device).view(5, 7)
    index = int32([0, 1, 8, 33, 34], backend)
    for layout in (
        matrix,
        matrix.t().contiguous().t(),
        torch.stack([matrix, -matrix], -1)[..., 0],
        matrix.view(1, 5, 7),
    ):
        gathered = ops.packed_gather(layout, index, backend=backend.name)
        assert gathered.dtype == FP32 and gathered.tolist() == [0.0, 1.0, 8.0, 33.0, 34.0]
    assert ops.packed_gather(matrix, index[:0], backend=backend.name).shape == (0,)
    assert ops.packed_gather(matrix, index[3:], backend=backend.name).tolist() == [33.0, 34.0]


@pytest.mark.parametrize("values, dest", PAIRS, ids=PAIR_IDS)
def test_packed_scatter_dtypes(backend, values, dest):
    """Written entries are the rounded values, and the others keep every bit."""
    source = corner_values(values, backend)
    dense = torch.full((2 * len(source), 3), float("nan"), dtype=dest, device=backend.device)
    index = (torch.arange(len(source), device=backend.device) * 6 + 4).int()
    others = torch.ones(dense.numel(), dtype=torch.bool, device=backend.device)
    others[index.long()] = False
    before = bits(dense).view(-1)[others].clone()
    assert ops.packed_scatter_(dense, index, source, backend=backend.name) is dense
    assert_rounded(dense.view(-1)[index.long()], source, dest)
    assert torch.equal(bits(dense).view(-1)[others], before)


def test_packed_scatter_strided_values_and_slices(backend):
    dense = torch.zeros(4, 5, device=backend.device)
    values = torch.arange(1.0, 9.0, device=backend.device)[::2]
    assert not values.is_contiguous()
    ops.packed_scatter_(dense, int32([0, 7, 8, 19], backend), values, backend=backend.name)
    assert dense.view(-1).nonzero().flatten().tolist() == [0, 7, 8, 19]
    assert dense.view(-1)[[0, 7, 8, 19]].tolist() == [1.0, 3.0, 5.0, 7.0]
    ops.packed_scatter_(dense, int32([], backend), values[:0], backend=backend.name)
    # A slice of a larger buffer starts at an unaligned address. Its surroundings stay.
    buffer = torch.zeros(21, device=backend.device)
    ops.packed_scatter_(buffer[1:-1], int32([0, 18], backend), values[:2], backend=backend.name)
    assert buffer.nonzero().flatten().tolist() == [1, 19]


@pytest.mark.parametrize("count", [1, 4096, 4097, 16385])
def test_packed_gather_then_scatter_whole_and_partial_blocks(backend, count):
    generator = torch.Generator().manual_seed(count)
    matrix = torch.randn(150, 120, generator=generator).to(backend.device)
    index = random_indices(matrix.numel(), count, generator).to(backend.device)
    packed = ops.packed_gather(matrix, index, backend=backend.name)
    assert torch.equal(packed, matrix.view(-1)[index.long()])
    copy = torch.zeros_like(matrix)
    ops.packed_scatter_(copy, index, packed, backend=backend.name)
    mask = torch.zeros(matrix.numel(), dtype=torch.bool, device=backend.device)
    mask[index.long()] = True
    assert torch.equal(copy, matrix * mask.view_as(matrix))


def test_packed_gather_and_scatter_past_four_gigabytes(backend):
    """The last of 2^31 - 1 bf16 entries. Only the pages that are touched take memory."""
    huge = torch.empty(LAST, dtype=BF16, device=backend.device)
    index = int32([0, 2**29, 2**30 + 7, LAST - 1], backend)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], device=backend.device)
    ops.packed_scatter_(huge, index, values, backend=backend.name)
    assert huge[index.long()].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert ops.packed_gather(huge, index, dtype=FP32, backend=backend.name).tolist() == [1.0, 2.0, 3.0, 4.0]


MIGRATIONS = {
    "entering, leaving, staying": ([1, 5, 9, 12], [0, 5, 7, 12, 20], [None, 1, None, 3, None]),
    "identical": ([3, 4, 8], [3, 4, 8], [0, 1, 2]),
    "disjoint, interleaved": ([1, 3, 5], [0, 2, 4, 6], [None] * 4),
    "disjoint, all below": ([100, 200], [1, 2, 3], [None] * 3),
    "disjoint, all above": ([1, 2, 3], [100, 200], [None] * 2),
    "subset": ([0, 1, 2, 3, 4], [1, 3], [1, 3]),
    "superset": ([1, 3], [0, 1, 2, 3, 4], [None, 0, None, 1, None]),
    "empty old": ([], [0, 7], [None, None]),
    "empty new": ([0, 7], [], []),
    "both empty": ([], [], []),
    "one of one": ([6], [6], [0]),
    "first of two": ([6, 9], [6], [0]),
    "the largest index": ([0, LAST - 1, LAST], [LAST - 2, LAST - 1, LAST], [None, 1, 2]),
}


@pytest.mark.parametrize("old, new, origin", MIGRATIONS.values(), ids=MIGRATIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.int32], ids=["fp32", "bf16", "int32"])
def test_packed_migrate(backend, dtype, old, new, origin):
    values = torch.arange(1, len(old) + 1, device=backend.device).to(dtype)
    for fill in (0, -3):
        out = ops.packed_migrate(values, int32(old, backend), int32(new, backend), fill=fill, backend=backend.name)
        assert out.dtype == dtype and out.tolist() == [fill if place is None else place + 1 for place in origin]
    fills = (torch.arange(len(new), device=backend.device) + 50).to(dtype)
    before = fills.clone()
    out = ops.packed_migrate(values, int32(old, backend), int32(new, backend), fill_values=fills, backend=backend.name)
    assert out.tolist() == [50 + at if place is None else place + 1 for at, place in enumerate(origin)]
    assert torch.equal(fills, before), "fill_values are only read"
    out.fill_(99)
    assert torch.equal(fills, before), "the result shares no memory with them"


def test_packed_migrate_keeps_bits(backend):
    """Signed zeros, NaN payloads and integers that fp32 cannot hold pass unchanged."""
    patterns = int32([0, -(2**31), 0x7FC00001, -1, 2**24 + 1, 0x7F800001], backend)
    old = int32([1, 2, 3, 4, 5, 6], backend)
    for values in (patterns, patterns.view(FP32), patterns.to(torch.int16).view(BF16)):
        out = ops.packed_migrate(values, old, int32([2, 3, 4, 5, 6], backend), backend=backend.name)
        assert torch.equal(bits(out), bits(values)[1:])
    strided = torch.arange(12.0, device=backend.device)[::2]
    assert ops.packed_migrate(strided, old, int32([1, 6], backend), backend=backend.name).tolist() == [0.0, 10.0]


@pytest.mark.parametrize("old_count, new_count", [(9000, 16400), (16400, 4097), (1, 9000), (9000, 1)])
def test_packed_migrate_several_blocks(backend, old_count, new_count):
    generator = torch.Generator().manual_seed(old_count)
    old = random_indices(40000, old_count, generator).to(backend.device)
    new = random_indices(40000, new_count, generator).to(backend.device)
    values = torch.randn(old_count, generator=generator).to(backend.device)
    dense = torch.full((40000,), 7.0, device=backend.device)
    dense[old.long()] = values
    out = ops.packed_migrate(values, old, new, fill=7.0, backend=backend.name)
    assert torch.equal(out, dense[new.long()])


def norm(backend, problem):
    arguments = problem.grads, problem.indices, problem.offsets, problem.counts
    return ops.packed_l2_norm(*arguments, packed_grads=problem.packed, backend=backend.name)


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("grad", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_packed_l2_norm(backend, grad, packed, aligned):
    """The result is the nearest fp32 number to Python's exact sum, or its neighbour."""
    sizes = [((100, 87), 8193), ((13, 17), 40), ((1, 1), 1), ((5, 3), 0), ((90, 50), 4096)]
    problem = make_problem(backend, sizes, grad=grad, packed=packed, aligned=aligned)
    inputs = problem.inputs()
    entries = [g.reshape(-1) if packed else g.reshape(-1)[problem.index(i)] for i, g in enumerate(problem.grads)]
    truth = sum(x * x for part in entries for x in part.double().tolist()) ** 0.5
    measured = norm(backend, problem)
    assert measured.dtype == FP32 and measured.shape == () and measured.device.type == backend.device
    assert abs(measured.item() - truth) <= 2.0**-23 * truth
    assert torch.equal(norm(backend, problem), measured), "the same bits every time"
    assert_same_bits(problem.inputs(), inputs)


def test_packed_l2_norm_by_hand(backend):
    """3, 4 and 12 give 13. Values outside the lists do not count. Squares do not overflow."""
    grads = [torch.tensor([[3.0, 1e9], [4.0, float("nan")]]), torch.zeros(2, 2), torch.tensor([[float("inf"), 12.0]])]
    grads = [grad.to(backend.device) for grad in grads]
    indices = int32([GAP_INDEX, 0, 2, GAP_INDEX, 1, GAP_INDEX], backend)
    arguments = (grads, indices, [1, 3, 4], [2, 0, 1])
    assert ops.packed_l2_norm(*arguments, backend=backend.name).item() == 13.0
    for scale in (1e30, 2.0**-100):
        scaled = [grad * scale for grad in grads]
        size = ops.packed_l2_norm(scaled, *arguments[1:], backend=backend.name).item()
        assert size == torch.tensor(13 * scale).item() or abs(size / (13 * scale) - 1) < 2.0**-23
    assert (
        ops.packed_l2_norm([g.t().contiguous().t() for g in grads], *arguments[1:], backend=backend.name).item() == 13.0
    )
    assert ops.packed_l2_norm([], indices, [], [], backend=backend.name).item() == 0.0
    assert ops.packed_l2_norm(grads[1:2], indices, [0], [0], backend=backend.name).item() == 0.0
    for special in (float("inf"), float("nan")):
        grads[0][0, 0] = special
        assert torch.equal(
            ops.packed_l2_norm(*arguments, backend=backend.name).isnan().cpu(), torch.tensor(special).isnan()
        )
        assert not ops.packed_l2_norm(*arguments, backend=backend.name).isfinite()
