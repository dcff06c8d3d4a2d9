"""The moments of the sketch, and the bad input that subspace-iteration ops refuse."""

from __future__ import annotations

import math

import pytest
import torch

from lift_kernels import ops
from lift_kernels.cli import selfcheck
from lift_kernels.ops import dispatch

COUNT = 10_000_000


def test_gaussian_sketch_has_the_moments_of_a_normal_distribution():
    """Mean, variance, skewness, kurtosis and correlation of ten million numbers are right.

    They lie within five standard errors.
    """
    numbers = ops.gaussian_sketch(4, 2500, 1000, seed=11).double()
    flat = numbers.flatten()

    def within(value, expected, deviation, count=COUNT):
        assert abs(float(value) - expected) <= 5 * deviation / math.sqrt(count), float(value)

    within(flat.mean(), 0, 1)
    within(flat.square().mean(), 1, math.sqrt(2))
    within(flat.pow(3).mean(), 0, math.sqrt(15))
    within(flat.pow(4).mean(), 3, math.sqrt(96))
    for lag in (1, 2, 3, 4, 1000):  # neighbours within a counter and beyond, and down a column
        within((flat[:-lag] * flat[lag:]).mean(), 0, 1, COUNT - lag)
        within((flat[:-lag].square() * flat[lag:].square()).mean(), 1, math.sqrt(8), COUNT - lag)
    within((numbers[0] * numbers[1]).mean(), 0, 1, COUNT // 4)  # two matrices
    within((ops.gaussian_sketch(4, 2500, 1000, seed=12).double() * numbers).mean(), 0, 1)  # two seeds
    assert 5.0 < float(flat.abs().max()) < 7.0


def test_gaussian_sketch_in_bf16_is_the_rounded_one():
    rounded = ops.gaussian_sketch(2, 9, 7, seed=1, dtype=torch.bfloat16)
    assert torch.equal(rounded, ops.gaussian_sketch(2, 9, 7, seed=1).bfloat16())


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((1, 2, 3), {"seed": 2**63}, ValueError, r"seed must be an integer from 0 to 2\^63-1, got 9223372036854775808"),
        ((1, 2, 3), {"seed": -1}, ValueError, r"seed must be an integer from 0 to 2\^63-1, got -1"),
        ((1, 2, 3), {"seed": 0, "first": -2}, ValueError, "first must be an integer from 0"),
        ((1, -2, 3), {"seed": 0}, ValueError, "rows must be an integer of at least 0, got -2"),
        (
            (1, 2, 3),
            {"seed": 0, "dtype": torch.float16},
            TypeError,
            "the dtype of a sketch must be float32 or bfloat16, got torch.float16",
        ),
        (
            (1, 2, 3),
            {"seed": 0, "backend": "triton"},
            RuntimeError,
            "the op has native-cuda, reference; choose one of these",
        ),
        ((1, 2, 3), {"seed": 0, "backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_gaussian_sketch_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.gaussian_sketch(*arguments, **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"block": torch.ones(2, 3, 4)}, ValueError, "4 columns of 3 rows cannot be orthonormal"),
        ({"block": torch.ones(2, 3, 0), "other": None}, ValueError, "0 columns of 3 rows"),
        ({"block": torch.ones(6, 4)}, ValueError, r"block must be contiguous \(b, n, l\), got torch.float32 \(6, 4\)"),
        ({"block": torch.ones(2, 4, 6).mT}, ValueError, "block must be contiguous"),
        ({"block": torch.ones(2, 6, 4, dtype=torch.float64)}, TypeError, "block must be float32, got torch.float64"),
        (
            {"other": torch.ones(2, 6, 3)},
            ValueError,
            r"other must have the batch size and the columns of block \(2, 6, 4\)",
        ),
        ({"other": torch.ones(1, 6, 4)}, ValueError, "other must have the batch size"),
        ({"other": torch.ones(2, 6, 4, device="meta")}, ValueError, "other is on meta, block on cpu"),
        ({"rounds": 3}, ValueError, "rounds must be 1 or 2, got 3"),
        ({"backend": "native-cpu"}, RuntimeError, "the op has native-cuda, reference; choose one of these"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_cholesky_qr_bad_input(change, error, message, grad):
    block, other = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    arguments = {"block": block, "other": other} | change
    before = block.clone(), other.clone()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        ops.cholesky_qr_(**arguments)
    assert torch.equal(block, before[0]) and torch.equal(other, before[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"edge": torch.ones(3)}, r"edge must be contiguous float32 \(2,\) on cpu, got torch.float32 \(3,\)"),
        ({"edge": torch.ones(2).double()}, "edge must be contiguous float32"),
        ({"edge": torch.ones(1).expand(2)}, r"edge must be contiguous float32 \(2,\) on cpu, .* strides \(0,\)"),
        ({"edge": torch.ones(2, 3)[:, 0]}, r"strides \(3,\)"),
        ({"previous": torch.ones(2, 6, 3)}, r"previous must be contiguous float32 \(2, 6, 4\)"),
        ({"product": torch.ones(2, 5, 4)}, "product must be contiguous float32"),
        ({"block": torch.ones(2, 3, 4)}, "4 columns of 3 rows cannot be orthonormal"),
    ],
)
def test_chebyshev_step_bad_input(change, message):
    arguments = {name: torch.randn(2, 6, 4) for name in ("product", "block", "previous")} | {"edge": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        ops.chebyshev_step_(**(arguments | change))


def test_chebyshev_step_is_the_recurrence():
    """Against fp64: the span of 2 ((2/a) Z - X) - X_previous, and X in the same coordinates."""
    generator = torch.Generator().manual_seed(0)
    product, block, previous = (torch.randn(2, 30, 5, generator=generator) for _ in range(3))
    edge = torch.tensor([0.5, 3.0])
    raised = 2 * ((2 / edge.double())[:, None, None] * product.double() - block.double()) - previous.double()
    q, r = torch.linalg.qr(raised)
    sign = r.diagonal(dim1=-2, dim2=-1).sign()  # Cholesky's R has a positive diagonal
    expected, other = q * sign[:, None], block.double() @ torch.linalg.inv(r * sign[:, :, None])
    found, status = ops.chebyshev_step_(product, block, previous, edge)
    assert status.tolist() == [0, 0]
    assert torch.allclose(found.double(), expected, atol=3e-6) and torch.allclose(block.double(), other, atol=3e-6)


def test_cholesky_qr_without_a_second_block_where_gradients_are_recorded():
    """The call goes through the dispatcher.

    torch 2.11 fails on a written argument that a call leaves at its default.
    """
    block = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    assert torch.is_grad_enabled()
    assert ops.cholesky_qr_(block).tolist() == [0, 0]
    torch.testing.assert_close(block.mT @ block, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)
    defaults = {
        a.name: a.has_default_value()
        for a in torch.ops.lift_kernels.cholesky_qr_.default._schema.arguments
        if a.is_write
    }
    assert defaults == {"block": False, "other": False}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, rows, width", [(1, 1, 1), (3, 100, 17), (2, 700, 64), (5, 4096, 128), (2, 1100, 130), (1, 5000, 512)]
)
def test_helpers_on_a_gpu_match_their_twins(batch, rows, width):
    sketch = ops.gaussian_sketch(batch, rows, width, seed=3, device="cuda", backend="native-cuda")
    assert torch.allclose(sketch.cpu(), ops.gaussian_sketch(batch, rows, width, seed=3), atol=4e-6, rtol=4e-6)
    edge = torch.linspace(0.5, 2.0, batch, device="cuda")
    results = []
    for backend in ("native-cuda", "reference"):
        block, other = sketch.clone(), sketch.flip(1).contiguous()
        assert ops.cholesky_qr_(block, other, rounds=2, backend=backend).tolist() == [0] * batch
        step, status = ops.chebyshev_step_(sketch, other, block, edge, backend=backend)
        results.append((block, step, other, status))
    for found, expected in zip(*results):
        assert torch.allclose(found, expected, atol=2e-4 * max(1.0, float(expected.abs().max())))
    gram = results[0][0].mT @ results[0][0]
    assert float((gram - torch.eye(width, device="cuda")).abs().max()) <= 2e-5


@pytest.mark.gpu
def test_helpers_on_a_gpu_with_hard_blocks():
    good = ops.gaussian_sketch(1, 60, 24, seed=0)[0]
    repeated, poisoned = good.clone(), good.clone()
    repeated[:, 20], poisoned[7, 9] = repeated[:, 3], float("nan")
    for backend in ("native-cuda", "reference"):
        block = torch.stack([good, repeated, poisoned, 0 * good]).cuda()
        assert ops.cholesky_qr_(block, backend=backend).tolist() == [0, 1, 2, 1]


@pytest.mark.gpu
def test_the_doctor_finds_the_helpers_sound_on_a_gpu():
    assert selfcheck.check_backend("native-cuda", "cuda") == []


def test_the_doctor_compares_the_helpers_with_their_twins(monkeypatch):
    only_cuda = [op for op, names in dispatch.OPS.items() if "native-cpu" not in names]
    assert [selfcheck.CASES[op]("reference", "cpu")[0] for op in only_cuda] == [0.0] * 4
    qr = ops.cholesky_qr_
    monkeypatch.setattr(ops, "cholesky_qr_", lambda block, *, backend: qr(block, backend=backend) if backend else None)
    error, limit = selfcheck._qr(None, "cpu")
    assert error > limit


def test_helpers_on_meta_tensors_give_shapes():
    block = torch.empty(2, 6, 4, device="meta")
    with torch.no_grad():
        assert ops.cholesky_qr_(block).shape == (2,)
