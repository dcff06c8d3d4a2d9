"""8-bit moments, low halves of masters and packed weights: the Triton kernels, bit by bit.

The codes of a step must be those that the specification makes of the moments which the same kernel
computes in fp32. So the rounding errors of a step, in which backends differ, have no part in it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, assert_same_bits, bits
from helpers.migrations import make_migration
from helpers.step_problems import make_problem

from lift_kernels.ops import state_formats
from lift_kernels.ops.state_formats import GROUP, decode, encode_first, encode_root, groups_of

COUNTS = (0, 1, 31, 32, 33, 500, 1023, 1024)
SIZES = [((32, 32), count) for count in COUNTS]
SEVERAL = [((100, 87), 8193), ((3, 3), 9), ((128, 33), 4097), ((70, 60), 4096)]
WEIGHTS = {
    "fp32": {"weight": FP32},
    "bf16": {"weight": BF16},
    "bf16-master": {"weight": BF16, "master": True},
    "bf16-low": {"weight": BF16, "low": True},
    "fp16": {"weight": FP16},
    "fp16-master": {"weight": FP16, "master": True},
}
pytestmark = pytest.mark.interpreter
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


def group_slice(offset, count):
    return slice(offset // GROUP, offset // GROUP + groups_of(count))


def random_codes(length, device):
    """Arenas of codes, and of scales that no test expects."""
    generator = torch.Generator().manual_seed(3)
    codes = {
        "exp_avg": torch.randint(-127, 128, (length,), generator=generator).to(torch.int8),
        "exp_avg_sq": torch.randint(0, 256, (length,), generator=generator).to(torch.uint8),
        "exp_avg_scale": torch.full((groups_of(length),), 777.0),
        "exp_avg_sq_scale": torch.full((groups_of(length),), float("nan")),
    }
    return {name: tensor.to(device) for name, tensor in codes.items()}


def root_of(backend, squares):
    """Square roots. Those of torch may be by MKL, which does not always round to nearest."""
    return squares.sqrt() if backend.name == "reference" else squares.double().sqrt().float()


def encode_into(backend, codes, problem, up):
    """Put codes of a problem's fp32 moments into the arenas. ``up(i)`` rounds the roots."""
    for i, (offset, count) in enumerate(zip(problem.offsets, problem.counts)):
        segment, group = problem.segment(i), group_slice(offset, count)
        codes["exp_avg"][segment], codes["exp_avg_scale"][group] = encode_first(problem.exp_avg[segment])
        roots = encode_root(root_of(backend, problem.exp_avg_sq[segment]), up(i))
        codes["exp_avg_sq"][segment], codes["exp_avg_sq_scale"][group] = roots


def decode_into(problem, codes):
    """Give a problem the fp32 moments that codes stand for."""
    for i, (offset, count) in enumerate(zip(problem.offsets, problem.counts)):
        segment, group = problem.segment(i), group_slice(offset, count)
        problem.exp_avg[segment] = decode(codes["exp_avg"][segment], codes["exp_avg_scale"][group])
        problem.exp_avg_sq[segment] = decode(codes["exp_avg_sq"][segment], codes["exp_avg_sq_scale"][group]).square()


@dataclasses.dataclass
class Forms:
    """A problem in fp32, and the same in codes, low halves and packed weights."""

    problem: object
    codes: dict[str, torch.Tensor] | None
    low: torch.Tensor | None
    packed: list[torch.Tensor] | None

    def step(self, backend, **options):
        """Step in the forms that there are. The problem in fp32 stays."""
        one = dataclasses.replace(self.problem, steps=self.problem.steps.clone())
        if self.codes is not None:
            one = dataclasses.replace(one, exp_avg=self.codes["exp_avg"], exp_avg_sq=self.codes["exp_avg_sq"])
            options |= {name: self.codes[name] for name in ("exp_avg_scale", "exp_avg_sq_scale")}
        if self.low is not None:
            one = dataclasses.replace(one, master=self.low)
        if self.packed is not None:
            one, options["packed_weights"] = dataclasses.replace(one, weights=self.packed), True
        one.step(backend, **options)

    def state(self):
        """Bits of all that is written, with gaps and borders."""
        problem = self.problem
        tensors = {f"weight {i}": buffer for i, buffer in enumerate(problem.buffers)}
        tensors |= {f"packed weight {i}": packed._base for i, packed in enumerate(self.packed or [])}
        tensors |= self.codes or {"exp_avg": problem.exp_avg, "exp_avg_sq": problem.exp_avg_sq}
        tensors["master"] = problem.master if self.low is None else self.low
        return {name: bits(tensor).clone() for name, tensor in tensors.items() if tensor is not None}


