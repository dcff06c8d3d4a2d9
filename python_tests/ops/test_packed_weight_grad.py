"""packed_weight_grad on every backend: the dense weight gradient at the index list."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, assert_near, bits, random_indices

from lift_kernels import ops

INPUTS = (FP32, BF16, FP16)
IDS = ["fp32", "bf16", "fp16"]
SHAPES = {  # tokens, m, n, k
    "odd": (7, 13, 17, 40),
    "all entries": (5, 9, 8, 72),
    "one entry": (3, 6, 5, 1),
    "no entry": (3, 6, 5, 0),
    "no token": (0, 6, 5, 11),
    "one by one": (4, 1, 1, 1),
    "one row": (33, 1, 300, 60),
    "one column": (33, 300, 1, 60),
    "several tiles": (70, 260, 391, 5000),
    "all entries of several tiles": (2, 140, 300, 42000),
}


def factors(backend, tokens, m, n, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, side, generator=generator).to(backend.device, dtype) for side in (m, n)]


def index_list(backend, m, n, k, seed=1):
    return random_indices(m * n, k, torch.Generator().manual_seed(seed)).to(backend.device)


def ways(backend):
    """The options that choose an implementation of this backend."""
    return [{"fused": False}, {"fused": True}] if backend.name == "triton" else [{}]


def summed_in_order(grad_output, input):
    """The product by a plain loop over tokens, in fp32 on the CPU."""
    total = torch.zeros(grad_output.shape[1], input.shape[1])
    for g, x in zip(grad_output.float().cpu(), input.float().cpu()):
        total += torch.outer(g, x)
    return total.to(input.device)


def assert_entries(actual, grad_output, input, index, exact):
    """Check that the result is as near to the fp64 product as torch's own product in this dtype.

    Or it must equal a gather from torch's product to the bit. Each BLAS library sums in an order of
    its own, and some have less error by luck. So the error of a plain loop is allowed everywhere.
    """
    dense = (grad_output.t() @ input).reshape(-1)[index.long()].float()
    assert actual.dtype == FP32 and actual.shape == index.shape
    if exact:
        assert torch.equal(bits(actual), bits(dense))
    elif index.numel():
        truth = (grad_output.double().t() @ input.double()).reshape(-1)[index.long()]
        looped = summed_in_order(grad_output, input).reshape(-1)[index.long()]
        yardstick = max((dense.double(), looped.double()), key=lambda product: float((product - truth).abs().max()))
        assert_near(actual, truth, yardstick, "gradient")


@pytest.mark.parametrize("dtype", INPUTS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed_weight_grad(backend, shape, dtype):
    tokens, m, n, k = shape
    grad_output, input = factors(backend, tokens, m, n, dtype)
    index = index_list(backend, m, n, k)
    for way in ways(backend):
        out = ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way)
        exact = backend.name == "reference" or way == {"fused": False}
        assert_entries(out, grad_output, input, index, exact)
        again = ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way)
        assert torch.equal(bits(out), bits(again)), "the same bits every time"


def test_packed_weight_grad_by_hand(backend):
    """Two tokens and four entries give sums that are exact in every dtype."""
    for dtype in INPUTS:
        grad_output = torch.tensor([[1.0, 2.0], [4.0, 8.0]], device=backend.device, dtype=dtype)
        input = torch.tensor([[1.0, 0.0, 3.0], [0.5, 1.0, 0.0]], device=backend.device, dtype=dtype)
        index = torch.tensor([0, 2, 4, 5], dtype=torch.int32, device=backend.device)
        for way in ways(backend):
            out = ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way)
            assert out.tolist() == [3.0, 3.0, 8.0, 6.0]
            for wanted in INPUTS:
                cast = ops.packed_weight_grad(grad_output, input, index, dtype=wanted, backend=backend.name, **way)
                assert cast.dtype == wanted and cast.tolist() == [3.0, 3.0, 8.0, 6.0]


@pytest.mark.parametrize("dtype", INPUTS, ids=IDS)
def test_packed_weight_grad_of_any_layout(backend, dtype):
    """Transposed, expanded and sliced factors count by their values."""
    index = index_list(backend, 12, 9, 30)
    grad_output, input = factors(backend, 6, 12, 9, dtype)
    layouts = {
        "transposed": (grad_output.t().contiguous().t(), input.t().contiguous().t()),
        "expanded": (grad_output[:1].expand(6, 12), input),
        "sliced": (torch.cat([grad_output] * 2, 1)[:, ::2], torch.cat([input] * 2)[::2]),
    }
    for name, (g, x) in layouts.items():
        assert not g.is_contiguous(), name
        for way in ways(backend):
            out = ops.packed_weight_grad(g, x, index, backend=backend.name, **way)
            assert_entries(out, g, x, index, exact=False)


def test_packed_weight_grad_in_several_panels(backend):
    """The weight is larger than the scratch memory on the CPU.

    Some rows lie at the edges of panels, and some panels have no entry.
    """
    m, n = (500, 4500) if backend.name != "triton" else (140, 300)  # the interpreter is slow and has no panels
    grad_output, input = factors(backend, 3, m, n)
    everywhere = index_list(backend, m, n, 3000)
    height = min(4 * 2**20 // (4 * n), m // 2)
    seams = torch.tensor([0, height * n - 1, height * n, 2 * height * n - 1, m * n - 1], dtype=torch.int32).unique()
    last_row = (torch.arange(n) + (m - 1) * n).int()
    for index in (everywhere, seams.to(backend.device), last_row.to(backend.device)):
        for way in ways(backend):
            out = ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way)
            assert_entries(out, grad_output, input, index, exact=False)


def test_packed_weight_grad_passes_non_finite_values_on(backend):
    """NaN and infinity reach the entries of their row and column and no others.

    This is as in the dense product.
    """
    grad_output, input = factors(backend, 4, 5, 6)
    grad_output[2, 1], input[1, 3] = float("nan"), float("inf")
    index = torch.arange(30, dtype=torch.int32, device=backend.device)
    expected = grad_output.t() @ input
    for way in ways(backend):
        out = ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way).view(5, 6)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert out[1].isnan().all() and out[:, 3].isfinite().logical_not().all() and out[0, 0].isfinite()


def test_packed_weight_grad_writes_nothing_else(backend):
    """The factors and the index list are only read, and entries beyond the list's end stay."""
    grad_output, input = factors(backend, 4, 13, 17)
    index = index_list(backend, 13, 17, 50)
    before = [t.clone() for t in (grad_output, input, index)]
    for way in ways(backend):
        ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way)
    assert all(torch.equal(t, b) for t, b in zip((grad_output, input, index), before))


