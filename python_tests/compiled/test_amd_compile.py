"""The Triton kernels, compiled for AMD's gfx942. Nothing is run there."""

from __future__ import annotations

import pytest

from bench.kernels import amd
from bench.kernels.cases import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled():
    return {record.kernel: record for record in amd.survey()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_amd_compile(compiled, case):
    """A code object without spills, whose products run on the matrix cores."""
    record = compiled[case.name]
    assert record.target == "gfx942" and record.code_bytes > 0
    assert record.spills == record.scratch == 0, "registers were spilled"
    assert record.shared <= amd.LOCAL_MEMORY
    assert bool(record.products) == (case.by_target is not None)


@pytest.mark.parametrize(
    "name, unit",
    [
        ("lowrank_topk: candidates", "f32"),  # Matrix cores of CDNA multiply fp32.
        ("packed_weight_grad: bf16 to fp32", "bf16"),
        ("packed_weight_grad: fp16 to fp32", "f16"),
        ("packed_weight_grad: fp32 by tf32 to fp32", "xf32"),
        ("packed_weight_grad: fp32 by ieee to fp32", "f32"),
    ],
)
def test_amd_compile_units(compiled, name, unit):
    assert compiled[name].products.endswith(f"_{unit}")


def test_amd_compile_passes_agree(compiled):
    """All passes over a low-rank product multiply with the same instructions."""
    passes = {record.products.split()[-1] for name, record in compiled.items() if name.startswith("lowrank_topk")}
    assert passes == {"v_mfma_f32_32x32x2_f32"}
