"""The CPU kernels without torch, at each level of this machine and on emulated ones.

The plain run takes this machine. `make cross` sets LIFT_CROSS=1, which adds the emulated machines
whose compiler and emulator are here. Bits are those of the ops in this process where the numerics
contract says so: everywhere but in products, which are fused on some machines alone.
"""

from __future__ import annotations

import os
import platform

import pytest
import torch
from helpers.backends import BackendDevice
from helpers.bits import BF16, FP16, FP32, assert_same_bits, bits, random_indices
from helpers.drivers import EMULATED, Driver, Machine, link, unavailable
from helpers.migrations import make_migration
from helpers.native_objects import compile_all
from helpers.spectra import whole_factors
from helpers.state_forms import make_forms
from helpers.step_problems import HYPER, assert_stepped, make_problem

from lift_kernels.ops import bias_correction, cpu_levels, dispatch, reference

pytestmark = [pytest.mark.native, pytest.mark.slow]

NATIVE = BackendDevice("native-cpu", "cpu")
HERE = Machine("this machine", platform.machine(), cpu_levels.levels() if dispatch.cpu_level() else ())
CROSS = os.environ.get("LIFT_CROSS") == "1"
MACHINES = [HERE, *(machine for machine in EMULATED if CROSS and not unavailable(machine))]
# Every level of this machine. An emulated one is there for its highest.
RUNS = [(HERE, level) for level in HERE.levels or ("",)]
RUNS += [(machine, machine.levels[-1] if machine.levels else "") for machine in MACHINES[1:]]
WITH_LEVEL = [run for run in RUNS if run[1]]
STEPS = [  # weight, master, stochastic, gradient, moment, packed, births
    (FP32, False, False, FP32, FP32, False, False),
    (FP32, False, False, FP32, FP32, True, True),
    (FP32, False, False, BF16, BF16, True, False),
    (BF16, True, False, BF16, FP32, False, True),
    (BF16, True, False, FP16, BF16, True, True),
    (BF16, False, False, FP32, BF16, False, False),
    (BF16, False, True, BF16, BF16, True, False),
    (BF16, False, True, BF16, FP32, False, True),
    (FP16, True, False, FP16, FP32, False, False),
    (FP16, False, False, FP16, BF16, True, True),
    (FP16, False, True, FP16, FP32, False, False),
    (FP16, False, True, FP32, BF16, True, True),
]

FORMS = [  # options of `make_forms`
    {"coded": True, "grad": BF16, "packed": True},
    {"coded": True, "split": True, "grad": BF16},
    {"coded": True, "weight": FP16, "grad": FP16, "births": True},
    {"coded": True, "weight": BF16, "master": True, "births": True},
    {"split": True, "births": True},
    {"split": True, "moment": BF16, "packed": True, "grad": BF16},
    {"packed_weights": True},
    {"packed_weights": True, "coded": True, "split": True, "births": True},
]


def run_id(run) -> str:
    return f"{run[0].name}, {run[1] or 'no level'}"


@pytest.fixture(scope="module")
def programs(cpu_objects, tmp_path_factory):
    """The driver for each architecture, linked when it is first asked for."""
    found = {}

    def program(architecture: str):
        if architecture not in found:
            folder = tmp_path_factory.mktemp(architecture)
            own = architecture == platform.machine()
            objects = cpu_objects if own else compile_all(folder, architecture)
            assert len(objects) == 9, "an object of the extension is missing"
            found[architecture] = link(objects, folder, architecture)
        return found[architecture]

    return program


@pytest.fixture
def driver(request, programs, tmp_path):
    machine, level = request.param
    return Driver(programs(machine.architecture), machine, level, tmp_path)


every_run = pytest.mark.parametrize("driver", RUNS, ids=run_id, indirect=True)
every_level = pytest.mark.parametrize("driver", WITH_LEVEL, ids=run_id, indirect=True)


@every_run
def test_a_machine_has_its_levels_and_no_other(driver):
    assert driver.levels() == driver.machine.levels
    driver.level = "x86-64-v9"
    with pytest.raises(AssertionError, match="driver: this CPU has no level x86-64-v9"):
        driver.panels(1, 1, 4, torch.zeros(1, dtype=torch.int32))


@every_level
def test_steps(driver):
    """Formats, blocks and settings; the same bits as in this process, and near the truth."""
    sizes = [((13, 17), 40), ((100, 87), 1300), ((1, 1), 1), ((5, 3), 0), ((64, 31), 513)]
    for number, (weight, master, stochastic, grad, moment, packed, births) in enumerate(STEPS):
        formats = {"weight": weight, "grad": grad, "moment": moment, "master": master}
        before = make_problem(NATIVE, sizes, **formats, packed=packed, births=births, aligned=number % 2 == 0)
        before.steps += 1
        options = {"maximize": number % 3 == 0} | ({"stochastic": True, "seed": number} if stochastic else {})
        here, there = before.copy(), before.copy()
        here.step(NATIVE, advance=False, **options)
        betas = HYPER["betas"]
        driver.sparse_adamw_(
            *(there.weights, there.grads, there.indices, there.offsets, there.counts),
            *(there.exp_avg, there.exp_avg_sq, there.steps, HYPER["lr"], *betas, HYPER["eps"], HYPER["weight_decay"]),
            master=there.master,
            births=there.births,
            bias=bias_correction.bias_table(*betas, torch.device("cpu")) if births else None,
            packed=packed,
            **options,
        )
        assert_stepped(before, there, **options)
        assert_same_bits(there.state(), here.state())


