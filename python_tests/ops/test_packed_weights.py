"""`sparse_adamw_(packed_weights=True)`: vectors of the selected entries in place of matrices."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, assert_same_bits, bits, random_indices

from lift_kernels import ops
from lift_kernels.ops import dispatch
from lift_kernels.ops.state_formats import split_master

ENGINES = [name for name in ("reference", "native-cpu") if dispatch.backends()[name].usable]
OFFSETS, COUNTS, LENGTH = [64, 256], [130, 65], 384
FORMS = [(FP32, None), (FP32, "fp32"), (BF16, None), (BF16, "fp32"), (BF16, "split"), (FP16, "fp32")]


def problem(dtype, master, births):
    """Matrices, gradients, index arena and state."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(40, 9, generator=generator).to(dtype) for _ in OFFSETS]
    grads = [torch.randn(40, 9, generator=generator) for _ in OFFSETS]
    indices = torch.zeros(LENGTH, dtype=torch.int32)
    state = {
        "exp_avg": torch.randn(LENGTH, generator=generator),
        "exp_avg_sq": torch.rand(LENGTH, generator=generator),
        "master": None if master is None else torch.zeros(LENGTH, dtype=FP32),
        "births": torch.randint(0, 5, (LENGTH,), generator=generator, dtype=torch.int32) if births else None,
    }
    for weight, offset, count in zip(weights, OFFSETS, COUNTS):
        indices[offset : offset + count] = random_indices(weight.numel(), count, generator)
        if master is not None:
            entries = weight.flatten()[indices[offset : offset + count].long()].float()
            state["master"][offset : offset + count] = entries * (1 + 2.0**-12)
    if master == "split":
        state["master"] = split_master(state["master"])
    return weights, grads, indices, state


def step(engine, weights, grads, indices, offsets, counts, state, **options):
    state = dict(state)
    moments, steps = (state.pop("exp_avg"), state.pop("exp_avg_sq")), torch.full((len(weights),), 6.0)
    ops.sparse_adamw_(
        weights, grads, indices, offsets, counts, *moments, steps, 0.01, weight_decay=0.1, **state, **options,
        backend=None if engine == "native-cpu" else engine,
    )  # fmt: skip


def packed(tensors, indices):
    segments = [indices[offset : offset + count] for offset, count in zip(OFFSETS, COUNTS)]
    return [ops.packed_gather(x, segment) for x, segment in zip(tensors, segments)]


@pytest.mark.parametrize("cut", [0, 64])
@pytest.mark.parametrize("births", [False, True])
@pytest.mark.parametrize(("dtype", "master"), FORMS)
@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_a_step_of_vectors_is_that_of_matrices(engine, dtype, master, births, cut):
    """Without index lists, and in two parts of each. Where there are masters, only these count."""
    stochastic = dtype == BF16 and master is None
    weights, grads, indices, state = problem(dtype, master, births)
    step(engine, weights, grads, indices, OFFSETS, COUNTS, state, stochastic=stochastic)
    expected = packed(weights, indices), state
    weights, grads, indices, state = problem(dtype, master, births)
    vectors, slopes = packed(weights, indices), packed(grads, indices)
    if master == "fp32":
        vectors = [torch.full_like(vector, torch.nan) for vector in vectors]
    for start, stops in ((0, [cut, cut]), (cut, COUNTS)):
        step(
            engine,
            [vector[start:stop] for vector, stop in zip(vectors, stops)],
            [slope[start:stop] for slope, stop in zip(slopes, stops)],
            torch.zeros((), dtype=torch.int32).expand(LENGTH),
            [offset + start for offset in OFFSETS],
            [stop - start for stop in stops],
            state,
            packed_grads=True,
            packed_weights=True,
            stochastic=stochastic,
        )
    for actual, wanted in zip((dict(enumerate(vectors)), state), (dict(enumerate(expected[0])), expected[1])):
        present = {key: bits(x) for key, x in wanted.items() if x is not None}
        assert_same_bits({key: bits(actual[key]) for key in present}, present)


def test_an_index_list_that_is_read_must_be_contiguous():
    weights, grads, _, state = problem(FP32, None, False)
    lists = torch.zeros((), dtype=torch.int32).expand(LENGTH)
    with pytest.raises(ValueError, match=r"indices must be a contiguous vector, got \(384,\)"):
        step("reference", weights, grads, lists, OFFSETS, COUNTS, state)
    with pytest.raises(ValueError, match=r"indices must be a contiguous vector, got \(1, 384\)"):
        step("reference", weights, grads, lists[None], OFFSETS, COUNTS, state, packed_grads=True, packed_weights=True)