@pytest.mark.parametrize("switch", [torch.backends.cuda.matmul, torch.backends], ids=["matmul", "all backends"])
def test_packed_weight_grad_after_the_newer_precision_switch(backend, switch):
    """torch.get_float32_matmul_precision raises once the newer switch was used.

    The numbers are small integers, which are exact in TF32 too.
    """
    index = index_list(backend, 13, 17, 50)
    grad_output, input = (t.mul(4).round() for t in factors(backend, 7, 13, 17))
    expected = (grad_output.t() @ input).reshape(-1)[index.long()]
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        for way in ways(backend):
            assert torch.equal(ops.packed_weight_grad(grad_output, input, index, backend=backend.name, **way), expected)
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize(
    "rows, columns, tokens, widen",
    [(128, 64, 32, False), (128, 128, 32, False), (256, 64, 64, False), (128, 64, 32, True)],
)
@pytest.mark.parametrize("n", [128, 260])
def test_fused_products_in_the_tiles_of_every_card(backend, monkeypatch, rows, columns, tokens, widen, n):
    """Else the interpreter would run only those of an exact fp32 product, which are narrow."""
    if backend.name != "triton":
        return
    from lift_kernels.ops.triton import packed_weight_grad as launcher

    given = launcher.weight_grad_options
    tile = {"ROWS": rows, "COLUMNS": columns, "TOKENS": tokens, "num_stages": 3}
    changes = tile | {"WIDEN": widen, "PRECISION": "ieee"}
    monkeypatch.setattr(launcher, "weight_grad_options", lambda *card, **case: given(*card, **case) | changes)
    grad_output, input = factors(backend, 33, 130, n, BF16)
    for k in (1, 900, 130 * n):
        index = index_list(backend, 130, n, k)
        out = ops.packed_weight_grad(grad_output, input, index, fused=True, backend=backend.name)
        assert_entries(out, grad_output, input, index, exact=False)


