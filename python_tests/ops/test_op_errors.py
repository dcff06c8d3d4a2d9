"""Bad input to the ops raises the right kind of error and changes nothing.

The message names position and value.
"""

from __future__ import annotations

import pytest
import torch
from helpers.bad_arguments import CHECKED, both_moments_half, meta, nothing, replaced, strided
from helpers.bits import BF16, assert_same_bits
from helpers.step_problems import make_problem

from lift_kernels import ops


def index_set(position, value):
    def spoil(problem):
        problem.indices[problem.offsets[1] + position] = value

    return spoil


# name: (function that spoils the arguments, options of the call, error, part of the message)
BAD_STEPS = {
    "weight of a wrong dtype": (replaced("weights", torch.Tensor.double, 1), {}, TypeError, "weight 1 .*float64"),
    "weights of two dtypes": (replaced("weights", torch.Tensor.half, 1), {}, TypeError, "weight 1 .*float16"),
    "weight not contiguous": (
        replaced("weights", lambda w: w.t().contiguous().t(), 1),
        {},
        ValueError,
        r"weight 1 must be contiguous.*\(1, 9\)",
    ),
    "weight elsewhere": (replaced("weights", meta, 1), {}, ValueError, "weight 1 is on meta"),
    "gradient of a wrong dtype": (replaced("grads", torch.Tensor.double, 1), {}, TypeError, "gradient 1 .*float64"),
    "gradients of two dtypes": (replaced("grads", torch.Tensor.bfloat16, 1), {}, TypeError, "gradient 1 .*bfloat16"),
    "gradient complex": (replaced("grads", lambda g: g + 0j, 1), {}, TypeError, "gradient 1 .*complex64"),
    "gradient sparse": (replaced("grads", torch.Tensor.to_sparse, 1), {}, ValueError, "gradient 1 .*sparse_coo"),
    "gradient elsewhere": (replaced("grads", meta, 1), {}, ValueError, "gradient 1 is on meta"),
    "gradient of a wrong shape": (replaced("grads", torch.t, 1), {}, ValueError, r"gradient 1 .*\(8, 9\).*\(9, 8\)"),
    "gradient missing": (replaced("grads", lambda g: g[:-1]), {}, ValueError, "2 weights and 1 gradients"),
    "packed gradient too long": (nothing, {"packed_grads": True}, ValueError, "packed gradient 0 has 221 entries.* 40"),
    "indices int64": (replaced("indices", torch.Tensor.long), {}, TypeError, "int32, got torch.int64"),
    "indices elsewhere": (replaced("indices", meta), {}, ValueError, "indices on meta"),
    "indices strided": (replaced("indices", strided), {}, ValueError, "contiguous vector"),
    "indices a matrix": (replaced("indices", lambda t: t.view(2, -1)), {}, ValueError, "contiguous vector"),
    "offset negative": (replaced("offsets", lambda o: -1, 1), {}, IndexError, r"segment 1 \(-1 \+ 72\)"),
    "count negative": (replaced("counts", lambda c: -2, 1), {}, IndexError, r"segment 1 .*-2\)"),
    "segment at the end of all numbers": (
        replaced("offsets", lambda o: 2**63 - 1, 1),
        {},
        IndexError,
        "segment 1 .* does not fit",
    ),
    "segment past the arena": (replaced("offsets", lambda o: 10**6, 1), {}, IndexError, r"segment 1 \(1000000 \+ 72\)"),
    "offset missing": (replaced("offsets", lambda o: o[:-1]), {}, ValueError, "equally long, got 2, 1, 2"),
    "moments fp16": (both_moments_half, {}, TypeError, "moments .*float16"),
    "moments of two dtypes": (replaced("exp_avg_sq", torch.Tensor.bfloat16), {}, TypeError, "float32 and .*bfloat16"),
    "first moment too short": (replaced("exp_avg", lambda t: t[1:].clone()), {}, ValueError, "exp_avg .*320.*319"),
    "second moment elsewhere": (replaced("exp_avg_sq", meta), {}, ValueError, "exp_avg_sq .*meta"),
    "second moment strided": (replaced("exp_avg_sq", strided), {}, ValueError, "exp_avg_sq"),
    "steps too short": (replaced("steps", lambda s: s[:-1]), {}, ValueError, r"steps must be float32 \(2,\).*\(1,\)"),
    "steps int": (replaced("steps", torch.Tensor.int), {}, ValueError, "steps must be .*int32"),
    "steps elsewhere": (replaced("steps", meta), {}, ValueError, "steps must be .*meta"),
    "master bf16": (lambda p: setattr(p, "master", p.exp_avg.bfloat16()), {}, TypeError, "master .*bfloat16"),
    "births int64": (lambda p: setattr(p, "births", p.indices.long()), {}, TypeError, "births .*int64"),
    "births too short": (lambda p: setattr(p, "births", p.indices[1:].clone()), {}, ValueError, "births must be"),
    "inv_scale fp64": (nothing, {"inv_scale": torch.tensor(1.0).double()}, TypeError, "inv_scale .*float64"),
    "inv_scale a vector": (nothing, {"inv_scale": torch.ones(3)}, ValueError, r"inv_scale .*\(3,\)"),
    "found_inf bool": (nothing, {"found_inf": torch.tensor(True)}, TypeError, "found_inf .*bool"),
    "lr a vector": (nothing, {"lr": torch.ones(2)}, ValueError, r"lr must be one number.*\(2,\)"),
    "lr elsewhere": (nothing, {"lr": torch.ones((), device="meta")}, ValueError, "lr .*meta"),
    "stochastic fp32": (nothing, {"stochastic": True}, ValueError, "stochastic rounding needs bfloat16 or float16"),
    "backend unknown": (nothing, {"backend": "cuda"}, ValueError, "unknown backend 'cuda'; choose one of native-cpu"),
    "backend without the op": (nothing, {"backend": "native-cuda"}, RuntimeError, "cannot run sparse_adamw_"),
    "index too large": (index_set(71, 72), CHECKED, IndexError, "matrix 1: index 72 is out of range for 72"),
    "index negative": (index_set(0, -1), CHECKED, IndexError, "matrix 1: index -1 is out of range"),
    "index twice": (index_set(5, 4), CHECKED, ValueError, "matrix 1: .*got 4 before 4 at position 4"),
    "index unsorted": (index_set(5, 7), CHECKED, ValueError, "matrix 1: .*got 7 before 6 at position 5"),
    "order hidden by wrapping": (index_set(0, 2**31 - 1), CHECKED, ValueError, "got 2147483647 before 1"),
    "segments overlap": (
        replaced("offsets", lambda o: o - 63, 1),
        CHECKED,
        ValueError,
        "segment 1 .* overlaps the segment that ends at",
    ),
}


