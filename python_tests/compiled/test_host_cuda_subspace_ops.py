"""The CUDA subspace-iteration ops against the reference implementation.

The kernels run on the host, through the public ops.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from helpers.bits import bits
from helpers.host_cuda import HOST_CUDA, ROOT, address, compiled, disorder, run

from lift_kernels import ops
from lift_kernels.ops import reference


def blocks(batch, rows, width, seed=0, spread=0.0):
    """Random blocks whose columns share a direction.

    The larger ``spread``, the worse their condition.
    """
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(batch, rows, 1, generator=generator)
    return torch.randn(batch, rows, width, generator=generator) + spread * common


def householder_q(block):
    """The orthonormal factor of a block, by plain Householder reflections in fp32."""
    left, (rows, width), reflections = block.clone(), block.shape, []
    for j in range(width):
        v = left[j:, j].clone()
        v[0] += torch.copysign(v.norm(), v[0])
        v /= v.norm()
        left[j:, j:] -= 2 * torch.outer(v, v @ left[j:, j:])
        reflections.append(v)
    q = torch.eye(rows, width)
    for j, v in reversed(list(enumerate(reflections))):
        q[j:, j:] -= 2 * torch.outer(v, v @ q[j:, j:])
    return q


KNOWN = [  # four words of counter, two of key, four of result: the generator's published test vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_gaussian_sketch_philox_is_the_published_generator(host, counter, key, expected):
    group, matrix, seed = (low | high << 32 for low, high in (counter[:2], counter[2:], key))
    out = torch.zeros(4, dtype=torch.int32)
    host.host.philox_words(*(ctypes.c_uint64(x) for x in (group, matrix, seed)), address(out))
    assert [word & 0xFFFFFFFF for word in out.tolist()] == list(expected)
    signed = group - 2**64 if group >= 2**63 else group
    words = reference.philox(torch.tensor([signed & 0xFFFFFFFFFFFFFFFF if signed >= 0 else signed]), matrix, seed)
    if group < 2**63:  # counters of positions are smaller
        assert [int(word) for word in words] == list(expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 4), (2, 7, 3), (1, 64, 33), (0, 4, 4), (2, 0, 4)])
@pytest.mark.parametrize("seed, first", [(0, 0), (2**63 - 1, 5)])
def test_gaussian_sketch_matches_its_twin(on_host, shape, seed, first):
    found = ops.gaussian_sketch(*shape, seed=seed, first=first)
    expected = ops.gaussian_sketch(*shape, seed=seed, first=first, backend="reference")
    assert found.shape == shape and torch.allclose(found, expected, atol=4e-6, rtol=4e-6)


def test_gaussian_sketch_depends_on_seed_matrix_and_position_alone(on_host):
    batch = ops.gaussian_sketch(4, 6, 5, seed=3)
    for i in range(4):
        assert torch.equal(ops.gaussian_sketch(1, 6, 5, seed=3, first=i)[0], batch[i])
    assert torch.equal(ops.gaussian_sketch(1, 3, 5, seed=3)[0], batch[0, :3])
    assert not torch.equal(ops.gaussian_sketch(1, 6, 5, seed=4)[0], batch[0])
    out = torch.zeros(2, 30)
    on_host.host.gaussian_sketch(address(out), *map(ctypes.c_int64, (2, 30, 3, 0)), ctypes.c_uint(1))  # one block
    assert torch.equal(out.view(2, 6, 5), batch[:2])


@pytest.mark.parametrize(
    "batch, rows, width",
    [(1, 1, 1), (2, 100, 8), (1, 40, 40), (3, 70, 17), (1, 600, 64), (1, 1100, 65), (1, 140, 130), (1, 280, 270)],
)
def test_cholesky_qr_matches_its_twin(on_host, batch, rows, width):
    start, other = blocks(batch, rows, width), blocks(batch, 9, width, seed=1)
    found, expected = start.clone(), start.clone()
    found_other, expected_other = other.clone(), other.clone()
    assert ops.cholesky_qr_(found, found_other).tolist() == [0] * batch
    assert ops.cholesky_qr_(expected, expected_other, backend="reference").tolist() == [0] * batch
    # Nearly square blocks are ill-conditioned. Both methods then err by eps times the condition.
    limit = 4e-7 * float(torch.linalg.cond(start).max()) ** 2
    assert torch.allclose(found, expected, atol=max(4e-6, limit)), float((found - expected).abs().max())
    scale = float(expected_other.abs().max())
    assert torch.allclose(found_other, expected_other, atol=scale * max(4e-6, limit))


@pytest.mark.parametrize("batch, rows, width", [(2, 300, 30), (1, 700, 130), (1, 900, 270)])
@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_cholesky_qr_of_two_rounds_is_as_orthonormal_as_householder(on_host, batch, rows, width, spread):
    """The limit is the worst of several blocks.

    Householder's own error varies by chance, and from one LAPACK library to another.
    """
    block = blocks(batch, rows, width, spread=spread)
    others = [blocks(1, rows, width, seed=seed, spread=spread)[0] for seed in range(5)]
    householder = max(disorder(householder_q(other)[None]) for other in others)
    assert ops.cholesky_qr_(block, rounds=2).tolist() == [0] * batch
    assert disorder(block) <= 2 * householder


def test_cholesky_qr_of_a_batch_gives_the_bits_of_each_alone(on_host):
    batch = blocks(3, 90, 20)
    alone = [batch[i : i + 1].clone() for i in range(3)]
    ops.cholesky_qr_(batch)
    for i, block in enumerate(alone):
        ops.cholesky_qr_(block)
        assert torch.equal(block[0], batch[i])


def hard_blocks():
    """One block of each difficult kind, and the status that each gets."""
    good = blocks(1, 60, 24)[0]
    zero_column, repeated, graded, poisoned, infinite, narrow = (good.clone() for _ in range(6))
    zero_column[:, 5] = 0
    repeated[:, 20] = repeated[:, 3]
    graded *= torch.logspace(-15, 15, 24)
    poisoned[7, 9] = float("nan")
    infinite[0, 0] = float("inf")
    narrow[:, 4:] = narrow[:, :1]  # rank four
    cases = [
        (good, 0),
        (zero_column, 1),
        (repeated, 1),
        (graded, 0),
        (poisoned, 2),
        (infinite, 2),
        (narrow, 1),
        (0 * good, 1),
    ]
    return torch.stack([block for block, _ in cases]), [status for _, status in cases]


def test_cholesky_qr_of_hard_blocks_has_the_status_of_its_twin(on_host):
    start, expected = hard_blocks()
    for backend in (None, "reference"):
        block, other = start.clone(), start.clone()
        assert ops.cholesky_qr_(block, other, backend=backend).tolist() == expected
        for i, status in enumerate(expected):
            if status == 2:  # unchanged, like the other block
                assert torch.equal(bits(block[i]), bits(start[i]))
                assert torch.equal(bits(other[i]), bits(start[i]))
            else:
                assert block[i].isfinite().all()
            if status == 0:
                assert disorder(block[i]) < 1e-4
        # After a shift, columns are in the span, better conditioned and never longer than one.
        assert float(block[[1, 2, 6]].norm(dim=1).max()) < 1 + 1e-3


def test_cholesky_qr_of_an_other_block_without_rows(on_host):
    block = blocks(2, 30, 8)
    assert ops.cholesky_qr_(block, torch.zeros(2, 0, 8)).tolist() == [0, 0] and disorder(block) < 1e-5


def shifted(tensor):
    """The same numbers at an address 4 bytes after a 16-byte boundary.

    The library traps on a misaligned access.
    """
    memory = torch.empty(tensor.numel() + 5)
    first = (4 - memory.data_ptr() // 4 % 4) % 4 + 1
    view = memory[first : first + tensor.numel()].view(tensor.shape)
    assert view.data_ptr() % 16 == 4
    return view.copy_(tensor)


def test_mask_kernels_take_views_off_the_boundaries_of_wide_accesses(on_host):
    product, block, previous, edge = (
        (blocks(2, 40, 8, seed=seed) for seed in range(3)),
        None,
        None,
        torch.tensor([0.5, 2.0]),
    )
    product, block, previous = product
    expected, _ = ops.chebyshev_step_(product, block.clone(), previous, edge)
    found, _ = ops.chebyshev_step_(shifted(product), shifted(block), shifted(previous), edge)
    assert torch.equal(found, expected)
    aligned, off = block.clone(), shifted(block)
    assert ops.cholesky_qr_(aligned, off).tolist() == [0, 0]
    assert torch.equal(aligned, off)
    sketch = shifted(torch.zeros(2, 5, 8))
    on_host.gaussian_sketch_.default(sketch, 3, 0)
    assert torch.equal(sketch, ops.gaussian_sketch(2, 5, 8, seed=3))


def test_cholesky_qr_of_an_empty_batch(on_host):
    assert ops.cholesky_qr_(torch.zeros(0, 8, 4), torch.zeros(0, 3, 4), rounds=2).shape == (0,)


@pytest.mark.parametrize("shape", [(1, 30, 8), (2, 600, 65), (1, 50, 33)])
@pytest.mark.parametrize("first", [True, False])
def test_chebyshev_step_matches_its_twin(on_host, shape, first):
    product, block, previous = (blocks(*shape, seed=seed) for seed in range(3))
    edge = torch.linspace(0.5, 2.0, shape[0])
    other, expected_block = block.clone(), block.clone()
    found, status = ops.chebyshev_step_(product, other, None if first else previous, edge)
    expected, expected_status = ops.chebyshev_step_(
        product, expected_block, None if first else previous, edge, backend="reference"
    )
    assert status.tolist() == expected_status.tolist() == [0] * shape[0]
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(
        other, expected_block, atol=1e-5 * float(expected_block.abs().max())
    )


def test_chebyshev_step_reports_a_block_that_is_not_finite(on_host):
    product, block = blocks(2, 30, 8), blocks(2, 30, 8, seed=1)
    product[1, 3, 3] = float("nan")
    for backend in (None, "reference"):
        assert ops.chebyshev_step_(product, block.clone(), None, torch.ones(2), backend=backend)[1].tolist() == [
            0,
            2,
        ]


BARRIERS = [
    number
    for number, line in enumerate((ROOT / "csrc/cuda/subspace_ops.cuh").read_text().splitlines(), 1)
    if re.fullmatch(r" *__sync(threads|warp)\(\);", line)
]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_mask_kernels_run_clean_under_sanitizers(tmp_path, sanitizer):
    done = run(compiled(HOST_CUDA / "subspace_ops.cpp", tmp_path / "clean", f"-fsanitize={sanitizer}"))
    assert (done.returncode, done.stdout, done.stderr) == (0, 4 * "0 orthonormal, " + "1, 2, ", "")


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 5, 8, 15])  # in the Gram matrix, in the factor, between panels, in the product
def test_mask_kernels_without_a_barrier_are_a_race(tmp_path, nth):
    drop = f"-DSHIM_DROP_LINE={BARRIERS[nth]}"
    done = run(compiled(HOST_CUDA / "subspace_ops.cpp", tmp_path / "race", "-fsanitize=thread", drop))
    assert done.returncode != 0 and "data race" in done.stderr
