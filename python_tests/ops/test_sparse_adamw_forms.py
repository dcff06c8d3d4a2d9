"""`sparse_adamw_` with 8-bit moments, low halves of masters and packed weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import backends
from helpers.backends import REFERENCE, cpu_level
from helpers.bits import BF16, FP16, FP32, assert_near, assert_same_bits, bits
from helpers.state_forms import FormProblem, assert_codes_near, assert_scales_near, make_forms
from helpers.step_problems import BORDER

from lift_kernels.ops import cpu_levels
from lift_kernels.ops.state_formats import decode, dither, encode_first, encode_root, join_master, split_master

BACKENDS = backends.STATE_FORMS
FORMS = {
    "codes": {"coded": True},
    "codes, bf16": {"coded": True, "weight": BF16},
    "codes, fp16": {"coded": True, "weight": FP16},
    "codes, bf16, master": {"coded": True, "weight": BF16, "master": True},
    "codes, split": {"coded": True, "split": True},
    "split": {"split": True},
    "split, bf16 moments": {"split": True, "moment": BF16},
    "packed weights": {"packed_weights": True},
    "packed weights, bf16, master": {"packed_weights": True, "weight": BF16, "master": True},
    "packed weights, codes": {"packed_weights": True, "coded": True},
    "packed weights, codes, split": {"packed_weights": True, "coded": True, "split": True},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
SIZES = [((13, 17), 40), ((9, 8), 72), ((1, 1), 1), ((5, 3), 0), ((64, 31), 513), ((8, 4), 32), ((40, 10), 257)]


def entries(problem: FormProblem, of) -> torch.Tensor:
    return torch.cat([of(i) for i in range(len(problem.weights))])


def assert_form_stepped(before: FormProblem, after: FormProblem, **options) -> None:
    """Check a step against torch on fp32 state, and against the reference; nothing else moved."""
    before.steps = after.steps.clone()
    expected = before.copy()
    expected.step(REFERENCE, advance=False, **options)
    truth, yardstick = (before.stepped(dtype, **options) for dtype in (torch.float64, FP32))
    masters = entries(after, after.masters)
    if after.master is not None or after.weights[0].dtype == FP32:
        assert_near(masters, truth.w, yardstick.w, "master")
    else:
        assert_near(masters.to(after.weights[0].dtype), truth.w, yardstick.w, "weight")
    found, wanted = after.state(), expected.state()
    for i in range(len(after.weights)):
        at, index = after.segment(i), BORDER + after.index(i)
        if after.exp_avg_scale is not None:
            for name in ("exp_avg", "exp_avg_sq"):
                groups = after.groups(i)
                assert_codes_near(found[name][at], wanted[name][at], name)
                scales = getattr(after, f"{name}_scale")[groups], getattr(expected, f"{name}_scale")[groups]
                assert_scales_near(*scales, f"{name}_scale")
                wanted[f"{name}_scale"][groups] = found[f"{name}_scale"][groups]
        for name in ("exp_avg", "exp_avg_sq", *(["master"] if after.master is not None else [])):
            wanted[name][at] = found[name][at]
        wanted[f"weight {i}"][index] = found[f"weight {i}"][index]
    assert_same_bits(found, wanted)


def step_and_check(backend, problem: FormProblem, **options) -> None:
    before, inputs = problem.copy(), problem.inputs()
    problem.step(backend, **options)
    assert_form_stepped(before, problem, **options)
    inputs["steps"] = bits(problem.steps)
    assert_same_bits(problem.inputs(), inputs)


@every_form
@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
@pytest.mark.parametrize("grad", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_sparse_adamw_forms(backend, form, births, grad):
    """Tails, a matrix of one entry and one of none; gradients are dense beside dense weights."""
    problem = make_forms(backend, SIZES, grad=grad, births=births, **form)
    for step in range(2):
        step_and_check(backend, problem)
        problem.new_gradients(step)


@every_form
@pytest.mark.parametrize(
    "options",
    [{"maximize": True}, {"weight_decay": 0.5, "lr": 0.1}, {"betas": (0.3, 0.5)}, {"betas": (0.9, 0.9999)}],
    ids=str,
)
def test_sparse_adamw_forms_options(backend, form, options):
    problem = make_forms(backend, [((40, 30), 300)], packed=True, **form)
    scale = torch.tensor(0.37, device=backend.device)
    step_and_check(backend, problem, inv_scale=scale, found_inf=torch.zeros((), device=backend.device), **options)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 127, 128, 129, 500, 1200])
@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_forms_codes_are_those_of_the_reference(backend, count, births):
    """With betas of 0, moments are functions of the gradient alone, so the bits are equal."""
    problem = make_forms(backend, [((40, 30), count)], coded=True, split=True, births=births)
    problem.grads[0] *= torch.exp(3 * torch.randn(40, 1, generator=torch.Generator().manual_seed(count)))
    expected = problem.copy()
    options = {"betas": (0.0, 0.0), "inv_scale": torch.tensor(0.5, device=backend.device)}
    problem.step(backend, **options)
    expected.step(REFERENCE, **options)
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
        assert torch.equal(problem.state()[name], expected.state()[name]), name
    grad = problem.grads[0].view(-1)[problem.index(0)] * 0.5
    positions = torch.arange(problem.offsets[0], problem.offsets[0] + count)
    assert torch.equal(problem.exp_avg[problem.segment(0)], encode_first(grad)[0])
    up = dither(positions, int(problem.steps[0]))
    assert torch.equal(problem.exp_avg_sq[problem.segment(0)], encode_root(grad.square().sqrt(), up)[0])


def test_sparse_adamw_forms_groups_that_are_not_finite(backend):
    """NaN and infinity spoil all moments of their groups, and none of others."""
    problem = make_forms(backend, [((40, 30), 320)], coded=True, split=True, packed=True)
    grad = problem.grads[0]
    grad[3], grad[40], grad[41], grad[70] = float("nan"), float("inf"), float("-inf"), 3e38
    grad[96:128], grad[128], grad[129:160] = 0.0, 1e4, 1e-22
    before, options = problem.copy(), {"betas": (0.0, 0.0)}
    problem.step(backend, **options)
    expected = before.copy()
    expected.step(REFERENCE, **options)
    assert torch.equal(problem.exp_avg, expected.exp_avg) and torch.equal(problem.exp_avg_sq, expected.exp_avg_sq)
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        ours, theirs = getattr(problem, name), getattr(expected, name)
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num()), name
    m, root = problem.moments(0)
    assert m[:64].isnan().all() and root[:96].isnan().all() and m[64:96].isfinite().all()
    assert (m[96:128] == 0).all() and (root[96:128] == 0).all() and (root[128:160] > 0).all()
    assert m[160:].isfinite().all() and problem.masters(0)[160:].isfinite().all()


@every_form
def test_sparse_adamw_forms_found_inf_changes_nothing(backend, form):
    """No bit, whatever the gradients are."""
    problem = make_forms(backend, SIZES, **form)
    problem.grads[0].fill_(float("inf"))
    problem.grads[4].fill_(float("nan"))
    before = problem.state()
    problem.step(backend, found_inf=torch.ones((), device=backend.device))
    assert_same_bits(problem.state(), before)


@every_form
def test_sparse_adamw_forms_one_matrix_at_a_time_is_the_same(backend, form):
    together, apart = make_forms(backend, SIZES, births=True, **form), make_forms(backend, SIZES, births=True, **form)
    together.step(backend)
    apart.steps += 1
    everything = apart.weights, apart.grads, apart.offsets, apart.counts, apart.steps
    for i in reversed(range(len(apart.weights))):
        apart.weights, apart.grads, apart.offsets, apart.counts, apart.steps = (x[i : i + 1] for x in everything)
        apart.step(backend, advance=False)
    assert_same_bits(apart.state(), together.state())


def test_sparse_adamw_forms_strided_gradients(backend):
    problem = make_forms(backend, [((30, 20), 77), ((10, 12), 33)], coded=True, split=True)
    contiguous = problem.copy()
    problem.grads[0] = problem.grads[0].t().contiguous().t()
    problem.grads[1] = torch.stack([problem.grads[1], -problem.grads[1]], dim=-1)[..., 0]
    assert not any(grad.is_contiguous() for grad in problem.grads)
    problem.step(backend)
    contiguous.step(backend)
    assert_same_bits(problem.state(), contiguous.state())


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "codes"])
@pytest.mark.parametrize("weight, split", [(BF16, False), (BF16, True), (FP16, False), (FP32, False)])
def test_sparse_adamw_forms_packed_weights_are_those_of_matrices(backend, weight, split, coded, stochastic):
    """The same bits, also with noise, which is a function of the arena position."""
    if stochastic and (split or weight == FP32):
        weight, split = BF16, False
    forms = {"weight": weight, "split": split, "coded": coded}
    matrices, vectors = (make_forms(backend, SIZES, packed=True, packed_weights=p, **forms) for p in (False, True))
    for _ in range(2):
        for problem in (matrices, vectors):
            problem.step(backend, stochastic=stochastic, seed=5)
    for i, (matrix, vector) in enumerate(zip(matrices.weights, vectors.weights)):
        assert torch.equal(bits(matrix).view(-1)[matrices.index(i)], bits(vector))
    for name in ("exp_avg", "exp_avg_sq", *(["master"] if split else [])):
        assert torch.equal(matrices.state()[name], vectors.state()[name])


def test_sparse_adamw_forms_split_masters_are_fp32_masters_until_a_tie(backend):
    """Over 1,000 steps with given gradients, every entry has the same bits up to its first tie."""
    whole = make_forms(backend, [((64, 40), 1000)], weight=BF16, master=True, packed=True, step=0)
    halves = make_forms(backend, [((64, 40), 1000)], split=True, packed=True, step=0)
    at = whole.segment(0)
    halves.weights[0].copy_(whole.weights[0])
    whole.master[at] = whole.masters(0) + 0.001 * torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole.weights[0].view(-1)[whole.index(0)] = whole.master[at].to(BF16)
    halves.weights[0].copy_(whole.weights[0])
    halves.master[at] = split_master(whole.master[at])
    met, ties = (bits(whole.master[at]) & 0x1FFFF) == 0x18000, 0
    for step in range(1000):
        for problem in (whole, halves):
            problem.new_gradients(step)
            problem.step(backend, lr=1e-4)
        now = (bits(whole.master[at]) & 0x1FFFF) == 0x18000
        met, ties = met | now, ties + int(now.sum())
        same = bits(halves.masters(0)) == bits(whole.master[at])
        assert same[~met].all()
    assert 1 <= ties <= 30, "one number of 131,072 is one"
    torch.testing.assert_close(halves.masters(0), whole.master[at], rtol=0, atol=1e-6)
    assert (bits(halves.weights[0]) != bits(whole.weights[0])).sum() <= ties


@pytest.mark.native
@every_form
@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_forms_have_the_same_bits_at_every_level(form, births):
    native = backends.BackendDevice("native-cpu", "cpu")
    for grad, packed in itertools.product((FP32, BF16, FP16), (False, True)):
        start = make_forms(native, SIZES, grad=grad, packed=packed, births=births, **form)
        start.grads[4] *= 1e-20
        states = []
        for level in cpu_levels.levels():
            problem = start.copy()
            with cpu_level(level):
                for _ in range(3):
                    problem.step(native)
            states.append(problem.state())
        for state in states[1:]:
            assert_same_bits(state, states[0])


def test_join_and_decode_are_what_a_step_starts_from(backend):
    """A step without a gradient, rate and decay keeps the masters, and moments shrink by betas."""
    problem = make_forms(backend, [((40, 30), 96)], coded=True, split=True, packed=True)
    problem.grads[0].zero_()
    before = problem.copy()
    problem.step(backend, lr=0.0, betas=(0.5, 0.25))
    weight = before.weights[0].view(-1)[before.index(0)]
    masters = join_master(weight, before.master[before.segment(0)])
    assert torch.equal(join_master(masters.to(BF16), split_master(masters)), problem.masters(0))
    halves = decode(before.exp_avg[before.segment(0)], before.exp_avg_scale[before.groups(0)]) / 2
    assert torch.allclose(problem.moments(0)[0], halves, rtol=1e-5, atol=0)