@pytest.mark.parametrize("spoil, options, error, message", BAD_STEPS.values(), ids=BAD_STEPS)
def test_op_bad_step(backend, spoil, options, error, message):
    problem = make_problem(backend, [((13, 17), 40), ((9, 8), 72)])
    whole = problem.copy()
    problem.__dict__.update(vars(whole))  # the same tensors, in lists and fields that may be spoiled
    spoil(problem)
    before = whole.state()
    device = {
        key: value.to(backend.device) if key in ("inv_scale", "found_inf") else value for key, value in options.items()
    }
    with pytest.raises(error, match=message):
        problem.step(backend, advance=False, **device)
    assert_same_bits(whole.state(), before)


def test_op_bad_step_stochastic_with_master(backend):
    problem = make_problem(backend, weight=BF16, master=True)
    before = problem.state()
    with pytest.raises(ValueError, match="no master"):
        problem.step(backend, stochastic=True)
    assert_same_bits(problem.state(), before)


def test_op_bad_step_betas_too_near_one(backend):
    """The table of corrections by age would be too long; the global form has no table."""
    problem = make_problem(backend, births=True)
    before = problem.state()
    if backend.name != "reference":
        with pytest.raises(ValueError, match="betas up to 0.99999"):
            problem.step(backend, betas=(0.9, 1 - 1e-9))
        assert_same_bits(problem.state(), before)
    problem.step(backend, betas=(0.9, 1 - 1e-9), births=None)
    assert not torch.equal(problem.state()["weight 0"], before["weight 0"])


