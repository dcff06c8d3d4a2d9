"""The ways past the dispatcher: what they run, and that they change nothing but the time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.bits import BF16, assert_same_bits, bits
from helpers.migrations import make_migration
from helpers.step_problems import HYPER, make_problem
from torch.fx.experimental.proxy_tensor import make_fx

import lift_kernels
from lift_kernels import ops
from lift_kernels.ops import dispatch

pytestmark = pytest.mark.native
PACKAGE = str(Path(lift_kernels.__file__).parent)
CPU = torch.device("cpu")


class Cpu:
    device = "cpu"


def step(**kinds):
    problem = make_problem(Cpu, weight=BF16, master=True, births=True, **kinds)
    arguments = problem.weights, problem.grads, problem.indices, problem.offsets, problem.counts
    options = HYPER | {"master": problem.master, "births": problem.births, "packed_grads": problem.packed}
    lr = options.pop("lr")
    return lambda: ops.sparse_adamw_(
        *arguments, problem.exp_avg, problem.exp_avg_sq, problem.steps, lr, **options
    ), problem


def norm(**kinds):
    problem = make_problem(Cpu, **kinds)
    arguments = problem.grads, problem.indices, problem.offsets, problem.counts
    return lambda: ops.packed_l2_norm(*arguments, packed_grads=problem.packed)


def migration():
    case = make_migration(Cpu, [(60, [1, 7], [7, 8, 59]), (9, [], [3])])
    return lambda: case.run(None)


def weight_grad():
    factors = torch.randn(5, 6), torch.randn(5, 7)
    return lambda: ops.packed_weight_grad(*factors, torch.tensor([0, 8, 41], dtype=torch.int32))


CALLS = {
    "sparse_adamw_": (lambda: step()[0], set()),
    "sparse_adamw_, packed": (lambda: step(packed=True)[0], set()),
    "packed_l2_norm": (norm, set()),
    "packed_l2_norm, packed": (lambda: norm(packed=True), set()),
    "arena_migrate_": (migration, set()),
    "packed_weight_grad": (weight_grad, {"checks.py: check_weight_grad"}),
}


@pytest.mark.parametrize("make, allowed", CALLS.values(), ids=CALLS)
def test_a_usual_call_runs_one_module(make, allowed):
    """Python code of other modules would be read from memory at every step."""
    call, called = make(), []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            called.append(f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}")

    with torch.no_grad():
        call()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    own, *others = called
    assert {name for name in others if name.split(":")[0] != own.split(":")[0]} == allowed


@pytest.mark.parametrize("kinds", [{}, {"packed": True}, {"grad": BF16}, {"aligned": False}], ids=str)
def test_the_norm_has_the_same_bits_on_every_way(kinds):
    """Past the dispatcher, through it, and from gradients that must be copied first."""
    sizes = [((100, 87), 8193), ((13, 17), 40), ((5, 3), 0), ((90, 100), 4096)]
    problem = make_problem(Cpu, sizes, **kinds)
    arguments = problem.indices, problem.offsets, problem.counts
    found = []
    for grads in (problem.grads, [g.t().contiguous().t() for g in problem.grads] if not problem.packed else None):
        for grad_mode in (False, True):
            with torch.set_grad_enabled(grad_mode):
                if grads is not None:
                    found.append(ops.packed_l2_norm(grads, *arguments, packed_grads=problem.packed))
    found.append(
        ops.packed_l2_norm(problem.grads, *arguments, packed_grads=problem.packed, backend="native-cpu", validate=True)
    )
    assert found[0] > 0 and len({bits(x).item() for x in found}) == 1


def test_the_step_is_the_same_on_every_way():
    states = []
    for grad_mode in (False, True):
        call, problem = step()
        with torch.set_grad_enabled(grad_mode):
            call()
            call()
        states.append(problem.state())
    assert_same_bits(*states)


@pytest.mark.parametrize("grad_mode", [False, True], ids=["no grad", "grad"])
def test_a_scatter_bumps_the_version(grad_mode):
    dest, index = torch.zeros(5), torch.tensor([1, 3], dtype=torch.int32)
    values = torch.ones(2)
    with torch.set_grad_enabled(grad_mode):
        for backend in (None, "reference"):
            version = dest._version
            ops.packed_scatter_(dest, index, values, backend=backend)
            assert dest._version > version
    assert dest.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0] and values._version == 0


def test_a_tracer_sees_the_public_ops():
    """Also without gradients: a private op in the graph would lose schema and fake."""
    index = torch.tensor([1, 3], dtype=torch.int32)
    case = make_migration(Cpu, [(60, [1, 7], [7, 8])])

    def work(source, moments):
        dest = source.clone()
        ops.packed_scatter_(dest, index, ops.packed_gather(source, index))
        ops.arena_migrate_(
            case.weights, case.new_indices, case.indices, case.offsets, case.counts, moments, moments + 1, case.steps
        )
        ops.packed_weight_grad(source, source, index)
        return ops.packed_l2_norm([dest], index, [0], [2])

    with torch.no_grad():
        graph = make_fx(work)(torch.ones(3, 4), case.exp_avg)
    targets = {str(node.target) for node in graph.graph.nodes if "lift_kernels" in str(node.target)}
    names = ("packed_gather", "packed_scatter_", "arena_migrate_", "packed_weight_grad", "packed_l2_norm")
    assert targets == {f"lift_kernels.{name}.default" for name in names}


def test_subclasses_and_fakes_go_through_the_dispatcher():
    from torch._subclasses import FakeTensorMode

    case = make_migration(Cpu, [(60, [1, 7], [7, 8])])
    before = case.state()
    with FakeTensorMode() as mode, torch.no_grad():
        lists = [[mode.from_tensor(x) for x in tensors] for tensors in (case.weights, case.new_indices)]
        arenas = [mode.from_tensor(x) for x in (case.indices, case.exp_avg, case.exp_avg_sq, case.steps)]
        kept = ops.arena_migrate_(*lists, arenas[0], case.offsets, case.counts, *arenas[1:])
        assert kept.shape == (1,) and kept.dtype == torch.int64 and type(kept) is not torch.Tensor
        assert ops.packed_l2_norm(lists[0], arenas[0], case.offsets, case.counts).shape == ()
        assert ops.packed_gather(lists[0][0], lists[1][0]).shape == (2,)
    assert_same_bits(case.state(), before)


def test_without_the_native_op_a_call_takes_the_reference(monkeypatch):
    """`native_op` answers for the default backend, not for the library."""
    case = make_migration(Cpu, [(60, [1, 7], [7, 8])])
    expected, kept = case.expected()
    missing = dispatch.Backend(False, "the compiled extension is missing")
    cached = (dispatch.native_op, dispatch._default, dispatch._warn_once)
    for function in cached:
        function.cache_clear()
    try:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(dispatch, "_native_cpu", lambda: missing)
            assert dispatch.native_op("arena_migrate_") is None
            assert case.run(None).tolist() == kept
    finally:
        for function in cached:
            function.cache_clear()
    assert_same_bits(case.state(), expected)
    assert dispatch.native_op("packed_l2_norm", "packed_square_sums") is not None
