"""`sparse_adamw_` on every backend: steps against torch's AdamW in fp64, and what must not move."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import REFERENCE
from helpers.bits import BF16, FP16, FP32, assert_near, assert_same_bits, bits
from helpers.step_problems import HYPER, make_problem, step_and_check, torch_step

from lift_kernels.ops import reference

STORAGE = [
    (FP32, False),
    (BF16, False),
    (BF16, True),
    (FP16, False),
    (FP16, True),
]  # dtype of the weight, whether there is a master
ONE_MATRIX = [((40, 30), 300)]
SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


def dtype_id(value):
    return SHORT.get(value)


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("moment", [FP32, BF16], ids=lambda d: f"moments-{SHORT[d]}")
@pytest.mark.parametrize("grad", [FP32, BF16, FP16], ids=lambda d: f"grads-{SHORT[d]}")
@pytest.mark.parametrize("weight, master", STORAGE, ids=["fp32", "bf16", "bf16-master", "fp16", "fp16-master"])
def test_sparse_adamw_step(backend, weight, master, grad, moment, packed, births):
    problem = make_problem(
        backend,
        weight=weight,
        master=master,
        grad=grad,
        moment=moment,
        packed=packed,
        births=births,
        aligned=not births,
    )
    for step in range(2):
        step_and_check(backend, problem)
        problem.new_gradients(step)


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_sparse_adamw_several_blocks(backend, packed, aligned):
    """The last entry of the last, partial block is updated like the first."""
    sizes = [((100, 87), 8193), ((3, 3), 9), ((128, 33), 4097), ((70, 60), 4096)]
    step_and_check(backend, make_problem(backend, sizes, packed=packed, aligned=aligned))


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"weight_decay": 0.5, "lr": 0.1},
        {"betas": (0.0, 0.0), "eps": 1e-3},
        {"betas": (0.9, 0.9999)},
        {"betas": (0.3, 0.5)},
        {"eps": 0.5},
        {"lr": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_options(backend, options, births):
    step_and_check(backend, make_problem(backend, ONE_MATRIX, births=births), **options)


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_first_step(backend, births):
    """From zero moments the bias corrections are largest.

    Every entry moves by lr, whatever its gradient.
    """
    problem = make_problem(backend, ONE_MATRIX, births=births, step=0)
    old, index = problem.weights[0].clone().view(-1), problem.index(0)
    step_and_check(backend, problem, weight_decay=0.0)
    moved = (problem.weights[0].view(-1) - old)[index]
    torch.testing.assert_close(moved, -0.01 * problem.grads[0].view(-1)[index].sign(), rtol=1e-4, atol=0)


def test_sparse_adamw_old_entries_need_no_correction(backend):
    """Ages lie far beyond the end of the table of corrections.

    Steps are too large to be exact in bf16.
    """
    problem = make_problem(backend, ONE_MATRIX, births=True, step=0)
    problem.births[problem.segment(0)] = torch.arange(300, dtype=torch.int32) * 333
    problem.exp_avg_sq[problem.segment(0)] = 0.1
    problem.steps += 100_000
    step_and_check(backend, problem)


@pytest.mark.parametrize("weight, master", STORAGE, ids=["fp32", "bf16", "bf16-master", "fp16", "fp16-master"])
def test_sparse_adamw_scaled_gradients(backend, weight, master):
    problem = make_problem(backend, ONE_MATRIX, weight=weight, master=master)
    scale = torch.tensor(0.37, device=backend.device)
    step_and_check(backend, problem, inv_scale=scale, found_inf=torch.zeros((), device=backend.device), maximize=True)


@pytest.mark.parametrize("weight, master", STORAGE, ids=["fp32", "bf16", "bf16-master", "fp16", "fp16-master"])
def test_sparse_adamw_found_inf_changes_nothing(backend, weight, master):
    problem = make_problem(backend, weight=weight, master=master, moment=BF16)
    problem.grads[0].fill_(float("inf"))
    problem.grads[4].fill_(float("nan"))
    before = problem.state()
    problem.step(backend, found_inf=torch.ones((), device=backend.device))
    assert_same_bits(problem.state(), before)


def test_sparse_adamw_lr_tensor(backend):
    """A tensor on the device gives the same bits as the number."""
    start = make_problem(backend, births=True)
    numbers = {}
    for lr in (0.25, torch.tensor(0.25, device=backend.device), torch.tensor(0.25, dtype=torch.float64)):
        problem = start.copy()
        problem.step(backend, lr=lr)
        numbers[type(lr), getattr(lr, "dtype", None)] = problem.state()
    first, *others = numbers.values()
    for other in others:
        assert_same_bits(other, first)
    step_and_check(backend, start, lr=torch.tensor(0.25, device=backend.device))


@pytest.mark.parametrize("weight", [BF16, FP16], ids=dtype_id)
@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_stochastic_noise_is_the_specified_one(backend, weight, births):
    """Weights are rounded with the noise of the reference.

    fp16 weights near 2^-14 also take the subnormal path.
    """
    for seed in (0, 1, 2**31 - 1):
        problem = make_problem(backend, weight=weight, births=births, aligned=births, seed=seed)
        if weight == FP16:
            problem.weights[0] *= 2.0**-10
        step_and_check(backend, problem, stochastic=True, seed=seed, **({"lr": 1e-4} if weight == FP16 else {}))


@pytest.mark.parametrize("weight, lr", [(BF16, 0.001), (FP16, 0.0001)], ids=["bf16", "fp16"])
def test_sparse_adamw_stochastic_mean_is_unbiased(backend, weight, lr):
    """4096 ones should become 1 - lr, which none of them can represent.

    Their mean does, within 4 standard errors.
    """
    start = make_problem(backend, [((64, 64), 4096)], weight=weight, step=0)
    start.weights[0].fill_(1.0)
    start.grads[0].fill_(1.0)
    means = []
    for seed in range(8):
        problem = start.copy()
        problem.step(backend, lr=lr, weight_decay=0.0, stochastic=True, seed=seed)
        below = 1.0 - {BF16: 2.0**-8, FP16: 2.0**-11}[weight]
        assert set(problem.weights[0].float().unique().tolist()) == {below, 1.0}
        means.append(problem.weights[0].double().mean())
    share = lr / (1 - below)
    error = (1 - below) * (share * (1 - share) / (8 * 4096)) ** 0.5
    assert abs(torch.stack(means).mean().item() - (1 - lr)) < 4 * error
    assert torch.stack(means).unique().numel() == 8, "every seed has noise of its own"


def test_sparse_adamw_stochastic_hash_by_hand():
    """The counter hash equals arithmetic on Python's integers."""

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    counters = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    assert reference.counter_hash(torch.tensor(counters)).tolist() == [mix(c) for c in counters]
    assert reference.stochastic_key(torch.tensor([1.0, 7.0]), 5).tolist() == [mix(mix(5) ^ 1), mix(mix(5) ^ 7)]


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_trajectory(backend, births):
    """Over 20 steps the drift from an fp64 run is at most twice that of torch's fp32 run.

    The rate changes at every step.
    """
    problem = make_problem(backend, ONE_MATRIX, births=births, step=0)
    segment, index = problem.segment(0), problem.index(0)
    runs = {dtype: problem.copy() for dtype in (FP32, torch.float64)}
    for dtype, run in runs.items():
        run.weights = [w.to(dtype) for w in run.weights]
        run.exp_avg, run.exp_avg_sq = run.exp_avg.to(dtype), run.exp_avg_sq.to(dtype)
    for step in range(20):
        lr = 0.01 / (1 + step)
        problem.step(backend, lr=lr)
        for dtype, run in runs.items():
            run.steps += 1
            entries = torch_step(run, 0, dtype, lr=lr)
            run.weights[0].view(-1)[index] = entries.w
            run.exp_avg[segment], run.exp_avg_sq[segment] = entries.m, entries.v
        for each in (problem, *runs.values()):
            each.new_gradients(step)
    yardstick, truth = runs.values()
    assert_near(problem.weights[0], truth.weights[0], yardstick.weights[0], "weight")
    assert_near(problem.exp_avg[segment], truth.exp_avg[segment], yardstick.exp_avg[segment], "exp_avg")
    assert_near(problem.exp_avg_sq[segment], truth.exp_avg_sq[segment], yardstick.exp_avg_sq[segment], "exp_avg_sq")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_sparse_adamw_reference_is_torch_at_density_1(packed, maximize):
    """They are equal to the bit, over 50 steps with decay and a schedule."""
    problem = make_problem(REFERENCE, [((12, 11), 132), ((7, 5), 35)], packed=packed, step=0)
    problem.steps.zero_()
    parameters = [torch.nn.Parameter(w.clone()) for w in problem.weights]
    adamw = torch.optim.AdamW(parameters, **HYPER, foreach=False, fused=False, maximize=maximize)
    for step in range(50):
        problem.new_gradients(step)
        for parameter, grad in zip(parameters, problem.grads):
            parameter.grad = grad.view(parameter.shape).clone()
        adamw.param_groups[0]["lr"] = lr = 0.01 * (1 - step / 60)
        adamw.step()
        problem.step(REFERENCE, lr=lr, maximize=maximize)
        for i, parameter in enumerate(parameters):
            assert torch.equal(problem.weights[i], parameter)
            assert torch.equal(problem.exp_avg[problem.segment(i)], adamw.state[parameter]["exp_avg"].view(-1))
            assert torch.equal(problem.exp_avg_sq[problem.segment(i)], adamw.state[parameter]["exp_avg_sq"].view(-1))