# name: (op, arguments in order, spoiled arguments and further options, error, part of the message)
GATHER, SCATTER, MIGRATE, GRADIENT = "packed_gather", "packed_scatter_", "packed_migrate", "packed_weight_grad"
ONES, ONE = [1.0, 1.0], [1.0]
BAD_CALLS = {
    "gather fp64": (GATHER, (ONES, [0]), {"source": "float64"}, TypeError, "source must be .*float64"),
    "gather to int": (GATHER, (ONES, [0]), {"dtype": torch.int32}, TypeError, "dtype must be .*int32"),
    "gather index int64": (GATHER, (ONES, [0]), {"indices": "int64"}, TypeError, "indices must be int32.*int64"),
    "gather from elsewhere": (GATHER, (ONES, [0]), {"source": "meta"}, ValueError, "source is on meta"),
    "gather from sparse": (GATHER, (ONES, [0]), {"source": "sparse"}, ValueError, "source must be dense"),
    "gather a matrix": (GATHER, (ONES, [[0]]), {}, ValueError, r"contiguous vector, got \(1, 1\)"),
    "gather past the end": (GATHER, (ONES, [0, 2]), CHECKED, IndexError, "index 2 is out of range for 2"),
    "gather unsorted": (GATHER, (ONES, [1, 0]), CHECKED, ValueError, "got 1 before 0 at position 0"),
    "gather unknown": (GATHER, (ONES, [0]), {"backend": "numpy"}, ValueError, "unknown backend 'numpy'"),
    "scatter to int": (SCATTER, ([1], [0], ONE), {}, TypeError, "dest must be .*int64"),
    "scatter fp64": (SCATTER, (ONES, [0], ONE), {"values": "float64"}, TypeError, "values must be .*float64"),
    "scatter too few": (SCATTER, (ONES, [0, 1], ONE), {}, ValueError, r"values has shape \(1,\), indices \(2,\)"),
    "scatter to strided": (SCATTER, ([ONES, ONES], [0], ONE), {"dest": "strided"}, ValueError, r"dest .*\(1, 2\)"),
    "scatter to elsewhere": (SCATTER, (ONES, [0], [5.0]), {"dest": "meta"}, ValueError, "dest is on meta"),
    "scatter twice": (SCATTER, (ONES, [1, 1], [5.0, 6.0]), CHECKED, ValueError, "got 1 before 1"),
    "scatter negative": (SCATTER, (ONES, [-1], [5.0]), CHECKED, IndexError, "index -1 is out of range"),
    "migrate fp16": (MIGRATE, (ONE, [0], [0]), {"values": "float16"}, TypeError, "values must be .*float16"),
    "migrate too few": (MIGRATE, (ONE, [0, 1], [0]), {}, ValueError, r"shape \(1,\), old_indices \(2,\)"),
    "migrate short fill": (MIGRATE, (ONE, [0], [0, 1], ONE), {}, ValueError, "fill_values has shape"),
    "migrate other fill": (MIGRATE, (ONE, [0], [0], [1]), {}, TypeError, "fill_values must be .*int64"),
    "migrate far fill": (MIGRATE, (ONE, [0], [0], ONE), {"fill_values": "meta"}, ValueError, "fill_values is on meta"),
    "migrate far list": (MIGRATE, (ONE, [0], [0]), {"new_indices": "meta"}, ValueError, "new_indices on meta"),
    "migrate int64": (MIGRATE, (ONE, [0], [0]), {"old_indices": "int64"}, TypeError, "old_indices must be int32"),
    "migrate unsorted old": (MIGRATE, (ONES, [3, 1], [0]), CHECKED, ValueError, "old_indices: .*3 before 1"),
    "weight gradient fp64": (
        GRADIENT,
        ([ONES], [ONES], [0]),
        {"grad_output": "float64", "backend": None},
        TypeError,
        "grad_output must be one of .*float64",
    ),
    "weight gradient of two dtypes": (
        GRADIENT,
        ([ONES], [ONES], [0]),
        {"input": "float16"},
        TypeError,
        "input must be one of torch.float32, got torch.float16",
    ),
    "weight gradient index int64": (
        GRADIENT,
        ([ONES], [ONES], [0]),
        {"indices": "int64"},
        TypeError,
        "indices must be int32",
    ),
    "weight gradient of vectors": (
        GRADIENT,
        (ONES, ONES, [0]),
        {},
        ValueError,
        r"matrices with the same number of rows, got \(2,\) and",
    ),
    "weight gradient of other tokens": (
        GRADIENT,
        ([ONES], [ONES, ONES], [0]),
        {},
        ValueError,
        r"\(1, 2\) and \(2, 2\)",
    ),
    "weight gradient elsewhere": (GRADIENT, ([ONES], [ONES], [0]), {"input": "meta"}, ValueError, "input is on meta"),
    "weight gradient sparse": (GRADIENT, ([ONES], [ONES], [0]), {"grad_output": "sparse"}, ValueError, "must be dense"),
    "weight gradient to int": (
        GRADIENT,
        ([ONES], [ONES], [0]),
        {"dtype": torch.int32},
        TypeError,
        "dtype must be .*int32",
    ),
    "weight gradient of too many": (
        GRADIENT,
        ([ONES], [ONE], [0, 1, 2]),
        {},
        ValueError,
        "indices has 3 .* weight only 2",
    ),
    "weight gradient past the end": (
        GRADIENT,
        ([ONES], [ONES], [0, 4]),
        CHECKED,
        IndexError,
        "index 4 is out of range for 4",
    ),
    "weight gradient unsorted": (
        GRADIENT,
        ([ONES], [ONES], [3, 1]),
        CHECKED,
        ValueError,
        "got 3 before 1 at position 0",
    ),
    "migrate unsorted new": (MIGRATE, (ONE, [3], [9, 9]), CHECKED, ValueError, "new_indices: .*9 before 9"),
}


