"""The precision of products: bf16 terms, and torch's switches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lift_kernels.ops import precision
from lift_kernels.ops.precision import bf16_product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def factors(m=7, k=40, n=5, batch=3, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(batch, *shape, generator=generator) for shape in ((m, k), (k, n)))
    return a.bfloat16().to(device), b.to(device)


def error(product, a, b):
    """The largest error, as a part of the sum of absolute terms."""
    terms = a.double().abs() @ b.double().abs()
    return float(((product.double() - a.double() @ b.double()).abs() / terms).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("terms", "least", "most"), [(1, 2.0**-12, 2.0**-9), (2, 2.0**-21, 2.0**-17), (3, 0.0, 2.0**-22)]
)
def test_each_term_adds_eight_digits(terms, least, most, device):
    a, b = factors(device=device)
    product = bf16_product(a, b, terms)
    assert product.dtype == torch.float32 and product.shape == (3, 7, 5) and product.is_contiguous()
    assert least <= error(product, a, b) <= most


@pytest.mark.parametrize("device", DEVICES)
def test_one_term_is_b_rounded(device):
    a, b = factors(device=device)
    rounded = bf16_product(a, b.bfloat16())
    assert torch.equal(bf16_product(a, b), rounded)
    torch.testing.assert_close(rounded, a.float() @ b.bfloat16().float(), atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_transposed_and_sliced_factors(terms, device):
    a, b = factors(m=40, k=7, n=12, device=device)
    expected = a.mT.double() @ torch.ones(3, 40, 4, device=device).double()
    ones = torch.ones(3, 4, 40, device=device).mT
    assert torch.equal(bf16_product(a.mT, ones, terms).double(), expected.float().double())
    sliced = bf16_product(a[:, ::2], b[:, :, 1::3], terms)
    assert sliced.shape == (3, 20, 4) and error(sliced, a[:, ::2], b[:, :, 1::3]) <= 2.0**-8


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (4, 3, 0), (1, 1, 1)])
def test_empty_and_single_products(terms, m, k, n):
    a, b = torch.full((2, m, k), 1.5).bfloat16(), torch.full((2, k, n), 2.0)
    assert torch.equal(bf16_product(a, b, terms), torch.full((2, m, n), 3.0 * k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_one_block_for_a_whole_batch(terms, device):
    a, b = factors(device=device)
    assert torch.equal(bf16_product(a, b[1], terms), bf16_product(a, b[1].expand(3, -1, -1), terms))


def test_what_is_not_finite_stays_so():
    a, b = factors()
    b[0, 3, 2], b[1, 0, 0] = float("nan"), float("inf")
    for terms in (1, 2, 3):
        product = bf16_product(a, b, terms)
        assert not product[0, :, 2].isfinite().any() and not product[1, :, 0].isfinite().any()
        assert product[2].isfinite().all() and product[0, :, :2].isfinite().all()


def test_a_gpu_reads_the_weights_once(monkeypatch):
    """All terms are in one product."""
    calls = []
    monkeypatch.setattr(precision, "_with_fp32_sums", lambda a, b: calls.append(b.shape) or a.float() @ b.float())
    bf16_product(*factors(), terms=2)
    assert calls == [(3, 40, 10)]


@pytest.mark.parametrize(
    ("capability", "hip", "fast"),
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), ((9, 4), "6.4", False)],
)
def test_cards_without_bf16_multiply_in_fp32(capability, hip, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    precision._capability.cache_clear()
    assert precision.has_bf16_products(torch.device("cuda", 0)) == fast
    assert not precision.has_bf16_products(torch.device("cpu"))
    precision._capability.cache_clear()


PRECISIONS = """
import torch
from types import SimpleNamespace
from lift_kernels.ops.precision import matmul_precision, tf32_allowed
matmul = torch.backends.cuda.matmul
tuned = [True]  # TunableOp, which a CPU build of torch lacks
torch.cuda.tunable.is_enabled, torch.cuda.tunable.enable = lambda: tuned[-1], tuned.append
{start}
assert tf32_allowed() == {tf32}
def read(get):
    try:
        return get()
    except RuntimeError:
        return "refused"
def state():
    ways = lambda: matmul.allow_tf32, lambda: matmul.fp32_precision, torch.get_float32_matmul_precision
    return [read(get) for get in ways]
before = state()
on_a_gpu = SimpleNamespace(is_cuda=True)
for precision in ("tf32", "ieee"):
    try:
        with matmul_precision(on_a_gpu, precision):
            assert matmul.fp32_precision == precision and not torch.cuda.tunable.is_enabled()
            raise KeyError
    except KeyError:
        pass
    assert state() == before, (state(), before)
    assert torch.cuda.tunable.is_enabled()
"""


@pytest.mark.parametrize(
    ("start", "tf32"),
    [
        ("", False),
        ("torch.set_float32_matmul_precision('highest')", False),
        ("matmul.allow_tf32 = True", True),
        ("torch.set_float32_matmul_precision('medium')", True),
        ("matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'", False),
    ],
)
def test_the_precision_of_products_comes_back(start, tf32):
    """This holds for each of torch's switches.

    Some of them cannot be read once another was set.
    """
    done = subprocess.run(
        [sys.executable, "-c", PRECISIONS.format(start=start, tf32=tf32)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
