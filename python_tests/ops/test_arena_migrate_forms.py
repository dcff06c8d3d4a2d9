"""Migration of 8-bit moments and of low halves of masters."""

from __future__ import annotations

import pytest
import torch
from helpers import backends
from helpers.backends import REFERENCE, cpu_level
from helpers.bits import BF16, FP16, FP32, assert_same_bits, bits, random_indices
from helpers.migrations import Migration, make_migration
from helpers.state_forms import GAP_CODE

from lift_kernels.ops import cpu_levels
from lift_kernels.ops.state_formats import GROUP, decode, groups_of

BACKENDS = backends.STATE_FORMS
NATIVE = backends.BackendDevice("native-cpu", "cpu")


def lists_of(numel: int, old: int, new: int, seed: int, stay: float = 0.7) -> tuple[int, list[int], list[int]]:
    """A matrix with two lists, which share about ``stay`` of the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    before = random_indices(numel, old, generator)
    others = torch.ones(numel, dtype=torch.bool)
    others[before.long()] = False
    kept = min(round(stay * min(old, new)), old)
    kept = max(kept, new - int(others.sum()))
    chosen = before[torch.randperm(old, generator=generator)[:kept]]
    entering = others.nonzero().flatten()[torch.randperm(int(others.sum()), generator=generator)[: new - kept]]
    return numel, before.tolist(), torch.cat([chosen.long(), entering]).sort().values.tolist()


SIZES = {
    "same length": [lists_of(500, 100, 100, 0), lists_of(300, 64, 64, 1)],
    "growing": [lists_of(900, 33, 400, 2), lists_of(90, 1, 32, 3), lists_of(70, 0, 40, 4)],
    "shrinking": [lists_of(900, 400, 33, 5), lists_of(90, 32, 1, 6), lists_of(70, 40, 0, 7)],
    "nothing stays": [lists_of(900, 200, 150, 8, stay=0)],
    "all stays": [lists_of(900, 200, 200, 9, stay=1)],
    "several chunks": [lists_of(90_000, 40_000, 33_001, 10), lists_of(90, 40, 31, 11)],
}


def make_forms(backend, lists, coded: bool = True, split: bool = False, **kinds) -> tuple[Migration, dict]:
    """A migration with codes and low halves, and the scales as options of the call."""
    migration = make_migration(backend, lists, **kinds)
    generator, length = torch.Generator().manual_seed(3), len(migration.indices)
    scales = {}
    if coded:
        migration.exp_avg = torch.randint(-127, 128, (length,), generator=generator).to(torch.int8)
        migration.exp_avg_sq = torch.randint(0, 256, (length,), generator=generator).to(torch.uint8)
        outside = torch.ones(length, dtype=torch.bool)
        for at, (_, old, new) in zip(migration.offsets, lists):
            outside[at : at + max(len(old), len(new))] = False
        for codes in (migration.exp_avg, migration.exp_avg_sq):
            codes[outside] = GAP_CODE
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            scales[name] = torch.exp(8 * torch.rand(groups_of(length), generator=generator) - 20)
    if split:
        migration.master = torch.randint(-(2**15), 2**15, (length,), generator=generator).short()
    return migration, scales


def state(migration: Migration, scales: dict) -> dict:
    return migration.state() | {name: bits(scale).clone() for name, scale in scales.items()}


def moments(migration: Migration, scales: dict, i: int, count: int) -> list[torch.Tensor]:
    """Both moments of the first ``count`` entries of matrix i, second ones as their roots."""
    at = migration.offsets[i]
    groups = slice(at // GROUP, at // GROUP + groups_of(count))
    codes = migration.exp_avg[at : at + count], migration.exp_avg_sq[at : at + count]
    return [decode(code, scale[groups]) for code, scale in zip(codes, scales.values())]


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@pytest.mark.parametrize("lists", SIZES.values(), ids=SIZES)
def test_arena_migrate_forms(backend, lists, split):
    """All bits are the reference's. What stays keeps its value, and what enters has none."""
    options = {"split": split, "weight": BF16 if split else FP32}
    migration, scales = make_forms(backend, lists, **options)
    before, old_scales = make_forms(backend, lists, **options)
    expected, expected_scales = make_forms(backend, lists, **options)
    kept = migration.run(backend.name, **scales)
    wanted = expected.run(REFERENCE.name, **expected_scales)
    assert_same_bits(state(migration, scales), state(expected, expected_scales))
    assert torch.equal(kept, wanted)
    for i, (_, old, new) in enumerate(lists):
        at = migration.offsets[i]
        place = {index: j for j, index in enumerate(old)}
        stays = torch.tensor([index in place for index in new], dtype=torch.bool)
        came = torch.tensor([place[index] for index in new if index in place], dtype=torch.long)
        assert kept[i] == stays.sum()
        assert migration.indices[at : at + len(new)].tolist() == new
        pairs = zip(moments(migration, scales, i, len(new)), moments(before, old_scales, i, len(old)), (127, 255))
        for after, was, top in pairs:
            assert (after[~stays] == 0).all()
            largest = torch.nn.functional.pad(after.abs(), (0, -len(new) % GROUP)).view(-1, GROUP).amax(1)
            largest = largest.repeat_interleave(GROUP)[: len(new)][stays]
            share = (was[came].abs() / largest).clamp(max=1).nan_to_num(0.0) ** (1 / 3) * top
            admitted = largest / top**3 * ((share + 0.51) ** 3 - (share - 0.51).clamp(min=0) ** 3 + 1)
            assert ((after[stays] - was[came]).abs() <= admitted).all()
        if split:
            master = migration.master[at : at + len(new)]
            assert torch.equal(master[stays], before.master[at : at + len(old)][came])
            assert (master[~stays] == 0).all()