def make_forms(
    backend, sizes=SIZES, *, low=False, packed_weights=False, coded=True, aligned=True, wide=True, master=False, **form
):
    """Several matrices. Packed weights that are not ``wide`` start at odd addresses."""
    problem = make_problem(backend, sizes, master=master or low, packed=form.pop("packed", packed_weights), **form)
    if not aligned:
        problem = pushed(problem, GROUP if coded else 1)
    codes, halves, packed = None, None, None
    if coded:
        codes = random_codes(problem.indices.numel(), problem.indices.device)
        encode_into(backend, codes, problem, lambda i: 0.5)
        decode_into(problem, codes)
    if low:
        halves = torch.full(problem.indices.shape, 0x1234, dtype=torch.int16, device=problem.indices.device)
        for i, weight in enumerate(problem.weights):
            segment, index = problem.segment(i), problem.index(i)
            weight.view(-1)[index] = problem.master[segment].to(BF16)
            halves[segment] = state_formats.split_master(problem.master[segment])
            problem.master[segment] = state_formats.join_master(weight.view(-1)[index], halves[segment])
    if packed_weights:
        packed = []
        for i, weight in enumerate(problem.weights):
            start = 16 if wide else 3
            buffer = torch.full((problem.counts[i] + 2 * start,), float("nan"), dtype=weight.dtype)
            packed.append(buffer.to(weight.device)[start : start + problem.counts[i]])
            packed[-1].copy_(weight.view(-1)[problem.index(i)])
    return Forms(problem, codes, halves, packed)


