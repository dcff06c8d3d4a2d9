"""Eigenproblems of batches: torch's where it is fast, cuSOLVER's batched solver elsewhere."""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from lift_kernels.masks.lowrank import batched_factors
from lift_kernels.ops import symmetric_eigen as module
from lift_kernels.ops.symmetric_eigen import BatchedSolver, symmetric_eigen


def gram(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Symmetric matrices (..., n, n) with distinct eigenvalues."""
    x = torch.randn(*shape, 2 * shape[-1], generator=torch.Generator().manual_seed(shape[-1])).to(device)
    return x @ x.mT / shape[-1]


def assert_solves(matrices: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> None:
    """Vectors are orthonormal columns, A V = V diag(values), and values ascend to fp64's."""
    a, v, w = (x.double().cpu() for x in (matrices, vectors, values))
    largest = float(w.abs().max())
    torch.testing.assert_close(v.mT @ v, torch.eye(v.shape[-1]).double().expand_as(a), atol=2e-5, rtol=0.0)
    torch.testing.assert_close(a @ v, v * w[..., None, :], atol=2e-5 * largest, rtol=0.0)
    torch.testing.assert_close(w, torch.linalg.eigvalsh(a), atol=2e-5 * largest, rtol=0.0)


class Function:
    """A function of the fake library. It has a name, as those of ctypes have."""

    def __init__(self, name, body):
        self.__name__, self.body, self.calls = name, body, []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.body(*arguments) or 0


class FakeLibrary:
    """cuSOLVER's interface over NumPy. Arrays are in column-major order, as there."""

    def __init__(self, status: int = 0, info: int = 0):
        self.status, self.info = status, info
        self.cusolverDnCreate = Function("cusolverDnCreate", lambda handle: self.fill(handle, 7))
        self.cusolverDnCreateParams = Function("cusolverDnCreateParams", lambda options: self.fill(options, 9))
        self.cusolverDnXsyevBatched_bufferSize = Function("cusolverDnXsyevBatched_bufferSize", self.size)
        self.cusolverDnXsyevBatched = Function("cusolverDnXsyevBatched", self.solve)

    @staticmethod
    def fill(pointer, value):
        pointer._obj.value = value

    def checked(self, handle, options, vectors, triangle, n, type_a, a, stride, type_w, w, compute):
        assert (handle.value, options.value, vectors, triangle) == (7, 9, 1, 0)
        assert (type_a, type_w, compute) == (0, 0, 0) and n.value == stride.value
        return n.value, a.value, w.value

    def size(self, *arguments):
        self.checked(*arguments[:11])
        device, host, batch = arguments[11:]
        device._obj.value, host._obj.value = 64, 0
        assert batch.value > 0

    def solve(self, *arguments):
        n, a, w = self.checked(*arguments[:11])
        scratch, scratch_bytes, host, host_bytes, info, batch = arguments[11:]
        assert scratch.value and scratch_bytes.value == 64 and len(host) == 1 and host_bytes.value == 0
        count = batch.value

        def array(address, *shape):
            numbers = (ctypes.c_float * int(np.prod(shape))).from_address(address)
            return np.frombuffer(numbers, np.float32).reshape(shape)

        for matrix, values in zip(array(a, count, n, n), array(w, count, n)):
            lower = np.tril(matrix.T)  # of a matrix in column-major order
            values[:], vectors = np.linalg.eigh(lower)
            matrix[:] = vectors.T
        (ctypes.c_int32 * count).from_address(info.value)[count - 1] = self.info
        for i in range(count - 1):
            (ctypes.c_int32 * count).from_address(info.value)[i] = 0
        return self.status


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 33, 33)])
def test_the_batched_solver(shape):
    matrices = gram(*shape[:-1])
    before, solver = matrices.clone(), BatchedSolver(FakeLibrary())
    values, vectors, failed = solver(matrices)
    assert not failed and torch.equal(matrices, before)
    assert_solves(matrices, values, vectors)
    again = solver(matrices)
    assert torch.equal(again[0], values) and len(solver._library.cusolverDnCreate.calls) == 1


