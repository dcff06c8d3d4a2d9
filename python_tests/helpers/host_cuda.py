"""CUDA device code of the package, compiled by the host compiler.

``host_cuda/shim.h`` replaces the CUDA built-ins. The device code is the same file, not a copy.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers.bits import HANG_S
from torch import Tensor

ROOT = Path(__file__).parents[2]
HOST_CUDA = Path(__file__).parents[1] / "host_cuda"


def compiled(source: Path, target: Path, *flags: str) -> Path:
    """Compile a source that includes the shim and device code to a program or library."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed to run the CUDA device code on the host"
    common = [
        "-std=c++20",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-pthread",
    ]
    subprocess.run(
        [compiler, *common, f"-I{HOST_CUDA}", f"-I{ROOT / 'csrc/cuda'}", *flags, source, "-o", target], check=True
    )
    return target


def library(source: Path, folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile a source to a shared library that traps on undefined behaviour."""
    trapped = ["-shared", "-fPIC", "-O2", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    return ctypes.CDLL(str(compiled(source, folder / f"{source.stem}.so", *trapped, *flags)))


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def size(tensor: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(tensor.numel())


def run(program: Path) -> subprocess.CompletedProcess:
    return subprocess.run([program], capture_output=True, text=True, timeout=HANG_S)


def mask_kernels(folder: Path) -> SimpleNamespace:
    """Stand in, on CPU tensors, for the private CUDA ops that `lift_kernels.ops.cuda` calls.

    The kernels run as fibers of one thread.
    """
    host = library(HOST_CUDA / "subspace_ops.cpp", folder, "-DSHIM_FIBERS")

    def gaussian_sketch_(block, seed, first):
        count = block.shape[1] * block.shape[2]
        host.gaussian_sketch(address(block), *numbers(len(block), count, seed, first), ctypes.c_uint(5))

    def gram(product, block, previous, edge, raised, slab_rows, partials):
        tensors = [address(x) for x in (product, block, previous, edge, raised)]
        host.gram(*tensors, *numbers(*product.shape, slab_rows), address(partials))

    def cholesky_inverse(partials, gram, scale, inverse, status):
        sizes = numbers(*partials.shape[:2], gram.shape[1])
        host.cholesky_inverse(address(partials), *sizes, *map(address, (gram, scale, inverse, status)))

    def multiply_upper_(x, inverse, status):
        host.multiply_upper(address(x), address(inverse), address(status), *numbers(*x.shape))

    ops = (gaussian_sketch_, gram, cholesky_inverse, multiply_upper_)
    return SimpleNamespace(host=host, **{op.__name__: SimpleNamespace(default=op) for op in ops})


def disorder(block):
    """The largest entry of |Q^T Q - I|, in fp64."""
    gram = block.double().mT @ block.double()
    return float((gram - torch.eye(block.shape[-1], dtype=torch.float64)).abs().max())