def pushed(problem, unit):
    """The problem with segments that start at multiples of ``unit``, one close behind the other."""
    offsets, end = [], unit
    for count in problem.counts:
        offsets.append(end)
        end += -(-count // unit) * unit
    arenas = {}
    for name in ("indices", "exp_avg", "exp_avg_sq", "master", "births"):
        if (old := getattr(problem, name)) is not None:
            arenas[name] = old.roll(1).clone()
            for i, offset in enumerate(offsets):
                arenas[name][offset : offset + problem.counts[i]] = old[problem.segment(i)]
    return dataclasses.replace(problem, offsets=offsets, **arenas)


def step_and_check(backend, forms, **options):
    """Step in the forms and in fp32, and compare all bits."""
    plain, codes, inputs = forms.problem.copy(), forms.codes, forms.problem.inputs()
    expected = forms.state()
    after = None if codes is None else {name: tensor.clone() for name, tensor in codes.items()}
    plain.step(backend, **options)
    forms.step(backend, **options)
    found = forms.state()
    assert_same_bits(forms.problem.inputs(), inputs)

    def up(i):
        position = torch.arange(plain.segment(i).start, plain.segment(i).stop, device=plain.indices.device)
        return state_formats.dither(position, int(plain.steps[i]))

    if after is None:
        after = {"exp_avg": plain.exp_avg, "exp_avg_sq": plain.exp_avg_sq}
    else:
        encode_into(backend, after, plain, up)
    expected |= {name: bits(tensor) for name, tensor in after.items()}
    for i, weight in enumerate(plain.weights):
        segment = plain.segment(i)
        if forms.low is not None:
            expected["master"][segment] = state_formats.split_master(plain.master[segment])
        if forms.packed is None:
            expected[f"weight {i}"] = bits(plain.buffers[i])
        else:
            packed = expected[f"packed weight {i}"]
            border = (packed.numel() - plain.counts[i]) // 2
            packed[border : border + plain.counts[i]] = bits(weight).view(-1)[plain.index(i)]
    if forms.low is None and plain.master is not None:
        expected["master"] = bits(plain.master)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@each_weight
def test_sparse_adamw_codes(backend, weight, packed, births):
    """Segments of all lengths around a group, each matrix with a step count of its own."""
    step_and_check(backend, make_forms(backend, packed=packed, births=births, **weight))


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_sparse_adamw_codes_of_several_blocks(backend, packed, aligned):
    form = {"weight": BF16, "low": True, "births": packed, "aligned": aligned}
    step_and_check(backend, make_forms(backend, SEVERAL, packed=packed, **form))


@pytest.mark.parametrize("grad", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", [{"maximize": True}, {"betas": (0.0, 0.0), "eps": 1e-3}, {"betas": (0.9, 0.999)}])
def test_sparse_adamw_codes_options(backend, grad, options):
    forms = make_forms(backend, grad=grad)
    scale = torch.tensor(0.37, device=backend.device)
    zero = torch.zeros((), device=backend.device)
    step_and_check(backend, forms, inv_scale=scale, found_inf=zero, **options)


@pytest.mark.parametrize("weight", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("packed_weights", [False, True], ids=["matrices", "packed weights"])
def test_sparse_adamw_codes_stochastic(backend, weight, packed_weights):
    forms = make_forms(backend, weight=weight, packed_weights=packed_weights)
    step_and_check(backend, forms, stochastic=True, seed=5)


@pytest.mark.parametrize("wide", [False, True], ids=["odd addresses", "wide"])
@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "codes"])
@each_weight
def test_sparse_adamw_packed_weights(backend, weight, coded, wide):
    forms = make_forms(backend, packed_weights=True, coded=coded, wide=wide, births=wide, **weight)
    step_and_check(backend, forms)


@pytest.mark.parametrize("packed_weights", [False, True], ids=["matrices", "packed weights"])
@pytest.mark.parametrize("moment", [FP32, BF16], ids=["fp32", "bf16"])
def test_sparse_adamw_low_halves(backend, moment, packed_weights):
    """Without codes. Weights in matrices come with segments that start anywhere."""
    form = {"weight": BF16, "low": True, "coded": False, "moment": moment, "aligned": packed_weights}
    step_and_check(backend, make_forms(backend, SEVERAL, packed_weights=packed_weights, **form))


def test_sparse_adamw_low_halves_between_two_weights(backend):
    """Masters in the middle of two bf16 values, and beside it, on both sides of 0."""
    forms = make_forms(backend, [((32, 32), 1024)], weight=BF16, low=True)
    problem, segment = forms.problem, forms.problem.segment(0)
    pattern = torch.arange(1024, dtype=torch.int32) * 0x11235 + 0x3F000000
    pattern[::2] = (pattern[::2] & -0x10000) | 0x8000
    pattern[1::4] = (pattern[1::4] & -0x10000) | 0x8001
    pattern[::3] |= -(2**31)
    masters = pattern.view(FP32).to(problem.indices.device)
    problem.weights[0].view(-1)[problem.index(0)] = masters.to(BF16)
    forms.low[segment] = state_formats.split_master(masters)
    problem.master[segment] = state_formats.join_master(masters.to(BF16), forms.low[segment])
    step_and_check(backend, forms, lr=0.0)  # so each master is written as it was read
    assert torch.equal(forms.low[segment], state_formats.split_master(masters))


def test_sparse_adamw_codes_behind_a_segment_have_no_part(backend):
    """They are the largest ones, and gradients make the moments of the segment small."""
    forms = make_forms(backend)
    problem, behind = forms.problem, torch.ones_like(forms.codes["exp_avg"], dtype=torch.bool)
    for i, grad in enumerate(problem.grads):
        behind[problem.segment(i)] = False
        grad.view(-1)[problem.index(i)] = -5.0 * problem.exp_avg[problem.segment(i)]
    forms.codes["exp_avg"][behind] = 127
    step_and_check(backend, forms)


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_codes_of_what_is_not_finite(backend, births):
    """The scale of its group is NaN, and no other group sees it."""
    forms = make_forms(backend, births=births)
    special = [float("inf"), float("-inf"), float("nan"), 3e38, -3e38]
    for i, value in enumerate(special, start=3):
        forms.problem.grads[i].view(-1)[forms.problem.index(i)[-1]] = value
    step_and_check(backend, forms)
    scales = forms.codes["exp_avg_scale"]
    for i, count in enumerate(COUNTS):
        found = scales[group_slice(forms.problem.offsets[i], count)].isnan().tolist()
        assert found == [False] * (len(found) - 1) + [3 <= i < 6] * (len(found) > 0), f"{count} entries"
    decode_into(forms.problem, forms.codes)
    step_and_check(backend, forms)  # reads NaN


def test_sparse_adamw_codes_of_zeros_and_small_numbers(backend):
    """A group without a gradient keeps scales of 0. The rounding of tiny roots never gives 0."""
    forms = make_forms(backend, step=0)
    problem = forms.problem
    for i, factor in enumerate((1, 0.0, 1e-12, 1e-20, 1e-35, 1e-38, 1e19, 1.0)):
        problem.grads[i] *= factor
    problem.grads[7].view(-1)[::3] *= 1e-6
    problem.grads[7].view(-1)[::7] = 0.0
    step_and_check(backend, forms)
    root = forms.codes["exp_avg_sq"][problem.segment(7)]
    index = problem.index(7)
    assert torch.equal(root == 0, problem.grads[7].view(-1)[index] == 0)


@pytest.mark.parametrize("packed_weights", [False, True], ids=["matrices", "packed weights"])
def test_sparse_adamw_codes_found_inf_changes_nothing(backend, packed_weights):
    forms = make_forms(backend, SEVERAL, weight=BF16, low=True, packed_weights=packed_weights)
    forms.problem.grads[0].fill_(float("nan"))
    before = forms.state()
    forms.step(backend, found_inf=torch.ones((), device=backend.device))
    assert_same_bits(forms.state(), before)


@pytest.mark.parametrize("births", [False, True], ids=["global", "per-entry"])
def test_sparse_adamw_codes_as_the_reference(backend, births):
    """Over four steps scales agree, and hardly a code differs: by one where a moment differs."""
    forms = make_forms(backend, [((100, 87), 5000)], weight=BF16, low=True, births=births)
    other = dataclasses.replace(
        forms,
        problem=forms.problem.copy(),
        codes={name: tensor.clone() for name, tensor in forms.codes.items()},
        low=forms.low.clone(),
    )
    reference = dataclasses.replace(backend, name="reference")
    for _ in range(4):
        for one, name in ((forms, backend), (other, reference)):
            one.problem.steps += 1
            one.step(name, advance=False)
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        torch.testing.assert_close(forms.codes[name], other.codes[name], rtol=1e-6, atol=0, equal_nan=True)
    for name in ("exp_avg", "exp_avg_sq"):
        distance = (forms.codes[name].int() - other.codes[name].int()).abs()
        assert distance.max() <= 1 and (distance > 0).float().mean() < 1e-3


def test_sparse_adamw_codes_bump_versions(backend):
    forms = make_forms(backend, weight=BF16, low=True, packed_weights=True)
    written = [*forms.codes.values(), forms.low, *forms.packed]
    versions = [tensor._version for tensor in written]
    forms.step(backend)
    assert all(tensor._version > version for tensor, version in zip(written, versions))


def similar(numel, count, other, seed):
    """Two lists of some entries, of which many are in both."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(numel, generator=generator)
    shift = min(count, other) // 4
    return order[:count].sort().values.tolist(), order[shift:][:other].sort().values.tolist()


LISTS = [
    (600, *similar(600, count, other, count + other))
    for count, other in ((0, 0), (0, 1), (1, 31), (32, 33), (33, 32), (500, 500), (64, 0), (500, 31), (31, 500))
]
BLOCKS = [(40001, *similar(40001, 9000, 16400, 1)), (9, [2, 3], [3, 4]), (20000, *similar(20000, 4097, 4096, 2))]


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("lists", [LISTS, BLOCKS], ids=["edges", "several blocks"])
@pytest.mark.parametrize("low, coded", [(True, True), (False, True), (True, False)], ids=["both", "codes", "low"])
def test_arena_migrate_codes(backend, low, coded, lists, aligned):
    """All arenas become what the reference makes of them, gaps and scales included."""
    migration = make_migration(backend, lists, weight=BF16, births=aligned, master=low, aligned=aligned or coded)
    length, device = migration.indices.numel(), migration.indices.device
    if coded and not aligned:  # With codes, all segments start at multiples of 32.
        for i, offset in enumerate(migration.offsets):
            if len(lists[i][1]) <= GROUP and len(lists[i][2]) <= GROUP:
                put_later(migration, i, offset + GROUP)
    changed, options = {}, {}
    if coded:
        codes = random_codes(length, device)
        generator = torch.Generator().manual_seed(4)
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            scale = torch.randn(groups_of(length), generator=generator).abs() * 2.0**-16
            scale[::7], scale[3::11] = 0.0, float("nan")
            options[name] = scale.to(device)
        changed |= {name: codes[name] for name in ("exp_avg", "exp_avg_sq")}
    if low:
        pattern = torch.randint(-(2**15), 2**15, (length,), generator=torch.Generator().manual_seed(5))
        changed["master"] = pattern.to(torch.int16).to(device)
    migration = dataclasses.replace(migration, **changed)
    expected, scales = migration.copy(), {name: scale.clone() for name, scale in options.items()}
    inputs, versions = migration.inputs(), [scale._version for scale in options.values()]
    kept = expected.run("reference", **scales)
    assert torch.equal(migration.run(backend.name, **options), kept)
    assert_same_bits(migration.state(), expected.state())
    assert_same_bits({n: bits(x) for n, x in options.items()}, {n: bits(x) for n, x in scales.items()})
    assert_same_bits(migration.inputs(), inputs)
    assert all(scale._version > version for scale, version in zip(options.values(), versions))


def put_later(migration, i, offset):
    """Put the list of one matrix at another place of the arena."""
    old, count = migration.offsets[i], migration.counts[i]
    migration.indices[offset : offset + count] = migration.indices[old : old + count].clone()
    migration.offsets[i] = offset