def test_sparse_adamw_decay_touches_selected_entries_only(backend):
    problem = make_problem(backend, ONE_MATRIX, step=0)
    problem.grads[0].zero_()
    old, index = problem.weights[0].clone().view(-1), problem.index(0)
    problem.step(backend, lr=0.25, weight_decay=0.5)
    expected = old.clone()
    expected[index] *= 0.875
    assert torch.equal(problem.weights[0].view(-1), expected)


@pytest.mark.parametrize("weight, master", STORAGE, ids=["fp32", "bf16", "bf16-master", "fp16", "fp16-master"])
def test_sparse_adamw_not_finite_gradients_act_as_in_torch(backend, weight, master):
    problem = make_problem(backend, ONE_MATRIX, weight=weight, master=master)
    segment, index = problem.segment(0), problem.index(0)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38], device=backend.device)
    problem.grads[0].view(-1)[index[:5]] = special
    before = problem.copy()
    problem.step(backend)
    before.steps += 1
    torch_one = torch_step(before, 0, FP32)
    pairs = [(problem.exp_avg[segment], torch_one.m), (problem.exp_avg_sq[segment], torch_one.v)]
    pairs.append((problem.weights[0].view(-1)[index], torch_one.w.to(weight)))
    if master:
        pairs.append((problem.master[segment], torch_one.w))
    for ours, theirs in pairs:
        assert torch.equal(ours[:5].isnan(), theirs[:5].isnan())
        assert torch.equal(ours[:5].isinf(), theirs[:5].isinf())
        assert ours[5:].isfinite().all()
    clean = before.copy()
    clean.grads[0].view(-1)[index[:5]] = 0.0
    clean.step(backend, advance=False)
    assert torch.equal(bits(problem.exp_avg[segment][5:]), bits(clean.exp_avg[segment][5:])), (
        "only those entries are touched"
    )
    assert torch.equal(bits(problem.weights[0].view(-1)[index[5:]]), bits(clean.weights[0].view(-1)[index[5:]]))