@every_level
def test_steps_on_other_forms_of_state(driver):
    """8-bit moments, low halves and packed weights; two steps have the bits of this process."""
    sizes = [((13, 17), 40), ((100, 87), 1300), ((1, 1), 1), ((5, 3), 0), ((64, 31), 513)]
    betas = HYPER["betas"]
    for forms in FORMS:
        here = make_forms(NATIVE, sizes, **forms)
        there = here.copy()
        for _ in range(2):
            here.step(NATIVE)
            there.steps += 1
            driver.sparse_adamw_(
                *(there.weights, there.grads, there.indices, there.offsets, there.counts),
                *(there.exp_avg, there.exp_avg_sq, there.steps, HYPER["lr"], *betas, HYPER["eps"]),
                HYPER["weight_decay"],
                master=there.master,
                births=there.births,
                bias=None if there.births is None else bias_correction.bias_table(*betas, torch.device("cpu")),
                exp_avg_scale=there.exp_avg_scale,
                exp_avg_sq_scale=there.exp_avg_sq_scale,
                packed=there.packed,
                packed_weights=there.packed_weights,
            )
            assert_same_bits(there.state(), here.state())


@every_level
def test_migrations_of_other_forms_of_state(driver):
    """8-bit moments and low halves: all bits are the reference's."""
    generator = torch.Generator().manual_seed(6)
    lists = [random_indices(9000, count, generator) for count in (4000, 3001)]
    for counts in ((4000, 3001), (3001, 4000)):
        here = make_forms(NATIVE, [((90, 100), 4000)], coded=True, split=True, births=True)
        here.counts = [counts[0]]
        at = here.segment(0)
        old, new = lists if counts[0] == 4000 else lists[::-1]
        here.indices[at] = old
        there = here.copy()
        state = [here.master, here.births, here.exp_avg_scale, here.exp_avg_sq_scale]
        arena = here.weights, [new], here.indices, here.offsets, here.counts, here.exp_avg, here.exp_avg_sq, here.steps
        kept = reference.arena_migrate_ref(*arena, *state)
        state = [there.master, there.births, there.exp_avg_scale, there.exp_avg_sq_scale]
        arena = there.weights, [new], there.indices, there.offsets, there.counts, there.exp_avg, there.exp_avg_sq
        assert torch.equal(driver.arena_migrate_(*arena, there.steps, *state), kept)
        assert_same_bits(there.state() | there.inputs(), here.state() | here.inputs())


@every_level
def test_sums_of_squares(driver):
    """Whole and partial blocks of packed and of dense gradients, in every format."""
    generator = torch.Generator().manual_seed(0)
    counts, offsets = [1, 8195, 333], [3, 10, 8300]
    indices = torch.zeros(9000, dtype=torch.int32)
    for dtype in (FP32, BF16, FP16):
        dense = [(torch.randn(10000, generator=generator) * 2.0 ** (i - 8)).to(dtype) for i in range(3)]
        lists = [random_indices(10000, count, generator) for count in counts]
        for offset, index in zip(offsets, lists):
            indices[offset : offset + len(index)] = index
        packed = [grad[index.long()] for grad, index in zip(dense, lists)]
        expected = reference.packed_l2_norm_ref(packed, indices, offsets, counts, True)
        for grads in (packed, dense):
            arguments = (grads, indices, offsets, counts, grads is packed)
            sums = driver.packed_square_sums(*arguments)
            assert torch.equal(sums, torch.ops.lift_kernels_native.packed_square_sums(*arguments))
            torch.testing.assert_close(sums.sum().sqrt().float(), expected, rtol=1e-6, atol=0)


