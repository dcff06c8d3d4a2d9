"""What a card lacks for products, and the launch options that depend on the card.

A target is Triton's name of a kind of card: ``GPUTarget("cuda", 90, 32)``, whose architecture is
the compute capability, or ``GPUTarget("hip", "gfx942", 64)``. Each dict of options holds all that a
launch adds to its arguments: constants of the kernel and options of the compiler.
"""

from __future__ import annotations

import functools

import torch
import triton
from triton.backends.compiler import GPUTarget

from .. import dispatch

ASSUMED = GPUTarget("cuda", 90, 32)
"""The target where no card runs anything: in Triton's interpreter, and on fake tensors."""

CODED_REGISTERS = {4: 128, 8: 80}
"""Registers of a thread in a step of 8-bit moments, by the warps of a program.

Four or three programs then fit on a multiprocessor, and nothing spills. Without a limit, some forms
take 134 or 90. Segments that are not aligned have none, because they would spill on sm_120.
"""

TRITON_3_7 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
"""Whether the compiler is Triton 3.7 or later.

Triton 3.6 spills in square tiles of weight gradients, and in a limited low-rank product on sm_120.
"""


def target_of(device: torch.device) -> GPUTarget:
    """Return the target of a CUDA or AMD device, which torch calls ``cuda`` alike."""
    if device.type != "cuda" or dispatch.interpreting():
        return ASSUMED
    return _target(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _target(index: int) -> GPUTarget:
    if not torch.cuda.is_available():
        return ASSUMED
    if torch.version.hip is not None:
        found = torch.cuda.get_device_properties(index)
        return GPUTarget("hip", found.gcnArchName.split(":")[0], found.warp_size)
    major, minor = torch.cuda.get_device_capability(index)
    return GPUTarget("cuda", 10 * major + minor, 32)


def has_tensor_cores(target: GPUTarget) -> bool:
    """Return whether Triton multiplies bf16 and fp16 by tensor cores.

    It does so from sm_80 on, and on AMD. The tensor cores of older cards know neither bf16 nor
    TF32, and Triton leaves them unused for fp16, too.
    """
    return target.backend != "cuda" or target.arch >= 80


def has_tf32(target: GPUTarget) -> bool:
    """Return whether a product of fp32 tiles can be in TF32: from sm_80 on, and on gfx942."""
    return target.arch >= 80 if target.backend == "cuda" else target.arch == "gfx942"


def lacks(target: GPUTarget) -> str:
    """Return what is slow on a card because it lacks units, or an empty string."""
    if has_tensor_cores(target):
        return ""
    return (
        "it has no tensor cores for bf16 and TF32: every op works, but lowrank_topk and packed_weight_grad(fused=True) "
        "multiply in exact fp32, which is slow; leave out fused, and prefer float16 to bfloat16 in products"
    )


def step_options(device: torch.device, *, late: bool, coded: bool, aligned: bool) -> dict:
    """Return the options of a step.

    Args:
        device: that it runs on.
        late: a block waits for its weights last, and its streams are short. More warps hide that:
            on an H100, 5.7 ms and not 6.0 for LLaMA-2-7B with bf16 moments and gradients.
        coded: the moments are 8-bit codes.
        aligned: so are the segments.
    """
    warps = 8 if late else 4
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if coded and aligned and target_of(device).backend == "cuda":
        options["maxnreg"] = CODED_REGISTERS[warps]
    return options


@functools.cache
def lowrank_options(target: GPUTarget, *, wide: bool, histogram: bool = False) -> dict:
    """Return the options of a pass over a low-rank product.

    All passes over one product multiply alike, since they must see the same bits. Three TF32
    products of split factors make one product with fp32 error on tensor cores. On other cards the
    product is of fp32, which on AMD's CDNA is done by matrix cores as well.

    Args:
        target: of the card.
        wide: the rank is a multiple of 32.
        histogram: the pass makes a histogram. Others keep candidates or ties.
    """
    tf32x3 = target.backend == "cuda" and has_tf32(target)
    options: dict[str, object] = {"ROWS": 128, "COLUMNS": 64, "DEPTH": 16}
    options["PRECISION"] = "tf32x3" if tf32x3 else "ieee"
    options |= {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
    if wide and _multiplies_by_four_warps(target):
        # An H200 scans 11 matrices of 11008 x 4096 in 2.57 ms, and in 3.04 ms at a depth of 16.
        # Elsewhere it takes more registers than there are.
        options["DEPTH"] = 32
    limited = range(90, 140 if TRITON_3_7 and not histogram else 120)
    if target.backend == "cuda" and target.arch in limited:
        # Two programs then fit on a multiprocessor, so that one multiplies while the other selects.
        # Elsewhere the compiler needs fewer registers when it has no limit.
        options["maxnreg"] = 128
    return options


def _multiplies_by_four_warps(target: GPUTarget) -> bool:
    """Return whether four warps multiply together, which takes few registers: sm_90 to sm_110."""
    return target.backend == "cuda" and 90 <= target.arch < 120


@functools.cache
def weight_grad_options(target: GPUTarget, *, fp32: bool, tf32: bool) -> dict:
    """Return the options of the fused weight gradient.

    Args:
        target: of the card.
        fp32: the factors are fp32. Else they are bf16 or fp16.
        tf32: a product of fp32 may be in TF32. It is exact where the card has no TF32.
    """
    tf32 = tf32 and has_tf32(target)
    exact = not has_tensor_cores(target) or (fp32 and not tf32)
    # The sides of a tile of the gradient, and the tokens of one step of the product. The columns
    # are a multiple of 32, the bits of a word of the bitmap.
    options: dict[str, object] = {"ROWS": 128, "COLUMNS": 64, "TOKENS": 32, "num_stages": 3}
    # A large tile reads less. On other cards it takes most registers, and so does an exact product.
    # For one layer of LLaMA-2-7B and 2048 tokens an H200 takes 1.6 ms with the square tile, 2.4
    # with the high one, and 4.2 without. Triton 3.6 spills in the square one.
    if _multiplies_by_four_warps(target) and not exact:
        if TRITON_3_7:
            options |= {"COLUMNS": 128, "num_stages": 3 if fp32 else 4}
        else:
            options |= {"ROWS": 256, "TOKENS": 32 if fp32 else 64}
    options |= {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": exact and not fp32}
    return options | {"BAND": 16, "num_warps": 8}