@pytest.mark.parametrize("weight, stochastic", [(FP32, False), (BF16, True)], ids=["fp32", "stochastic"])
def test_sparse_adamw_same_bits_twice(backend, weight, stochastic):
    start = make_problem(backend, [((200, 80), 12000), ((64, 64), 100)], weight=weight)
    results = []
    for _ in range(2):
        problem = start.copy()
        for _ in range(3):
            problem.step(backend, stochastic=stochastic, seed=3)
        results.append(problem.state())
    assert_same_bits(*results)


@pytest.mark.parametrize("sizes", [[], [((4, 4), 0)], [((4, 4), 0), ((3, 5), 0)]], ids=["no-matrix", "k=0", "two-k=0"])
def test_sparse_adamw_nothing_to_do(backend, sizes):
    problem = make_problem(backend, sizes)
    before = problem.state()
    problem.step(backend)
    assert_same_bits(problem.state(), before)


def test_sparse_adamw_one_matrix_at_a_time_is_the_same(backend):
    """A launch over many matrices equals one launch for each.

    No matrix sees the scalars or entries of another.
    """
    together, apart = make_problem(backend, births=True), make_problem(backend, births=True)
    together.step(backend)
    apart.steps += 1
    everything = apart.weights, apart.grads, apart.offsets, apart.counts, apart.steps
    for i in reversed(range(len(apart.weights))):
        apart.weights, apart.grads, apart.offsets, apart.counts, apart.steps = (x[i : i + 1] for x in everything)
        apart.step(backend, advance=False)
    assert_same_bits(apart.state(), together.state())
