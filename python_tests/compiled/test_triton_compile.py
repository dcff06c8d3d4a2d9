"""The Triton kernels, compiled for sm_80, sm_90 and sm_100, and products for sm_75 and sm_120.

They have no spills, 128-bit accesses on every contiguous stream of which a thread has so much, no
accesses of single codes, and products on the tensor cores of cards that have them. `make report`
compiles for more targets.
"""

from __future__ import annotations

import pytest
from triton.backends.compiler import GPUTarget

from bench.kernels.cases import CASES, TESTED, TESTED_PRODUCTS

pytestmark = pytest.mark.slow
PASSES = [case for case in CASES if case.name.startswith("lowrank_topk")]
PRODUCT_TARGETS = (*TESTED, *TESTED_PRODUCTS)
TESTED_CASES = [(case, target) for case in CASES for target in case.targets(tested=True)]


@pytest.fixture(scope="module")
def compiled(kernels):
    """Records by (case, target)."""
    return {(record.kernel, record.target): record for record in kernels}


@pytest.mark.parametrize("case, target", TESTED_CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_triton_compile(compiled, case, target):
    record = compiled[case.name, target]
    assert record.stack_bytes == record.local_bytes == record.spills == 0, "registers were spilled"
    if case.loads is None:
        on_tensor_cores = case.tensor_cores and target >= 80
        assert bool(record.products) == bool(record.tensor_cores) == on_tensor_cores, (
            "a product by other units than it should be"
        )
        return
    assert record.registers <= 128, "fewer than 512 threads would fit on a multiprocessor"
    # Without copies past the registers, factors of a low-rank product are read 128 bits at a time.
    factors = 3 if case in PASSES and case.multiples and target == 75 else 0
    assert record.wide_loads == case.needed(case.loads) + factors, "a contiguous stream is not read 128 bits at a time"
    assert record.wide_stores == case.needed(case.stores), "a contiguous stream is not written 128 bits at a time"
    assert case.single_bytes is None or record.single_bytes <= case.single_bytes, "codes move byte by byte"


@pytest.mark.parametrize("target", PRODUCT_TARGETS)
@pytest.mark.parametrize("case", PASSES, ids=lambda case: case.name)
def test_triton_compile_tiles(compiled, case, target):
    """Products run on the tensor cores, but on sm_75, which has none for TF32.

    Factors with aligned rows are copied to shared memory 128 bits at a time.
    """
    record = compiled[case.name, target]
    if target == 75:
        assert record.products == record.tensor_cores == "" and record.wide_copies + record.narrow_copies == 0
        return
    products = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    assert products[target] in record.products
    assert {80: " HMMA.", 90: " HGMMA.", 100: " UTCHMMA", 120: " HMMA."}[target] in record.tensor_cores
    assert case.wide_copies == bool(case.multiples)
    if case.multiples:
        assert record.wide_copies > 0 and record.narrow_copies == 0


@pytest.mark.parametrize("target", [target for target in PRODUCT_TARGETS if target >= 80])
@pytest.mark.parametrize("case", [case for case in PASSES if case.multiples], ids=lambda case: case.name)
def test_triton_compile_copies_tiles_ahead(compiled, case, target):
    """Before the loop copies of all stages but one are under way, and the loop asks for one more.

    With one buffer, each copy would wait for the product before it.
    """
    record, launch = compiled[case.name, target], case.by_target(GPUTarget("cuda", target, 32))
    copies = (launch["ROWS"] + launch["COLUMNS"]) * launch["DEPTH"] * 4 // 16 // record.threads
    assert launch["num_stages"] >= 3 and record.wide_copies == launch["num_stages"] * copies
    assert record.static_shared + record.dynamic_shared >= 2 * copies * record.threads * 16


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("target", PRODUCT_TARGETS)
def test_triton_compile_passes_agree(compiled, target, odd):
    """All passes over one low-rank product multiply with the same instructions.

    Only then do they see the same bits.
    """
    names = [case.name for case in PASSES if case.name.endswith("odd rank") == odd]
    assert len(names) == 3 and len({compiled[name, target].products for name in names}) == 1


@pytest.mark.parametrize("target", [90, 100])
def test_triton_compile_of_a_fused_weight_gradient_lets_two_programs_share_a_multiprocessor(compiled, target):
    """So one program's copies and stores run beside the product of the other.

    A multiprocessor of these targets has 65,536 registers and 228 KiB of shared memory.
    """
    for name in ("bf16 to fp32", "fp16 to fp32", "bf16 to bf16"):
        record = compiled[f"packed_weight_grad: {name}", target]
        assert record.threads * record.registers <= 65536 // 2
        assert record.static_shared + record.dynamic_shared <= 113 * 1024


def test_triton_compile_covers_every_kernel():
    """Each kernel of the package has a case, so a new kernel cannot be forgotten."""
    import importlib
    import pkgutil

    from lift_kernels.ops import triton

    kernels = set()
    for module in pkgutil.iter_modules(triton.__path__):
        names = vars(importlib.import_module(f"lift_kernels.ops.triton.{module.name}"))
        kernels |= {f"{module.name}.{name}" for name in names if name.startswith("_") and name.endswith("_kernel")}
    assert kernels == {case.kernel for case in CASES}