@pytest.mark.parametrize("band", [1, 3, 7, 16])
def test_bands_of_tiles_hold_each_tile_once(backend, monkeypatch, band):
    """7 x 5 tiles: whole bands, a lower one at the end, and one that is higher than the matrix."""
    if backend.name != "triton":
        return
    from lift_kernels.ops.triton import packed_weight_grad as launcher

    given = launcher.weight_grad_options
    tile = {"ROWS": 16, "COLUMNS": 32, "TOKENS": 16, "BAND": band}
    monkeypatch.setattr(launcher, "weight_grad_options", lambda *card, **case: given(*card, **case) | tile)
    grad_output, input = factors(backend, 5, 100, 150, BF16)
    index = index_list(backend, 100, 150, 15000)
    out = ops.packed_weight_grad(grad_output, input, index, fused=True, backend=backend.name)
    assert_entries(out, grad_output, input, index, exact=False)


def test_tiles_count_the_entries_before_them_up_to_the_last_position(backend):
    """Of a matrix with 2^31 entries, in rows of eight tiles, by a kernel that runs first."""
    if backend.name != "triton":
        return
    from lift_kernels.ops.triton.packed_weight_grad import _tile_firsts_kernel

    m, n, columns = 4, 2**29, 2**26
    index = torch.tensor([0, 2**26 - 1, 2**26, 2**29, 2**30 - 1, 2**31 - 2**26, 2**31 - 1], dtype=torch.int32)
    index = index.to(backend.device)
    firsts = torch.full((8, m), -1, dtype=torch.int32, device=backend.device)
    _tile_firsts_kernel[(1,)](index, firsts, m, n, len(index), 4, COLUMNS=columns, BLOCK=64)
    starts = torch.arange(8)[:, None] * columns + torch.arange(m)[None, :] * n
    assert torch.equal(firsts.cpu(), (index.long().cpu()[:, None, None] < starts).sum(0).int())
    assert firsts[:, 3].tolist() == [5] * 8 and firsts[:3, 0].tolist() == [0, 2, 3]
    _tile_firsts_kernel[(1,)](index, firsts, m, n, 4, 4, COLUMNS=columns, BLOCK=64)  # no entry of later tiles
    assert firsts[:, 1].tolist() == [3] + [4] * 7 and firsts[:, 2].tolist() == [4] * 8


def test_packed_weight_grad_needs_a_backend_for_fused(backend):
    if backend.name == "triton":
        return
    grad_output, input = factors(backend, 4, 5, 6)
    index = index_list(backend, 5, 6, 3)
    with pytest.raises(ValueError, match=f"fused=True needs the triton backend, but the {backend.name} backend runs"):
        ops.packed_weight_grad(grad_output, input, index, fused=True, backend=backend.name)


def test_packed_weight_grad_float64_is_for_the_reference():
    grad_output, input = torch.randn(4, 5).double(), torch.randn(4, 6).double()
    index = torch.tensor([0, 7, 29], dtype=torch.int32)
    out = ops.packed_weight_grad(grad_output, input, index, backend="reference")
    assert out.dtype == torch.float64 and torch.equal(out, (grad_output.t() @ input).view(-1)[index.long()])
    with pytest.raises(TypeError, match="grad_output must be one of .*float64"):
        ops.packed_weight_grad(grad_output, input, index)
