"""The levels of instruction sets: which one is used, what a wrong choice says, and equal bits."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from helpers.backends import BackendDevice, cpu_level
from helpers.bits import BF16, FP16, FP32, assert_same_bits, random_indices
from helpers.processes import run_code
from helpers.step_problems import make_problem

import lift_kernels
from lift_kernels import LiftAdamW, ops
from lift_kernels.ops import cpu_levels, dispatch

pytestmark = pytest.mark.native

CPU = torch.device("cpu")
NATIVE = BackendDevice("native-cpu", "cpu")
X86 = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


@pytest.fixture(autouse=True, scope="module")
def loaded():
    assert dispatch._load_native() == ""


@pytest.fixture
def machine(monkeypatch, fresh):
    """Give this machine other levels and another LIFT_CPU_LEVEL than it has."""

    def change(levels: tuple[str, ...], asked: str) -> None:
        monkeypatch.setattr(cpu_levels, "levels", lambda: levels)
        monkeypatch.setattr(cpu_levels, "asked", lambda: asked)

    return change


def gather(backend: str | None = None) -> torch.Tensor:
    return ops.packed_gather(torch.arange(4.0), torch.tensor([1, 3], dtype=torch.int32), backend=backend)


def test_the_highest_level_is_used():
    """So it is where LIFT_CPU_LEVEL is empty, too."""
    assert cpu_levels.levels()
    if not cpu_levels.asked():
        assert dispatch.cpu_level() == cpu_levels.levels()[-1]
    assert lift_kernels.backends()["native-cpu"].reason == f"compiled C++ for the CPU, {dispatch.cpu_level()}"


@pytest.mark.parametrize(
    "asked, number", [("", 2), ("v2", 0), ("x86-64-v2", 0), ("v3", 1), ("x86-64-v3", 1), ("x86-64-v4", 2)]
)
def test_a_level_by_name(monkeypatch, machine, asked, number):
    taken = []
    monkeypatch.setattr(torch.ops.lift_kernels_native, "use_cpu_level", taken.append)
    machine(X86, asked)
    assert cpu_levels.problem() == cpu_levels.wrong_choice() == ""
    cpu_levels.take()
    assert taken == [number]


@pytest.mark.parametrize(
    "levels, asked, message",
    [
        (X86, "fast", "LIFT_CPU_LEVEL=fast names no level of this CPU; choose one of x86-64-v2, x86-64-v3, x86-64-v4"),
        (X86, "v5", "LIFT_CPU_LEVEL=v5 names no level of this CPU; choose one of"),
        (X86[:2], "v4", "LIFT_CPU_LEVEL=v4 names a level that this CPU lacks; choose one of x86-64-v2, x86-64-v3, or"),
        (X86[:1], "x86-64-v3", "=x86-64-v3 names a level that this CPU lacks; choose one of x86-64-v2, or leave it"),
        (("aarch64",), "v3", "LIFT_CPU_LEVEL=v3 names no level of this CPU; choose one of aarch64, or leave it unset"),
    ],
)
def test_a_level_that_cannot_be_used(machine, caplog, levels, asked, message):
    """No op runs on another backend instead. The reference runs where it is named."""
    machine(levels, asked)
    found = lift_kernels.backends()["native-cpu"]
    assert not found.usable and message in found.reason and found.reason.endswith("leave it unset for the highest")
    assert dispatch.cpu_level() == ""
    with pytest.raises(ValueError) as error:
        gather()
    assert str(error.value) == found.reason
    with pytest.raises(
        RuntimeError, match="'native-cpu' cannot run packed_gather on cpu tensors here: LIFT_CPU_LEVEL="
    ):
        gather("native-cpu")
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = LiftAdamW([weight], rank=2)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="choose one of"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))
    assert gather("reference").tolist() == [1.0, 3.0]
    assert not caplog.records


@pytest.mark.parametrize("asked", ["", "v2", "fast"])
def test_a_cpu_without_a_level(machine, caplog, asked):
    """The reference runs, and one warning says so and why, whatever LIFT_CPU_LEVEL says."""
    machine((), asked)
    reason = "this CPU has no SSE4.2 and POPCNT (x86-64-v2), which the compiled code needs"
    assert lift_kernels.backends()["native-cpu"] == dispatch.Backend(False, reason)
    assert gather().tolist() == gather().tolist() == [1.0, 3.0]
    assert dispatch.choose(None, CPU, "sparse_adamw_") == "reference" and dispatch.cpu_level() == ""
    assert [(record.levelno, reason in record.getMessage()) for record in caplog.records] == [(logging.WARNING, True)]


@pytest.mark.parametrize(
    "asked, now, change",
    [
        ("", "v2", "LIFT_CPU_LEVEL=v2"),
        ("", "fast", "LIFT_CPU_LEVEL=fast"),
        ("x86-64-v2", None, "the removal of LIFT_CPU_LEVEL"),
    ],
)
def test_a_level_that_came_too_late(monkeypatch, asked, now, change):
    monkeypatch.setattr(cpu_levels, "asked", lambda: asked)
    monkeypatch.delenv("LIFT_CPU_LEVEL", raising=False)
    if now is not None:
        monkeypatch.setenv("LIFT_CPU_LEVEL", now)
    late = f"{dispatch.cpu_level()}; {change} came too late, after the library was loaded"
    assert cpu_levels.description() == f"{late}: set it before the process starts"
    monkeypatch.setenv("LIFT_CPU_LEVEL", asked.removeprefix("x86-64-"))  # another name of the same level
    assert cpu_levels.description() == dispatch.cpu_level()
    monkeypatch.setenv("LIFT_CPU_LEVEL", now or "")
    monkeypatch.setattr(cpu_levels, "wrong_choice", lambda: "")  # the lowest level of another architecture
    found = lift_kernels.backends()["native-cpu"]
    assert found.usable and f"compiled C++ for the CPU, {late}" in found.reason


def test_in_a_process_of_its_own():
    """The variable is read when the library is loaded, not before and not again."""
    lowest = cpu_levels.levels()[0]
    code = (
        "import os, lift_kernels; from lift_kernels.ops import dispatch; os.environ['LIFT_CPU_LEVEL'] = {first!r};"
        "print(lift_kernels.backends()['native-cpu'].reason); os.environ['LIFT_CPU_LEVEL'] = 'v9';"
        "print(lift_kernels.backends()['native-cpu'].reason, dispatch.cpu_level())"
    )
    first, second = run_code(code.format(first=lowest), LIFT_CPU_LEVEL="v8").stdout.splitlines()
    assert first == f"compiled C++ for the CPU, {lowest}"
    assert second.startswith(f"{first}; LIFT_CPU_LEVEL=v9 came too late") and second.endswith(f" {lowest}")


def test_a_number_that_is_no_level():
    for number in (-1, len(cpu_levels.levels())):
        with pytest.raises(RuntimeError, match=f"this machine has no level {number}"):
            torch.ops.lift_kernels_native.use_cpu_level(number)
    assert dispatch.cpu_level() in cpu_levels.levels()


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
@pytest.mark.parametrize("moment", [FP32, BF16])
@pytest.mark.parametrize(
    "weight, stochastic", [(FP32, False), (BF16, False), (BF16, True), (FP16, False), (FP16, True)]
)
def test_a_step_has_the_same_bits_at_every_level(weight, moment, births, stochastic):
    """Every format of the gradient and every size of block; fp16 weights are partly subnormal."""
    for grad, packed in itertools.product((FP32, BF16, FP16), (False, True)):
        start = make_problem(NATIVE, weight=weight, grad=grad, moment=moment, births=births, packed=packed)
        start.weights[4] *= 2.0**-10
        states = []
        for level in cpu_levels.levels():
            problem = start.copy()
            with cpu_level(level):
                for _ in range(2):
                    problem.step(NATIVE, stochastic=stochastic, seed=3)
            states.append(problem.state())
        for state in states[1:]:
            assert_same_bits(state, states[0])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_norm_has_the_same_bits_at_every_level(dtype):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(200, 100, generator=generator).to(dtype)
    for count in (1, 5, 8191, 9003):
        indices = random_indices(20000, count, generator)
        packed = dense.view(-1)[indices.long()]
        norms = set()
        for level in cpu_levels.levels():
            with cpu_level(level):
                for grad in (packed, dense):
                    arguments = ([grad], indices, [0], [count])
                    norms.add(ops.packed_l2_norm(*arguments, packed_grads=grad is packed, backend="native-cpu").item())
        exact = packed.double().norm().item()
        assert len(norms) == 1 and abs(norms.pop() - exact) <= 1e-6 * exact


def test_selections_at_every_level():
    """Levels with fused multiply-adds give the same bits, and v2 the same up to rounding."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, 19, generator=generator) for size in (97, 213))
    found, limits = {}, {}
    for level in cpu_levels.levels():
        with cpu_level(level):
            found[level] = ops.lowrank_topk(left, right, 1000, backend="native-cpu")
            limits[level] = [float(ops.lowrank_topk(left, right, k, backend="native-cpu")[1]) for k in range(1, 40)]
    fused = [result for level, result in found.items() if level != "x86-64-v2"]
    assert all(torch.equal(mask, fused[0][0]) and torch.equal(limit, fused[0][1]) for mask, limit in fused)
    if "x86-64-v2" in found and fused:
        assert limits["x86-64-v2"] != limits["x86-64-v3"], "the level changes nothing, so it is not taken"
    last = found[cpu_levels.levels()[-1]]
    for mask, limit in found.values():
        assert abs(limit - last[1]) <= 1e-6 * last[1]
        assert len(set(mask.tolist()) ^ set(last[0].tolist())) <= 2