@pytest.mark.parametrize("op, values, options, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_op_bad_call(backend, op, values, options, error, message):
    names = [argument.name for argument in getattr(torch.ops.lift_kernels, op).default._schema.arguments]
    changes = {
        "meta": meta,
        "sparse": torch.Tensor.to_sparse,
        "strided": torch.t,
        **{name: lambda t, name=name: t.to(getattr(torch, name)) for name in ("float64", "float16", "int64")},
    }
    arguments = {}
    for name, value in zip(names, values):
        dtype = torch.int32 if "indices" in name else None
        tensor = torch.tensor(value, dtype=dtype, device=backend.device)
        arguments[name] = changes[options[name]](tensor) if name in options else tensor
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    extra = {"backend": backend.name} | {name: value for name, value in options.items() if name not in arguments}
    with pytest.raises(error, match=message):
        getattr(ops, op)(**arguments, **extra)
    for name, tensor in arguments.items():
        if tensor.layout == torch.strided and not tensor.is_meta:
            assert torch.equal(tensor, before[name]), name


def test_op_bad_norm(backend):
    problem = make_problem(backend, [((13, 17), 40), ((9, 8), 72)])
    arguments = problem.grads, problem.indices, problem.offsets, problem.counts

    def norm(*changed, **options):
        return ops.packed_l2_norm(*changed, *arguments[len(changed) :], backend=backend.name, **options)

    with pytest.raises(TypeError, match="gradient 1 .*float16"):
        norm([problem.grads[0], problem.grads[1].half()])
    with pytest.raises(ValueError, match="gradient 0 is on meta"):
        norm([meta(g) for g in problem.grads])
    with pytest.raises(ValueError, match="packed gradient 0 has 221 entries"):
        norm(packed_grads=True)
    with pytest.raises(IndexError, match="segment 1"):
        norm(problem.grads, problem.indices, [64, problem.indices.numel()])
    problem.indices[problem.offsets[1] + 71] = 72
    with pytest.raises(IndexError, match="matrix 1: index 72"):
        norm(validate=True)
