"""The counter of launches and its formulas, on programs whose bytes, FLOPs and waits are known."""

from __future__ import annotations

import pytest
import torch

from bench.common import kernel_costs, launch_cost
from bench.common.device_events import Call
from bench.common.fake_cuda import FakeCuda
from bench.common.kernel_costs import Work
from bench.common.launch_cost import LaunchCost, Step, totals
from bench.common.predicted_time import device_seconds, eigen_seconds, predicted_seconds
from lift_kernels import ops
from lift_kernels.ops import symmetric_eigen
from lift_kernels.ops.precision import matmul_precision

SUBSPACE_OPS = dict.fromkeys(("gaussian_sketch_", "cholesky_qr_", "chebyshev_step_"), "native-cuda")


def on_device(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def steps_of(program, backends=None):
    """What a program does, on fake CUDA tensors."""
    with FakeCuda(backends) as cuda, torch.no_grad(), cuda.recording(LaunchCost()) as cost:
        program()
    return cost.steps


def works_of(program, backends=None):
    """Its launches, without the waits."""
    return [step.work for step in steps_of(program, backends) if step.work is not None]


def product_in(precision):
    def program():
        a, b = on_device(2, 3, 4), on_device(2, 4, 5)
        with matmul_precision(a, precision):
            a @ b

    return program


def wide_product():
    torch.bmm(
        on_device(2, 3, 4, dtype=torch.bfloat16), on_device(2, 4, 5, dtype=torch.bfloat16), out_dtype=torch.float32
    )


def gathered():
    on_device(100)[torch.empty(7, dtype=torch.int64, device="cuda")]


def scattered():
    on_device(100).index_put_((torch.empty(7, dtype=torch.int64, device="cuda"),), on_device(7))


def product_of_one_tensor():
    a = on_device(2, 3, 4)
    a.mT @ a


def sum_with_itself():
    a = on_device(5)
    a.add_(a)


PRODUCT = 2 * (3 * 4 + 4 * 5), 2 * 3 * 5  # numbers that are read and written
FLOPS = 2 * 2 * 3 * 4 * 5
PROGRAMS = {
    "TF32": (product_in("tf32"), [Work(4 * sum(PRODUCT), tf32=FLOPS)]),
    "fp32": (product_in("ieee"), [Work(4 * sum(PRODUCT), fp32=FLOPS)]),
    "bf16": (
        lambda: on_device(2, 3, 4, dtype=torch.bfloat16) @ on_device(2, 4, 5, dtype=torch.bfloat16),
        [Work(2 * sum(PRODUCT), bf16=FLOPS)],
    ),
    "bf16 to fp32": (wide_product, [Work(2 * PRODUCT[0] + 4 * PRODUCT[1], bf16=FLOPS)]),
    "a product into a result": (
        lambda: torch.bmm(on_device(2, 3, 4), on_device(2, 4, 5), out=on_device(2, 3, 5)),
        [Work(4 * sum(PRODUCT), fp32=FLOPS)],
    ),
    "a matrix": (lambda: on_device(3, 4) @ on_device(4, 5), [Work(4 * (12 + 20 + 15), fp32=120)]),
    "a product and a sum": (
        lambda: torch.addmm(on_device(3, 5), on_device(3, 4), on_device(4, 5)),
        [Work(4 * (15 + 12 + 20 + 15), fp32=120)],
    ),
    "a tensor with its transpose": (product_of_one_tensor, [Work(4 * (24 + 32), fp32=2 * 2 * 4 * 4 * 3)]),
    "views": (lambda: on_device(4, 5).mT[1:].expand(3, 4, 4)[None], []),
    "what is repeated": (lambda: on_device(4, 1).expand(4, 5) + 1, [Work(4 * (4 + 20))]),
    "elementwise": (lambda: on_device(4, 5) + on_device(5), [Work(4 * (20 + 5 + 20))]),
    "in place": (lambda: on_device(5).mul_(2), [Work(4 * 10)]),
    "in place with itself": (sum_with_itself, [Work(4 * 10)]),
    "only written": (lambda: on_device(5).zero_(), [Work(4 * 5)]),
    "made": (lambda: torch.zeros(5, device="cuda"), [Work(4 * 5)]),
    "copied": (lambda: on_device(5).copy_(on_device(5, dtype=torch.bfloat16)), [Work(5 * (4 + 2))]),
    "converted": (lambda: on_device(5, dtype=torch.bfloat16).float(), [Work(5 * (4 + 2))]),
    "into a result": (lambda: torch.add(on_device(5), 1, out=on_device(5)), [Work(4 * 10)]),
    "stacked": (lambda: torch.stack([on_device(5), on_device(5)]), [Work(4 * 20)]),
    "gathered": (gathered, [Work(7 * (8 + 4 + 4))]),
    "scattered": (scattered, [Work(7 * (8 + 4 + 4))]),
    "uploaded": (lambda: torch.ones(5).to("cuda"), [Work(4 * 5)]),
    "read": (lambda: on_device(5).cpu(), [Work(4 * 5)]),
    "Cholesky": (lambda: torch.linalg.cholesky_ex(on_device(2, 6, 6)), [Work(4 * (72 + 72 + 2), fp32=2 * 6**3 / 3)]),
    "triangular solve": (
        lambda: torch.linalg.solve_triangular(on_device(6, 6), on_device(6, 4), upper=True),
        [Work(4 * (36 + 24 + 24), fp32=6 * 6 * 4)],
    ),
    "eigenproblems": (
        lambda: torch.linalg.eigh(on_device(3, 6, 6)),
        [Work(4 * (3 * 36 + 3 * 6 + 3 * 36), side=6, problems=3)],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_work_of_a_call_of_torch(name):
    program, expected = PROGRAMS[name]
    assert works_of(program) == expected


def test_waits_stand_where_they_happen():
    def program():
        x = on_device(5)
        x.add_(1)
        x.cpu()
        x.add_(1)
        torch.linalg.eigh(on_device(3, 6, 6))

    assert [step.work is None for step in steps_of(program)] == [False, False, True, False, False, True]


def test_the_sums_of_a_program():
    def program():
        product_in("tf32")()
        wide_product()
        torch.linalg.eigh(on_device(3, 6, 6))

    assert totals(steps_of(program)) == {
        ("", "launches"): 3,
        ("", "waits"): 1,
        ("", "bytes"): 4 * 94 + 2 * 64 + 4 * 30 + 4 * 234,
        ("", "bf16_flops"): FLOPS,
        ("", "tf32_flops"): FLOPS,
        ("", "eigenproblems"): 3,
        ("", "eigenproblem_calls"): 1,
    }


def test_the_batched_solver_of_cusolver_is_counted(monkeypatch):
    """torch before 2.12 does not solve together, so `symmetric_eigen` calls the solver itself."""
    monkeypatch.setattr(symmetric_eigen, "_slow_in_torch", lambda matrices: True)
    square, values, statuses = 3 * 40 * 40 * 4, 3 * 40 * 4, 3 * 4
    expected = [
        Work(2 * square),  # a copy
        Work(2 * square + values, side=40, problems=3),
        Work(statuses + 1),
    ]
    steps = steps_of(lambda: symmetric_eigen.symmetric_eigen(on_device(3, 40, 40)))
    assert [step.work for step in steps] == [*expected, None]


def test_the_launches_of_a_chebyshev_step():
    """On blocks of 1024 x 256: tiles (0,0), (0,1), (1,1) over two slabs, two blocks times R^-1."""
    blocks = [(2, 1024, 256)] * 3
    found = works_of(lambda: ops.chebyshev_step_(*(on_device(*b) for b in blocks), on_device(2)), SUBSPACE_OPS)
    block, partials, square, scale, status = (4 * 2 * n for n in (1024 * 256, 2 * 3 * 128 * 128, 256 * 256, 256, 1))
    products = 2 * 3 * (2 * 128 * 128 * 1024)
    assert found == [
        Work(3 * block + 4 * 2 + block + partials, fp32=products),
        Work(partials + square / 2),
        Work(3 * square + scale + status, fp32=2 * 2 * 256**3 / 3),
        *[Work(2 * block + square + status, fp32=products)] * 2,
    ]


def test_a_narrow_block_has_one_tile():
    found = works_of(lambda: ops.cholesky_qr_(on_device(1, 600, 48)), SUBSPACE_OPS)
    assert [work.fp32 for work in found] == [2 * 64 * 64 * 600, 0, 2 * 48**3 / 3, 2 * 64 * 64 * 600]


def test_a_sketch_is_written_once():
    found = works_of(lambda: ops.gaussian_sketch(2, 30, 8, seed=0, device="cuda"), SUBSPACE_OPS)
    assert found == [Work(4 * 2 * 30 * 8)]


def test_the_launches_of_a_selection():
    """A batch of 2, whose tiles of 128 x 64 reach beyond the products of 200 x 100 at rank 20."""
    backends = {"lowrank_topk": "triton", "bitmap_to_indices": "native-cuda"}
    factors, k = ((2, 200, 20), (2, 100, 20)), 1000
    found = works_of(lambda: ops.lowrank_topk(*(on_device(*f) for f in factors), k, bracket=on_device(2, 2)), backends)
    left, right, bracket, counts, bitmaps, candidates = (
        2 * n for n in (4 * 4000, 4 * 2000, 4 * 2, 4 * 2, 4 * 200 * 4, 8 * 4096)
    )
    totals_, statuses, lists = 4 * 2 * 1, 4 * 2, 4 * 2 * k  # 800 words of a bitmap are one tile
    assert found[:7] == [
        Work(counts),  # zeros
        Work(left + right + bracket + counts + bitmaps + candidates, tf32=3 * 2 * 2 * 256 * 128 * 32),
        Work(2 * bitmaps),  # a copy
        Work(candidates + counts + 2 * statuses),
        Work(bitmaps + totals_),
        Work(2 * totals_ + statuses),
        Work(bitmaps + totals_ + statuses + lists),
    ]
    assert [work.bytes for work in found[7:]] == [statuses, 0]  # positions of failures, and their copy


def test_the_launches_of_a_migration():
    """Two bf16 matrices of 1500 entries, two blocks of 1024 each: moments, masters and lists."""
    entries, table = 4 * 1024, 4 * 4 * 8

    def program():
        weights = [on_device(100, 30, dtype=torch.bfloat16) for _ in range(2)]
        lists = [on_device(1500, dtype=torch.int32) for _ in range(2)]
        arenas = [on_device(3072) for _ in range(3)]
        old = on_device(3072, dtype=torch.int32)
        ops.arena_migrate_(
            weights, lists, old, [0, 1536], [1500] * 2, *arenas[:2], on_device(2), master=arenas[2], backend="triton"
        )

    found = works_of(program)
    take, put = Work(table + 12 * entries), Work(table + 8 * entries)
    assert found == [Work(8 * 2), Work(table), Work(2 * 4 * 8), take, *[take, put] * 3, put]


def test_a_gather_of_entries_reads_those_alone():
    def program():
        ops.packed_gather(on_device(50, dtype=torch.bfloat16), torch.empty(6, dtype=torch.int32, device="cuda"))

    assert works_of(program, {"packed_gather": "native-cuda"}) == [Work(6 * (4 + 2 + 2))]


def test_a_kernel_without_a_formula_is_an_error():
    indices = dict(dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="_packed_gather_kernel has no formula; add one to bench/common/kernel_costs"):
        works_of(lambda: ops.packed_gather(on_device(50), torch.empty(6, **indices)))


def test_parts_are_told_by_event_and_call():
    def part(event, call):
        return "wait" if call is None else str(launch_cost.is_product(call))

    with FakeCuda() as cuda, cuda.recording(LaunchCost(part)) as cost:
        (on_device(3, 4) @ on_device(4, 5)).add_(1).cpu()
    assert [step.part for step in cost.steps] == ["True", "False", "False", "wait"]
    assert len(cost.launches) == 3 and len(cost.waits) == 1


def test_sizes_of_tensors():
    assert kernel_costs.size(torch.ones(3, 4), None, torch.ones(2, dtype=torch.bfloat16)) == 52
    assert kernel_costs.size(torch.ones(()), torch.ones(0, 3), torch.ones(4, 1).expand(4, 9)) == 4 + 0 + 16


def test_the_longer_of_two_times_counts():
    assert device_seconds(Work(3e9, bf16=79e9)) == pytest.approx(1e-3)
    assert device_seconds(Work(3e8, bf16=79e9, tf32=30e9, fp32=5e9)) == pytest.approx(3e-4)


@pytest.mark.parametrize(("side", "problems", "measured_ms"), [(256, 1, 2.392), (256, 32, 3.444), (128, 32, 1.123)])
def test_eigenproblems_take_what_was_measured(side, problems, measured_ms):
    assert eigen_seconds(side, problems) == pytest.approx(1e-3 * measured_ms, rel=0.07)
    assert eigen_seconds(side, 0) == 0


def test_short_launches_wait_for_the_host_after_a_wait():
    """Launches of 1 us come 5 us apart. A long one lets the host run ahead until it waits."""
    short, long = Work(3e6), Work(3e8)
    assert predicted_seconds([Step("a", short)] * 3) == {"a": pytest.approx(16e-6)}
    assert predicted_seconds([Step("a", long), *[Step("b", short)] * 3]) == pytest.approx({"a": 105e-6, "b": 3e-6})
    after_a_wait = [Step("a", long), Step("a", None), *[Step("b", short)] * 3]
    assert predicted_seconds(after_a_wait) == pytest.approx({"a": 105e-6, "b": 16e-6})


def test_a_call_of_a_library_moves_its_tensors():
    with FakeCuda():
        assert launch_cost.works(Call("copy of positions", (on_device(5), torch.ones(9)), {})) == [Work(20)]
