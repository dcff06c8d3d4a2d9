"""What every op owes its callers: a true schema, honest version counters, a default backend."""

from __future__ import annotations

import pytest
import torch
from helpers.bitmap_cases import CASES
from helpers.step_problems import BF16, FP16, FP32, backend_of, bits, make_problem

from lift_kernels import ops
from lift_kernels.ops import dispatch

NAMESPACE = torch.ops.lift_kernels


def int32(values, where):
    return torch.tensor(values, dtype=torch.int32, device=where.device)


def adamw_arguments(where, **kinds):
    """Positional and keyword arguments of the raw op, on weights without borders: opcheck copies
    each tensor alone.
    """
    problem = make_problem(where, [((6, 7), 9), ((5, 4), 20)], **kinds)
    problem.steps += 1
    weights = [weight.clone() for weight in problem.weights]
    lr = torch.tensor(0.01, device=where.device)
    extra = {"inv_scale": torch.tensor(0.5, device=where.device), "found_inf": torch.zeros((), device=where.device)}
    arguments = (
        weights,
        problem.grads,
        problem.indices,
        problem.offsets,
        problem.counts,
        problem.exp_avg,
        problem.exp_avg_sq,
        problem.steps,
        lr,
    )
    options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "packed_grads": problem.packed}
    return arguments, options | extra | {"master": problem.master, "births": problem.births}


def norm_arguments(where, packed):
    problem = make_problem(where, [((6, 7), 9), ((5, 4), 20)], packed=packed)
    return (problem.grads, problem.indices, problem.offsets, problem.counts), {"packed_grads": packed}


def weight_grad_arguments(where, dtype):
    factors = [torch.randn(4, side, device=where.device).to(dtype) for side in (6, 7)]
    return *factors, int32([0, 8, 41], where)


def chebyshev_arguments(where, previous):
    product, block = (torch.randn(2, 9, 4, device=where.device) for _ in range(2))
    return product, block, previous, torch.tensor([0.5, 2.0], device=where.device)


# Every op with the ways of calling it that differ in what is read or written: functions of `where`.
SAMPLES = {
    "sparse_adamw_": {
        "dense": adamw_arguments,
        "packed, per entry": lambda where: adamw_arguments(where, packed=True, births=True),
        "master": lambda where: adamw_arguments(where, weight=BF16, master=True, moment=BF16),
        "stochastic": lambda where: (
            adamw_arguments(where, weight=FP16)[0],
            adamw_arguments(where, weight=FP16)[1] | {"stochastic": True, "seed": 3},
        ),
    },
    "packed_gather": {
        "same dtype": lambda where: ((torch.randn(4, 5, device=where.device), int32([1, 7, 19], where)), {}),
        "other dtype": lambda where: ((torch.randn(4, 5, device=where.device), int32([2], where)), {"dtype": BF16}),
    },
    "packed_scatter_": {
        "values": lambda where: (
            (torch.randn(4, 5, device=where.device), int32([1, 7], where), torch.randn(2, device=where.device)),
            {},
        ),
    },
    "packed_migrate": {
        "fill": lambda where: ((torch.randn(2, device=where.device), int32([1, 7], where), int32([2, 7], where)), {}),
        "fill_values": lambda where: (
            (
                torch.randn(2, device=where.device),
                int32([1, 7], where),
                int32([0, 7], where),
                torch.randn(2, device=where.device),
            ),
            {},
        ),
    },
    "lowrank_topk": {
        "sampled bracket": lambda where: (
            (torch.randn(9, 3, device=where.device), torch.randn(7, 3, device=where.device), 12),
            {},
        ),
        "bracket": lambda where: (
            (
                torch.randn(9, 3, device=where.device),
                torch.randn(7, 3, device=where.device),
                12,
                torch.tensor([0.5, 2.5], device=where.device),
            ),
            {},
        ),
        "a batch": lambda where: (
            (torch.randn(2, 9, 3, device=where.device), torch.randn(2, 7, 3, device=where.device), 12),
            {},
        ),
    },
    "bitmap_to_indices": {
        "two matrices": lambda where: (CASES["a thin bracket"]().arguments(where.device), {}),
        "no matrix": lambda where: (CASES["no matrix"]().arguments(where.device), {}),
    },
    "gaussian_sketch_": {
        "fp32": lambda where: ((torch.zeros(2, 5, 3, device=where.device), 7), {}),
        "bf16": lambda where: ((torch.zeros(1, 4, 8, device=where.device, dtype=BF16), 7, 2), {}),
    },
    "cholesky_qr_": {
        "a block": lambda where: ((torch.randn(2, 9, 4, device=where.device), None), {}),
        "two blocks, two rounds": lambda where: (
            (torch.randn(2, 9, 4, device=where.device), torch.randn(2, 5, 4, device=where.device)),
            {"rounds": 2},
        ),
    },
    "chebyshev_step_": {
        "first": lambda where: (chebyshev_arguments(where, None), {}),
        "later": lambda where: (chebyshev_arguments(where, torch.randn(2, 9, 4, device=where.device)), {}),
    },
    "packed_l2_norm": {
        "dense": lambda where: norm_arguments(where, packed=False),
        "packed": lambda where: norm_arguments(where, packed=True),
    },
    "packed_weight_grad": {
        "fp32": lambda where: (weight_grad_arguments(where, FP32), {}),
        "bf16, to bf16": lambda where: (weight_grad_arguments(where, BF16), {"dtype": BF16}),
        "another way": lambda where: (weight_grad_arguments(where, FP16), {"fused": where.backend == "triton"}),
    },
}
CALLS = [
    pytest.param(op, sample, id=f"{op}: {name}") for op, calls in SAMPLES.items() for name, sample in calls.items()
]
MUTATED = {
    "sparse_adamw_": {"weights", "exp_avg", "exp_avg_sq", "master"},
    "packed_scatter_": {"dest"},
    "packed_gather": set(),
    "packed_migrate": set(),
    "packed_l2_norm": set(),
    "lowrank_topk": set(),
    "bitmap_to_indices": set(),
    "gaussian_sketch_": {"block"},
    "cholesky_qr_": {"block", "other"},
    "chebyshev_step_": {"block"},
    "packed_weight_grad": set(),
}


