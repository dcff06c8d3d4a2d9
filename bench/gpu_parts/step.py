"""The step over all matrices of a model, against torch.optim.AdamW(fused=True).

AdamW has bf16 weights and state, or fp32 weights and state on the layers that fit. A third baseline
is AdamW on one vector of the selected entries, which is then scattered.

The step of LIFT is one launch. All work on the same tensors. Bytes of the roofline: distinct
32-byte sectors of weights (read and written) and dense gradients (read) that selected entries lie
on, and the packed streams, as in `bench_sparse_adamw`. ``share_of_fetched`` counts 64 bytes for a
sector that is read, which is what cards fetch by default. Dense: 7 times the weights' bytes. A step
moves gigabytes, so the L2 cache serves none of it and inputs need not take turns. Checked are two
steps of the whole launch: the last layer's matrices, moments and masters are compared with the
reference's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common.arenas import FETCH, Arena
from bench.common.steps import PackedVector, SparseStep, dense_step
from bench.common.timing import difference
from bench.gpu_parts.models import BF16, FP32, LLAMA_2_7B, LLAMA_3_8B, Model, dtype_name
from bench.gpu_parts.runner import Run

Against = tuple[str, float]
"""Name and seconds of a baseline."""
FORMS: dict[str, dict] = {
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


def fused_baseline(run: Run, weights: list[Tensor], grads: list[Tensor], name: str, labels: dict) -> Against | None:
    """The row of AdamW(fused=True) on whole matrices. Its state is freed."""
    fused = dense_step(weights, grads, fused=True)
    taken = run.time(name, fused, moved=7.0 * sum(w.nbytes for w in weights), **labels)
    del fused
    run.free()
    return None if taken is None else (name, taken)


def sparse_rows(
    run: Run,
    model: Model,
    tensors: tuple[list[Tensor], list[Tensor], Arena],
    forms: dict[str, dict],
    against: Against | None,
    labels: dict,
    suffix: str = "",
) -> None:
    """Rows of the step from dense and from packed gradients, in some forms of the state."""
    weights, grads, arena = tensors
    for packed in (False, True):
        for form, options in forms.items():
            options = options | {"packed": packed}
            sparse = SparseStep(weights, grads, arena, **options)
            if packed and options.get("master"):  # as packed layers give them
                sparse.grads = [grad.float() for grad in sparse.grads]
            dtype = dtype_name(sparse.grads[0].dtype)
            problem = run.problem(lambda s=sparse, o=options: last_layer_problem(s, grads, len(model.layer), o))
            run.time(
                f"{'packed' if packed else 'dense'} {dtype} gradients, {form}{suffix}",
                sparse,
                problem=problem,
                moved=sparse.roofline_bytes(),
                against=against,
                derived=share_of_fetched(run, sparse.roofline_bytes(FETCH)),
                **labels,
            )
            del sparse
            run.free()


def share_of_fetched(run: Run, fetched: float) -> dict[str, Callable[[float], float]]:
    """The column that counts what the card fetches for a sector that is read."""
    rate = run.rates.get("copy")
    return {} if rate is None else {"share_of_fetched": lambda seconds: fetched / rate / seconds}


def vector_rows(
    run: Run, weights: list[Tensor], grads: list[Tensor], arena: Arena, against: Against | None, labels: dict
) -> None:
    """Rows of torch's fused AdamW on one fp32 vector of the selected entries, and a scatter."""
    for packed in (False, True):
        vector = PackedVector(weights, grads, arena, packed)
        name = f"AdamW fused on a packed vector, {'packed' if packed else 'dense'} gradients, {vector.scatter}"
        run.time(name, vector, against=against, **labels)
        del vector
        run.free()


def compare(run: Run, model: Model, layers: int) -> None:
    """Rows of bf16 weights, against AdamW with bf16 state. The dense step comes first."""
    weights, grads = (model.matrices(run.device, BF16, scale, layers) for scale in (0.02, 1e-3))
    labels = labels_of(model, layers, BF16)
    against = fused_baseline(run, weights, grads, "AdamW fused, bf16", labels)
    arena = model.arena(run.device, layers)
    sparse_rows(run, model, (weights, grads, arena), FORMS, against, labels)
    vector_rows(run, weights, grads, arena, against, labels)


def compare_fp32(run: Run, model: Model, layers: int) -> None:
    """Rows against AdamW with fp32 weights and state, as under autocast, on the layers that fit.

    LIFT has fp32 weights, or bf16 weights with fp32 moments and masters.
    """
    labels = labels_of(model, layers, FP32)
    weights, grads = (model.matrices(run.device, FP32, scale, layers) for scale in (0.02, 1e-3))
    against = fused_baseline(run, weights, grads, "AdamW fused, fp32", labels)
    arena = model.arena(run.device, layers)
    sparse_rows(run, model, (weights, grads, arena), {"fp32 moments": {}}, against, labels)
    weights, grads = ([tensor.to(BF16) for tensor in tensors] for tensors in (weights, grads))
    run.free()
    forms = {name: options for name, options in FORMS.items() if options.get("master")}
    sparse_rows(run, model, (weights, grads, arena), forms, against, labels | {"dtype": "bf16"}, ", against fp32 AdamW")


def labels_of(model: Model, layers: int, dtype: torch.dtype) -> dict:
    return {
        "op": "sparse_adamw_",
        "model": model.name,
        "dtype": dtype_name(dtype),
        "shape": f"{layers * len(model.layer)} matrices, {layers} of {model.layers} layers",
    }


def fitting_layers(run: Run, model: Model) -> int:
    """How many layers the fp32 comparison can hold in nine tenths of the free memory."""
    if run.dry:
        return model.layers
    free, _ = torch.cuda.mem_get_info()
    return min(model.layers, int(0.9 * free / (BYTES_FP32 * model.layer_entries)))


def both_dtypes(run: Run, model: Model) -> None:
    model = model.on(run.device)
    compare(run, model, model.layers)
    run.free()
    compare_fp32(run, model, fitting_layers(run, model))


def llama2(run: Run) -> None:
    both_dtypes(run, LLAMA_2_7B)


def llama3(run: Run) -> None:
    both_dtypes(run, LLAMA_3_8B)
