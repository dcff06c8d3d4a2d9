"""The step over all matrices of a model, against torch.optim.AdamW(fused=True).

It is one launch. Both work on the same tensors. Bytes of the roofline: distinct 32-byte sectors of
weights (read and written) and dense gradients (read) that selected entries lie on, and the packed
streams, as in `bench_sparse_adamw`. Dense: 7 times the weights' bytes. A step moves gigabytes, so
the L2 cache serves none of it and inputs need not take turns. Checked are two steps of the whole
launch: the last layer's matrices, moments and masters are compared with the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.common.arenas import Arena
from bench.common.steps import SparseStep, dense_step
from bench.common.timing import difference
from bench.gpu_parts.models import BF16, FP32, LLAMA_2_7B, LLAMA_3_8B, Model, dtype_name
from bench.gpu_parts.runner import Run

FORMS = {
    "fp32 moments and master": {"master": True},
    "fp32 moments, no master": {},
    "bf16 moments, no master": {"moment": BF16},
}
BYTES_FP32 = 18
"""Bytes per parameter of the fp32 comparison.

They are weight, gradient, two dense moments, and a share for the sparse state and for the check.
"""


def last_layer_problem(whole: SparseStep, grads: list[Tensor], count: int, options: dict) -> str:
    """What is wrong with the last ``count`` matrices after two steps of ``whole``.

    The moments of ``whole`` are zero. ``grads`` are dense.
    """
    small = SparseStep(
        [w.clone() for w in whole.weights[-count:]], grads[-count:], Arena.of(whole.arena.lists()[-count:]), **options
    )
    small.grads = whole.grads[-count:]
    for _ in range(2):
        small("reference")
        whole()
    return difference(state_of(small, count), state_of(whole, count))


def state_of(sparse: SparseStep, count: int) -> list[Tensor]:
    """Weights of the last ``count`` matrices and their segments of every arena."""
    arenas = [a for a in (sparse.exp_avg, sparse.exp_avg_sq, sparse.master) if a is not None]
    places = list(zip(sparse.arena.offsets, sparse.arena.counts))[-count:]
    return sparse.weights[-count:] + [arena[offset : offset + length] for arena in arenas for offset, length in places]


def compare(run: Run, model: Model, dtype: torch.dtype, layers: int) -> None:
    """Rows of one dtype. The dense step comes first. Its state is freed before the sparse one."""
    weights, grads = (model.matrices(run.device, dtype, scale, layers) for scale in (0.02, 1e-3))
    labels = {
        "op": "sparse_adamw_",
        "model": model.name,
        "dtype": dtype_name(dtype),
        "shape": f"{len(weights)} matrices, {layers} of {model.layers} layers",
    }
    name = f"AdamW fused, {dtype_name(dtype)}"
    fused = dense_step(weights, grads, fused=True)
    baseline = run.time(name, fused, moved=7.0 * sum(w.nbytes for w in weights), **labels)
    del fused
    run.free()
    arena = model.arena(run.device, layers)
    against = None if baseline is None else (name, baseline)
    for packed in (False, True):
        for form, options in FORMS.items() if dtype == BF16 else {"fp32 moments": {}}.items():
            options = options | {"packed": packed}
            sparse = SparseStep(weights, grads, arena, **options)
            if packed and options.get("master"):  # as packed layers give them
                sparse.grads = [grad.float() for grad in sparse.grads]
            kind = f"packed {dtype_name(sparse.grads[0].dtype)}" if packed else f"dense {dtype_name(dtype)}"
            problem = run.problem(lambda s=sparse, o=options: last_layer_problem(s, grads, len(model.layer), o))
            run.time(
                f"{kind} gradients, {form}",
                sparse,
                problem=problem,
                moved=sparse.roofline_bytes(),
                against=against,
                **labels,
            )
            del sparse
            run.free()


def fitting_layers(run: Run, model: Model) -> int:
    """How many layers the fp32 comparison can hold in nine tenths of the free memory."""
    if run.dry:
        return model.layers
    free, _ = torch.cuda.mem_get_info()
    return min(model.layers, int(0.9 * free / (BYTES_FP32 * model.layer_entries)))


def both_dtypes(run: Run, model: Model) -> None:
    model = model.on(run.device)
    compare(run, model, BF16, model.layers)
    run.free()
    compare(run, model, FP32, fitting_layers(run, model))


def llama2(run: Run) -> None:
    both_dtypes(run, LLAMA_2_7B)


def llama3(run: Run) -> None:
    both_dtypes(run, LLAMA_3_8B)