@pytest.mark.parametrize("rows", [(40,), (3, 40)])
def test_what_torch_solves_slowly_goes_to_the_batched_solver(monkeypatch, rows):
    library = FakeLibrary()
    solver = BatchedSolver(library)
    monkeypatch.setattr(module, "_slow_in_torch", lambda matrices: True)
    monkeypatch.setattr(module, "_solver", lambda: solver)
    matrices = gram(*rows)
    values, vectors = symmetric_eigen(matrices)
    assert len(library.cusolverDnXsyevBatched.calls) == 1 and vectors.shape == matrices.shape
    assert_solves(matrices, values, vectors)


def test_a_matrix_that_fails_goes_to_torch(monkeypatch):
    monkeypatch.setattr(module, "_slow_in_torch", lambda matrices: True)
    monkeypatch.setattr(module, "_solver", lambda: BatchedSolver(FakeLibrary(info=3)))
    matrices = gram(2, 40)
    assert torch.equal(symmetric_eigen(matrices)[0], torch.linalg.eigh(matrices)[0])


def test_a_status_is_an_error():
    with pytest.raises(RuntimeError, match="cuSOLVER's cusolverDnXsyevBatched returned status 6"):
        BatchedSolver(FakeLibrary(status=6))(gram(2, 40))


def test_a_library_without_the_solver(monkeypatch):
    """Before CUDA 12.6: a warning names the reason and the way out, once, and torch solves."""
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrices: None)
    monkeypatch.setattr(torch, "eye", lambda n, device: None)
    monkeypatch.setattr(module, "_loaded_library", lambda: None)  # ctypes takes None for the program itself
    module._solver.cache_clear()
    with pytest.warns(UserWarning, match="undefined symbol.*torch 2.12 or newer does not need it"):
        assert module._solver() is None
    assert module._solver() is None
    module._solver.cache_clear()


def test_cpu_tensors_go_to_torch():
    for matrices in (gram(40), gram(3, 40), gram(2, 40).double()):
        assert all(torch.equal(a, b) for a, b in zip(symmetric_eigen(matrices), torch.linalg.eigh(matrices)))


def test_torch_is_used_where_it_is_fast(monkeypatch):
    class Cuda:  # what is asked of a tensor
        is_cuda, dtype = True, torch.float32

        def __init__(self, *shape):
            self.shape = shape

        def numel(self):
            return int(np.prod(self.shape))

    for version, old in (("2.9.1", True), ("2.11.0+cu130", True), ("2.12.0", False), ("2.13.0+cpu", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert module._slow_in_torch(Cuda(5, 256, 256)) == module._slow_in_torch(Cuda(33, 33)) == old
        for shape in ((5, 32, 32), (1, 4096, 4096), (0, 64, 64)):
            assert not module._slow_in_torch(Cuda(*shape))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(192,), (1, 33), (5, 64), (32, 256), (3, 301), (2, 512)])
def test_on_a_gpu(rows):
    matrices = gram(*rows, device="cuda")
    values, vectors = symmetric_eigen(matrices)
    assert_solves(matrices, values, vectors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        doubled = symmetric_eigen(matrices * 2)[0]
    side.synchronize()
    torch.testing.assert_close(doubled, 2 * values, atol=1e-4 * float(values.max()), rtol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (300, 200)])
def test_the_exact_way_takes_a_batch_on_a_gpu(shape):
    """Factors of a batch equal those of each matrix on the CPU: the same best approximation."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    weights = [normal(shape[0], 8) @ normal(8, shape[1]) + 0.1 * normal(shape) for _ in range(3)]
    together = batched_factors([w.cuda() for w in weights], 8, method="gram")
    for found, weight in zip(together, weights):
        (right,) = batched_factors([weight], 8, method="gram")
        torch.testing.assert_close((found.left @ found.right.T).cpu(), right.left @ right.right.T, atol=1e-3, rtol=0.0)
        assert found.left.is_contiguous() and found.right.is_contiguous() and found.method == "gram"
