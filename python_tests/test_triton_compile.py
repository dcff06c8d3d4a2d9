"""The Triton kernels compiled for sm_80, sm_90 and sm_100: no spills, 128-bit accesses on every contiguous stream,
products on the tensor cores."""

from __future__ import annotations

import pytest
import triton_compile


@pytest.fixture(scope="module")
def compiled():
    """Records by (case, target)."""
    return {(record.case, record.target): record for record in triton_compile.survey()}


@pytest.mark.parametrize("target", triton_compile.TARGETS)
@pytest.mark.parametrize("case", triton_compile.CASES, ids=lambda case: case.name)
def test_triton_compile(compiled, case, target):
    record = compiled[case.name, target]
    assert record.stack_bytes == record.local_bytes == record.local_accesses == 0, "registers were spilled"
    if case.loads is None:
        assert bool(record.products) == case.tensor_cores, "a product by other units than it should be"
        return
    assert record.registers <= 128, "fewer than 512 threads would fit on a multiprocessor"
    assert record.wide_loads == record.needed_loads, "a contiguous stream is not read 128 bits at a time"
    assert record.wide_stores == record.needed_stores, "a contiguous stream is not written 128 bits at a time"


@pytest.mark.parametrize("target", triton_compile.TARGETS)
@pytest.mark.parametrize("case", [c for c in triton_compile.CASES if c.name.startswith("lowrank_topk")], ids=lambda c: c.name)
def test_triton_compile_tiles(compiled, case, target):
    """Products run on the tensor cores, and factors whose rows are aligned reach shared memory 128 bits at a time."""
    record = compiled[case.name, target]
    assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[target] in record.products
    if case.multiples:
        assert record.wide_copies > 0 and record.narrow_copies == 0


@pytest.mark.parametrize("target", triton_compile.TARGETS)
def test_triton_compile_passes_agree(compiled, target):
    """All passes over a low-rank product multiply with the same instructions, so that they see the same bits."""
    passes = [case.name for case in triton_compile.CASES if case.name.startswith("lowrank_topk")]
    assert len(passes) > 1 and len({compiled[name, target].products for name in passes}) == 1


def test_triton_compile_covers_every_kernel():
    """Each kernel of the package has a case, so that a new one cannot be forgotten."""
    import importlib
    import pkgutil

    from lift_kernels import triton_kernels

    kernels = set()
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        names = vars(importlib.import_module(f"lift_kernels.triton_kernels.{module.name}"))
        kernels |= {f"{module.name}.{name}" for name in names if name.startswith("_") and name.endswith("_kernel")}
    assert kernels == {case.kernel for case in triton_compile.CASES}