@every_level
def test_selections(driver):
    """Whole numbers, whose products are exact, and real ones, on the way of each bracket."""
    for m, n, rank in [(1, 1, 1), (7, 5, 3), (65, 129, 5), (50, 200, 20)]:
        left, right = whole_factors(m, n, rank)
        for k in sorted({1, max(1, m * n // 20), m * n}):
            expected, threshold = reference.lowrank_topk_ref(left, right, k)
            for low, high in [(float("nan"), 0.0), (0.0, float("inf")), (1e9, 2e9), (3.0, 12.0)]:
                indices = torch.full((k,), -1, dtype=torch.int32)
                assert driver.lowrank_topk(left, right, low, high, indices) == threshold.item()
                assert torch.equal(indices, expected)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, 24, generator=generator) for size in (90, 130))
    indices = torch.full((585,), -1, dtype=torch.int32)
    found = driver.lowrank_topk(left, right, float("nan"), 0.0, indices)
    exact = (left.double() @ right.double().T).abs().flatten()
    limit, chosen = exact.sort(descending=True).values[584], torch.zeros(90 * 130, dtype=torch.bool)
    chosen[indices.long()] = True
    margin = 1e-5 * exact.max()
    assert chosen.sum() == 585 and (exact[chosen] >= limit - margin).all() and (exact[~chosen] <= limit + margin).all()
    assert abs(found - limit) <= margin
    if driver.level != "x86-64-v2" and dispatch.cpu_level() != "x86-64-v2":  # both fuse
        here = torch.empty_like(indices)
        assert found == torch.ops.lift_kernels_native.lowrank_topk(left, right, float("nan"), 0.0, here)
        assert torch.equal(indices, here)


@every_run
def test_gathers_and_scatters(driver):
    """Every pair of formats, with ties, subnormal numbers and infinities."""
    generator = torch.Generator().manual_seed(2)
    scales = 2.0 ** torch.randint(-30, 18, (20000,), generator=generator)
    wide = torch.randn(20000, generator=generator) * scales
    special = [0.0, -0.0, 65519.996, 65520.0, 2**-14 - 2**-26, 2**-25, 3 * 2**-25, 1 + 2**-11, float("inf"), -(2**-149)]
    wide[:10] = torch.tensor(special)
    indices = torch.cat([torch.arange(10), 10 + random_indices(19990, 16500, generator)]).int()
    for source in (FP32, BF16, FP16):
        for target in (FP32, BF16, FP16):
            values, out = wide.to(source), torch.full((len(indices),), float("nan"), dtype=target)
            driver.packed_gather(values, indices, out)
            assert torch.equal(bits(out), bits(reference.packed_gather_ref(values, indices, target)))
            dest = torch.full((20000,), 3.0, dtype=target)
            expected = dest.clone()
            reference.packed_scatter_ref(expected, indices, values[: len(indices)])
            driver.packed_scatter_(dest, indices, values[: len(indices)])
            assert torch.equal(bits(dest), bits(expected))


@every_run
def test_migrations_of_one_list(driver):
    generator = torch.Generator().manual_seed(3)
    old, new = (random_indices(60000, count, generator) for count in (20000, 17000))
    for dtype in (FP32, BF16):
        values = torch.randn(20000, generator=generator).to(dtype)
        out = torch.full((17000,), 7.0, dtype=dtype)
        driver.packed_migrate(values, old, new, out)
        assert torch.equal(bits(out), bits(reference.packed_migrate_ref(values, old, new, 7.0)))


@every_run
def test_migrations_of_arenas(driver):
    """Lists of several chunks, of one entry, empty ones, and those that nothing enters."""
    generator = torch.Generator().manual_seed(4)
    large = [random_indices(60000, count, generator).tolist() for count in (20000, 18000)]
    lists = [(60000, *large), (12, [1, 5, 7], [0, 5, 11]), (4, [2], [2]), (6, [], [0, 1, 5]), (6, [3, 4], [])]
    for weight, moment, master, births in [
        (FP32, FP32, False, False),
        (BF16, FP32, True, True),
        (FP16, BF16, True, False),
    ]:
        problem = make_migration(NATIVE, lists, weight, moment, master, births, aligned=births)
        expected, stay = problem.expected()
        kept = driver.arena_migrate_(
            *(problem.weights, problem.new_indices, problem.indices, problem.offsets, problem.counts),
            *(problem.exp_avg, problem.exp_avg_sq, problem.steps, problem.master, problem.births),
        )
        assert_same_bits(problem.state(), expected)
        assert kept.tolist() == stay


@every_run
def test_panels(driver):
    """4 MiB of rows at most, and at least one; the entries of the last panel, too."""
    generator = torch.Generator().manual_seed(5)
    for m, n, width in [(5, 7, 4), (3000, 1000, 4), (3000, 1001, 2), (3, 3_000_000, 4)]:
        indices = random_indices(m * n, min(m * n, 5000), generator)
        rows, *entries = driver.panels(m, n, width, indices)
        assert rows == min(max(4 * 2**20 // (n * width), 1), m)
        edges = torch.searchsorted(indices, torch.arange(0, m + rows, rows) * n).tolist()
        assert entries == [x for first, last in zip(edges, edges[1:]) for x in (first, last - first)]


def test_what_cannot_be_emulated_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert [unavailable(machine) for machine in EMULATED[-2:]] == [
        "qemu-x86_64 is not on PATH",
        "qemu-aarch64 is not on PATH",
    ]
    assert (
        unavailable(Machine("own", "aarch64", ())).startswith("aarch64-linux-gnu-g++") or HERE.architecture != "x86_64"
    )