@pytest.mark.parametrize("weight, moment", [(BF16, FP32), (BF16, BF16)])
def test_arena_migrate_forms_of_masters_alone(backend, weight, moment):
    """Segments may start anywhere then."""
    lists = SIZES["growing"] + SIZES["shrinking"]
    options = {"coded": False, "split": True, "weight": weight, "moment": moment, "aligned": False}
    (migration, _), (expected, _) = (make_forms(backend, lists, **options) for _ in range(2))
    for each in (migration, expected):  # torch quiets a signaling NaN that it copies alone
        each.exp_avg.nan_to_num_()
        each.exp_avg_sq.nan_to_num_()
    kept, wanted = migration.run(backend.name), expected.run(REFERENCE.name)
    assert_same_bits(migration.state(), expected.state())
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("weight, master", [(FP32, False), (BF16, True), (FP16, True)])
def test_arena_migrate_forms_of_moments_with_fp32_masters(backend, weight, master):
    lists = SIZES["same length"] + SIZES["shrinking"]
    options = {"weight": weight, "master": master, "births": master}
    (migration, scales), (expected, expected_scales) = (make_forms(backend, lists, **options) for _ in range(2))
    migration.run(backend.name, **scales)
    expected.run(REFERENCE.name, **expected_scales)
    assert_same_bits(state(migration, scales), state(expected, expected_scales))


def test_arena_migrate_forms_twice_changes_nothing_more(backend):
    """Codes of the same list come back."""
    lists = SIZES["same length"]
    migration, scales = make_forms(backend, lists, split=True, weight=BF16)
    migration.run(backend.name, **scales)
    migration.counts = [len(new) for _, _, new in lists]
    codes = state(migration, scales)
    kept = migration.run(backend.name, **scales)
    after = state(migration, scales)
    for name in ("indices", "exp_avg", "exp_avg_sq", "master", "births"):
        assert torch.equal(after[name], codes[name]), name
    for name in scales:
        assert (after[name] - codes[name]).abs().max() <= 2, "ulp"
    assert kept.tolist() == migration.counts


def test_arena_migrate_forms_groups_that_are_not_finite(backend):
    lists = [(200, list(range(64)), list(range(32, 96)))]
    migration, scales = make_forms(backend, lists)
    for scale in scales.values():
        scale[migration.offsets[0] // GROUP + 1] = float("nan")
    expected, expected_scales = migration.copy(), {name: scale.clone() for name, scale in scales.items()}
    migration.run(backend.name, **scales)
    expected.run(REFERENCE.name, **expected_scales)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(migration, name), getattr(expected, name))
    m, root = moments(migration, scales, 0, 64)
    assert m[:32].isnan().all() and root[:32].isnan().all() and (m[32:] == 0).all() and (root[32:] == 0).all()


@pytest.mark.native
@pytest.mark.parametrize("lists", SIZES.values(), ids=SIZES)
def test_migrated_forms_have_the_same_bits_at_every_level(lists):
    states = []
    for level in cpu_levels.levels():
        migration, scales = make_forms(NATIVE, lists, split=True, weight=BF16)
        with cpu_level(level):
            migration.run(NATIVE.name, **scales)
        states.append(state(migration, scales))
    for other in states[1:]:
        assert_same_bits(other, states[0])
