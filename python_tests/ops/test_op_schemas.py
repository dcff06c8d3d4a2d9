"""The contract of every op: a true schema, correct version counters, a default backend."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import STATE_FORMS, backend_of
from helpers.bitmap_cases import CASES
from helpers.bits import BF16, FP16, FP32, bits
from helpers.migrations import make_migration
from helpers.state_forms import make_forms
from helpers.step_problems import make_problem

from lift_kernels import ops
from lift_kernels.ops import dispatch

NAMESPACE = torch.ops.lift_kernels


def int32(values, backend):
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


def adamw_arguments(backend, **kinds):
    """Positional and keyword arguments of the raw op.

    The weights have no borders, because opcheck copies each tensor alone.
    """
    problem = make_problem(backend, [((6, 7), 9), ((5, 4), 20)], **kinds)
    problem.steps += 1
    weights = [weight.clone() for weight in problem.weights]
    lr = torch.tensor(0.01, device=backend.device)
    extra = {"inv_scale": torch.tensor(0.5, device=backend.device), "found_inf": torch.zeros((), device=backend.device)}
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


def adamw_forms(backend, **forms):
    """Arguments of a step on other forms of state; plain ones for a backend without them."""
    if backend.name not in STATE_FORMS:
        return adamw_arguments(backend)
    problem = make_forms(backend, [((6, 7), 9), ((5, 4), 20)], **forms)
    arguments, options = adamw_arguments(backend)
    weights = [weight.clone() for weight in problem.weights]
    arguments = weights, problem.grads, *arguments[2:5], problem.exp_avg, problem.exp_avg_sq, *arguments[7:]
    names = "master", "births", "exp_avg_scale", "exp_avg_sq_scale", "packed_weights"
    options |= {name: getattr(problem, name) for name in names} | {"packed_grads": problem.packed}
    return arguments, options


def migrate_forms(backend):
    """8-bit moments and low halves of masters."""
    arguments, _ = migrate_arguments(backend, weight=BF16)
    if backend.name not in STATE_FORMS:
        return arguments, {}
    length = arguments[2].numel()
    codes = [torch.arange(length, device=backend.device).to(dtype) for dtype in (torch.int8, torch.uint8)]
    scales = [torch.ones(-(-length // 32), device=backend.device) for _ in range(2)]
    master = torch.arange(length, device=backend.device).short()
    return (*arguments[:5], *codes, arguments[7], master, arguments[9], *scales), {}


def norm_arguments(backend, packed):
    problem = make_problem(backend, [((6, 7), 9), ((5, 4), 20)], packed=packed)
    return (problem.grads, problem.indices, problem.offsets, problem.counts), {"packed_grads": packed}


def migrate_arguments(backend, **kinds):
    """One matrix gets a list of another length. Every arena changes."""
    migration = make_migration(backend, [(42, [1, 5, 30], [5, 6, 7, 30]), (9, [2, 8], [3])], **kinds)
    weights = [weight.clone() for weight in migration.weights]
    arguments = weights, migration.new_indices, migration.indices, migration.offsets, migration.counts
    state = migration.exp_avg, migration.exp_avg_sq, migration.steps, migration.master, migration.births
    return (*arguments, *state), {}


def weight_grad_arguments(backend, dtype):
    factors = [torch.randn(4, side, device=backend.device).to(dtype) for side in (6, 7)]
    return *factors, int32([0, 8, 41], backend)


def chebyshev_arguments(backend, previous):
    product, block = (torch.randn(2, 9, 4, device=backend.device) for _ in range(2))
    return product, block, previous, torch.tensor([0.5, 2.0], device=backend.device)


# Samples of every op, as functions of `backend`. They differ in what the op reads or writes.
SAMPLES = {
    "sparse_adamw_": {
        "dense": adamw_arguments,
        "packed, per entry": lambda backend: adamw_arguments(backend, packed=True, births=True),
        "master": lambda backend: adamw_arguments(backend, weight=BF16, master=True, moment=BF16),
        "stochastic": lambda backend: (
            adamw_arguments(backend, weight=FP16)[0],
            adamw_arguments(backend, weight=FP16)[1] | {"stochastic": True, "seed": 3},
        ),
        "8-bit moments": lambda backend: adamw_forms(backend, coded=True),
        "split masters": lambda backend: adamw_forms(backend, split=True, packed=True),
        "packed weights": lambda backend: adamw_forms(backend, packed_weights=True, coded=True, split=True),
    },
    "packed_gather": {
        "same dtype": lambda backend: ((torch.randn(4, 5, device=backend.device), int32([1, 7, 19], backend)), {}),
        "other dtype": lambda backend: (
            (torch.randn(4, 5, device=backend.device), int32([2], backend)),
            {"dtype": BF16},
        ),
    },
    "packed_scatter_": {
        "values": lambda backend: (
            (torch.randn(4, 5, device=backend.device), int32([1, 7], backend), torch.randn(2, device=backend.device)),
            {},
        ),
    },
    "packed_migrate": {
        "fill": lambda backend: (
            (torch.randn(2, device=backend.device), int32([1, 7], backend), int32([2, 7], backend)),
            {},
        ),
        "fill_values": lambda backend: (
            (
                torch.randn(2, device=backend.device),
                int32([1, 7], backend),
                int32([0, 7], backend),
                torch.randn(2, device=backend.device),
            ),
            {},
        ),
    },
    "arena_migrate_": {
        "all arenas": migrate_arguments,
        "moments": lambda backend: migrate_arguments(backend, moment=BF16, master=False, births=False),
        "master": lambda backend: migrate_arguments(backend, weight=BF16, births=False),
        "8-bit moments, split masters": migrate_forms,
    },
    "lowrank_topk": {
        "sampled bracket": lambda backend: (
            (torch.randn(9, 3, device=backend.device), torch.randn(7, 3, device=backend.device), 12),
            {},
        ),
        "bracket": lambda backend: (
            (
                torch.randn(9, 3, device=backend.device),
                torch.randn(7, 3, device=backend.device),
                12,
                torch.tensor([0.5, 2.5], device=backend.device),
            ),
            {},
        ),
        "a batch": lambda backend: (
            (torch.randn(2, 9, 3, device=backend.device), torch.randn(2, 7, 3, device=backend.device), 12),
            {},
        ),
    },
    "bitmap_to_indices": {
        "two matrices": lambda backend: (CASES["a thin bracket"]().arguments(backend.device), {}),
        "no matrix": lambda backend: (CASES["no matrix"]().arguments(backend.device), {}),
    },
    "gaussian_sketch_": {
        "fp32": lambda backend: ((torch.zeros(2, 5, 3, device=backend.device), 7), {}),
        "bf16": lambda backend: ((torch.zeros(1, 4, 8, device=backend.device, dtype=BF16), 7, 2), {}),
    },
    "cholesky_qr_": {
        "a block": lambda backend: ((torch.randn(2, 9, 4, device=backend.device), None), {}),
        "two blocks, two rounds": lambda backend: (
            (torch.randn(2, 9, 4, device=backend.device), torch.randn(2, 5, 4, device=backend.device)),
            {"rounds": 2},
        ),
    },
    "chebyshev_step_": {
        "first": lambda backend: (chebyshev_arguments(backend, None), {}),
        "later": lambda backend: (chebyshev_arguments(backend, torch.randn(2, 9, 4, device=backend.device)), {}),
    },
    "packed_l2_norm": {
        "dense": lambda backend: norm_arguments(backend, packed=False),
        "packed": lambda backend: norm_arguments(backend, packed=True),
    },
    "packed_weight_grad": {
        "fp32": lambda backend: (weight_grad_arguments(backend, FP32), {}),
        "bf16, to bf16": lambda backend: (weight_grad_arguments(backend, BF16), {"dtype": BF16}),
        "another way": lambda backend: (weight_grad_arguments(backend, FP16), {"fused": backend.name == "triton"}),
    },
}
CALLS = [
    pytest.param(op, sample, id=f"{op}: {name}") for op, calls in SAMPLES.items() for name, sample in calls.items()
]
MUTATED = {
    "sparse_adamw_": {"weights", "exp_avg", "exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale"},
    "packed_scatter_": {"dest"},
    "arena_migrate_": {"indices", "exp_avg", "exp_avg_sq", "master", "births", "exp_avg_scale", "exp_avg_sq_scale"},
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
def test_op_contract_opcheck(backend, op, sample):
    arguments, options = sample(backend)
    torch.library.opcheck(getattr(NAMESPACE, op).default, arguments, options | {"backend": backend_of(backend, op)})


def named_tensors(op, arguments, options):
    """(argument name, tensor) for every tensor of a call, with lists unrolled."""
    schema = getattr(NAMESPACE, op).default._schema
    given = dict(zip((argument.name for argument in schema.arguments), arguments)) | options
    for name, value in given.items():
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


@pytest.mark.parametrize("op, sample", CALLS)
def test_op_contract_versions_of_mutated_tensors_rise(backend, op, sample):
    """Only these rise, so autograd sees each write, and no write that did not happen."""
    arguments, options = sample(backend)
    tensors = list(named_tensors(op, arguments, options))
    old = [(tensor._version, bits(tensor).clone()) for _, tensor in tensors]
    getattr(NAMESPACE, op)(*arguments, **options, backend=backend_of(backend, op))
    for (name, tensor), (version, pattern) in zip(tensors, old):
        assert (tensor._version > version) == (name in MUTATED[op]), f"{name}: version {version} -> {tensor._version}"
        assert torch.equal(bits(tensor), pattern) == (name not in MUTATED[op]), f"{name}: written or not"


def test_op_contract_schema_says_what_is_mutated():
    for op, mutated in MUTATED.items():
        arguments = getattr(NAMESPACE, op).default._schema.arguments
        assert {argument.name for argument in arguments if argument.is_write} == mutated


def test_op_contract_stale_backward_is_refused(backend):
    """A product saved a weight, the step changed it, and the backward pass notices."""
    problem = make_problem(backend, [((6, 7), 9)])
    x = torch.ones(6, 7, device=backend.device, requires_grad=True)
    loss = (x * problem.weights[0]).sum()
    problem.step(backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", SAMPLES)
def test_op_contract_default_backend(op):
    """The native code runs on CPU tensors by default; the interpreter only if requested."""
    assert dispatch.choose(None, torch.device("cpu"), op) == dispatch.OPS[op][0].replace("native-cuda", "reference")


@pytest.mark.parametrize("op", SAMPLES)
def test_op_contract_cpu_tensors_need_a_cpu_backend(op):
    with pytest.raises(RuntimeError, match=f"backend 'native-cuda' cannot run {op} on cpu tensors here: "):
        dispatch.choose("native-cuda", torch.device("cpu"), op)


def test_op_contract_dtypes_of_results(backend):
    """The fakes promise what the ops return.

    The tests of each op check this by value, and this test checks empty results.
    """
    none = int32([], backend)
    source = torch.ones(3, dtype=FP32, device=backend.device)
    assert ops.packed_gather(source, none, dtype=FP16, backend=backend.name).dtype == FP16
    assert ops.packed_migrate(source.bfloat16()[:0], none, none, backend=backend.name).dtype == BF16