def test_op_contract_has_a_sample_of_every_op():
    """A new op fails here until it has samples and says what it mutates."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lift_kernels::")}
    assert names == set(SAMPLES) == set(MUTATED)


@pytest.mark.parametrize("op, sample", CALLS)
def test_op_contract_opcheck(where, op, sample):
    arguments, options = sample(where)
    torch.library.opcheck(getattr(NAMESPACE, op).default, arguments, options | {"backend": backend_of(where, op)})


def named_tensors(op, arguments, options):
    """(argument name, tensor) for every tensor of a call, lists unrolled."""
    schema = getattr(NAMESPACE, op).default._schema
    given = dict(zip((argument.name for argument in schema.arguments), arguments)) | options
    for name, value in given.items():
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


@pytest.mark.parametrize("op, sample", CALLS)
def test_op_contract_versions_of_mutated_tensors_rise(where, op, sample):
    """Of these alone: so autograd sees each write, and no write that did not happen."""
    arguments, options = sample(where)
    tensors = list(named_tensors(op, arguments, options))
    old = [(tensor._version, bits(tensor).clone()) for _, tensor in tensors]
    getattr(NAMESPACE, op)(*arguments, **options, backend=backend_of(where, op))
    for (name, tensor), (version, pattern) in zip(tensors, old):
        assert (tensor._version > version) == (name in MUTATED[op]), f"{name}: version {version} -> {tensor._version}"
        assert torch.equal(bits(tensor), pattern) == (name not in MUTATED[op]), f"{name}: written or not"


def test_op_contract_schema_says_what_is_mutated():
    for op, mutated in MUTATED.items():
        arguments = getattr(NAMESPACE, op).default._schema.arguments
        assert {argument.name for argument in arguments if argument.is_write} == mutated


def test_op_contract_stale_backward_is_refused(where):
    """A product saved a weight; the step changed it; the backward pass notices."""
    problem = make_problem(where, [((6, 7), 9)])
    x = torch.ones(6, 7, device=where.device, requires_grad=True)
    loss = (x * problem.weights[0]).sum()
    problem.step(where)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", SAMPLES)
def test_op_contract_default_backend(op):
    """The native code serves CPU tensors by default; the interpreter only when asked for."""
    assert dispatch.choose(None, torch.device("cpu"), op) == dispatch.OPS[op][0].replace("native-cuda", "reference")


@pytest.mark.parametrize("op", SAMPLES)
def test_op_contract_cpu_tensors_need_a_cpu_backend(op):
    with pytest.raises(RuntimeError, match=f"backend 'native-cuda' cannot run {op} on cpu tensors here: "):
        dispatch.choose("native-cuda", torch.device("cpu"), op)


def test_op_contract_dtypes_of_results(where):
    """The fakes promise what the ops return: checked by value in the tests of each op, here for the
    empty ones.
    """
    none = int32([], where)
    source = torch.ones(3, dtype=FP32, device=where.device)
    assert ops.packed_gather(source, none, dtype=FP16, backend=where.backend).dtype == FP16
    assert ops.packed_migrate(source.bfloat16()[:0], none, none, backend=where.backend).dtype == BF16
