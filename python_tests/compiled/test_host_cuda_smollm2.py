"""The CUDA subspace-iteration ops on real matrices.

Masks agree with those of the reference implementation, and blocks are as orthonormal as by
Householder QR.

`compare` takes any matrices. The tests use one layer of SmolLM2-135M. csrc/README.md has the
results of all 210 matrices.
"""

from __future__ import annotations

import pytest
import torch
from helpers.host_cuda import disorder

from lift_kernels import ops
from lift_kernels.finetune import model_io
from lift_kernels.masks.lowrank import low_rank_factors
from lift_kernels.masks.selection import largest_indices

pytestmark = pytest.mark.slow
RANK, DENSITY = 64, 0.05


@pytest.fixture(scope="module")
def layer():
    """The seven matrices of the middle layer."""
    model, _ = model_io.load_model(model_io.find_model(None), torch.float32)
    return {
        name: module.weight.detach()
        for name, module in model.model.layers[15].named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def compare(weight: torch.Tensor, monkeypatch) -> dict[str, float]:
    """Compare the CUDA ops with the reference implementation on these matrices.

    Returns the overlap of the masks, and the largest |Q^T Q - I| over all blocks, both of two
    rounds and of Householder QR.
    """
    k = round(DENSITY * weight.numel())

    def mask():
        factors = low_rank_factors(weight, RANK, method="chebyshev")
        return largest_indices((factors.left @ factors.right.T).abs(), k), factors.passes

    met = []
    step = ops.chebyshev_step_

    def kept(product, block, previous, edge):
        raised = 2 / edge[:, None, None] * product - block
        met.append(raised if previous is None else 2 * raised - previous)
        return step(product, block, previous, edge)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "chebyshev_step_", kept)
        found, passes = mask()
    blocks = [met[0], met[-1]]  # the block of the worst condition, and one near the end
    householder = max(disorder(torch.linalg.qr(block).Q) for block in blocks)
    for block in blocks:
        assert ops.cholesky_qr_(block, rounds=2).tolist() == [0]
    with monkeypatch.context() as patch:
        for name in ("gaussian_sketch", "cholesky_qr_", "chebyshev_step_"):
            patch.setattr(ops, name, _by_reference(getattr(ops, name)))
        expected, reference_passes = mask()
    return {
        "overlap": float(torch.isin(found, expected).double().mean()),
        "passes": passes,
        "reference passes": reference_passes,
        "disorder": max(map(disorder, blocks)),
        "householder": householder,
    }


def _by_reference(op):
    return lambda *arguments, **options: op(*arguments, **options, backend="reference")


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.gate_proj"])
def test_mask_kernels_on_a_real_matrix(layer, on_host, monkeypatch, name):  # noqa: F811
    found = compare(layer[name], monkeypatch)
    assert found["overlap"] >= 0.998 and found["passes"] == found["reference passes"]
    assert found["disorder"] <= 2 * found["householder"]
