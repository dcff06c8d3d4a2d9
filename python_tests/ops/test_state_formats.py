"""The formats of stored state: 8-bit codes of moments, and low halves of masters."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, bits

from lift_kernels.ops.state_formats import (
    FIRST_TOP,
    GROUP,
    ROOT_TOP,
    cube_root,
    decode,
    dither,
    encode_first,
    encode_root,
    groups_of,
    join_master,
    split_master,
)

ROOT_ERROR = 2.0**-14  # of `cube_root`, relative
UPS = (2.0**-10, 0.5, 1 - 2.0**-10)


def encode_of(top):
    return encode_first if top == FIRST_TOP else encode_root


def grid(top: int) -> torch.Tensor:
    """Every code of a moment, in whole groups that all have the largest one."""
    codes = torch.arange(-top if top == FIRST_TOP else 0, top + 1)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % (GROUP - 1))).view(-1, GROUP - 1)
    return torch.cat([torch.full((len(codes), 1), top), codes], dim=1).flatten()


def scales_of_all_sizes(top: int) -> torch.Tensor:
    """Every power of two that a scale can have, times mantissas."""
    exponents = torch.arange(-100 - 20, 127 - (20 if top == FIRST_TOP else 24), dtype=torch.float64)
    mantissas = torch.cat([1 + torch.arange(24) / 24, torch.tensor([1 + 2.0**-23, 2 - 2.0**-23])]).double()
    return (2.0 ** exponents[:, None] * mantissas).flatten().float()


def magnitudes(count: int, top: int, seed: int = 0) -> torch.Tensor:
    """Groups of numbers up to the largest cube, which each has; spread over codes, not values."""
    root = torch.rand(count, GROUP, generator=torch.Generator().manual_seed(seed)) * top
    root[:, 7] = top
    return root.double().pow(3).float().flatten()


@pytest.mark.parametrize("top", [FIRST_TOP, ROOT_TOP])
def test_every_code_comes_back_at_every_scale(top):
    """Roots also where they are rounded up or down as far as nearly all of the dither goes."""
    codes, scales = grid(top), scales_of_all_sizes(top)
    groups = len(codes) // GROUP
    many = codes.repeat(len(scales))
    values = decode(many, scales.repeat_interleave(groups))
    for up in UPS if top == ROOT_TOP else (None,):
        again, new = encode_of(top)(values) if up is None else encode_root(values, up)
        assert torch.equal(again.int(), many.int())
        relative = new.view(len(scales), -1).double() / scales[:, None].double() - 1
        assert relative.abs().max() <= 2.0**-22


def test_a_first_moment_gets_the_nearest_code():
    """In the order of codes: the errors are those of the cube root and at most half a code."""
    values = magnitudes(20_000, FIRST_TOP)
    values[1::2] *= -1
    codes, scales = encode_first(values)
    exact = values.double().abs().pow(1 / 3)
    assert (codes.double().abs() - exact).abs().max() <= 0.5 + FIRST_TOP * ROOT_ERROR
    assert ((codes < 0) == ((values < 0) & (exact > 0.51))).double().mean() > 0.999
    error = (decode(codes, scales).double() - values.double()).abs()
    reach = codes.double().abs() + 0.5 + FIRST_TOP * ROOT_ERROR
    assert (error <= reach.pow(3) - codes.double().abs().pow(3)).all()


@pytest.mark.parametrize("up", [0.0, *UPS, 1 - 2.0**-24])
def test_a_root_gets_one_of_two_codes(up):
    """It gets the upper one where its share of the way is 1 - up or more."""
    values = magnitudes(20_000, ROOT_TOP, seed=1)
    codes, scales = encode_root(values, up)
    below = (values.double() * (1 + 2.0**-20)).pow(1 / 3).floor().clamp(max=ROOT_TOP)
    share = (values.double() - below.pow(3)) / ((below + 1).pow(3) - below.pow(3))
    clear = ((share + up - 1).abs() > 1e-3) & (share > 0.02) & (share < 0.98) & (below > 0)
    assert clear.double().mean() > 0.9
    assert torch.equal(codes[clear].double(), (below + (share + up >= 1).double())[clear])
    assert ((codes.double() - below).abs() <= 1).all()
    distance = (below + 1).pow(3) - (below - 1).clamp(min=0).pow(3)
    assert ((decode(codes, scales).double() - values.double()).abs() <= distance).all()


@pytest.mark.parametrize("top", [FIRST_TOP, ROOT_TOP])
def test_larger_entries_have_no_smaller_codes(top):
    values = magnitudes(5_000, top, seed=2).view(-1, GROUP).sort(dim=1).values
    for options in ({},) if top == FIRST_TOP else ({"up": up} for up in UPS):
        codes = encode_of(top)(values.flatten(), **options)[0].int().view(-1, GROUP)
        assert (codes.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("up", [2.0**-16, 0.5, 1 - 2.0**-24])
def test_the_largest_entry_keeps_its_value(up):
    """Within 2 ulp, whatever its size.

    It is an ulp below its code where its scale was rounded. So it may get the code below in a step
    whose dither is nearer to 0 than this, which is one of 2^16.
    """
    generator = torch.Generator().manual_seed(3)
    largest = (2.0 ** (torch.rand(20_000, generator=generator) * 225 - 99)).float()
    values = torch.rand(20_000, GROUP, generator=generator) * largest[:, None]
    values[:, 11] = largest
    first, root = encode_first(-values.flatten()), encode_root(values.flatten(), up)
    for (codes, scales), top in ((first, -FIRST_TOP), (root, ROOT_TOP)):
        assert (codes.view(-1, GROUP)[:, 11].int() == top).all()
        found = decode(codes, scales).view(-1, GROUP)[:, 11].abs()
        assert (bits(found) - bits(largest)).abs().max() <= 2


def test_a_root_above_zero_never_gets_code_zero():
    values = torch.zeros(4 * GROUP)
    values[::GROUP] = 3.0
    values[1::GROUP] = torch.tensor([1e-12, 2.0**-126, 2.0**-149, 1e-30])
    for up in (0.0, 0.5, 1 - 2.0**-24):
        codes, scales = encode_root(values, up)
        assert codes[1::GROUP].tolist() == [1] * 4 and (decode(codes, scales)[1::GROUP] > 0).all()
        assert (codes.view(-1, GROUP)[:, 2:] == 0).all()
    first, _ = encode_first(values)
    assert (first[1::GROUP] == 0).all(), "first moments do become zero"


@pytest.mark.parametrize("encode", [encode_first, encode_root])
@pytest.mark.parametrize("entries", [1, 2, 31, 33, 63])
def test_a_tail_is_a_group_whose_rest_is_zero(encode, entries):
    values = torch.rand(entries, generator=torch.Generator().manual_seed(entries))
    codes, scales = encode(values)
    padded = torch.nn.functional.pad(values, (0, -entries % GROUP))
    whole, whole_scales = encode(padded)
    assert codes.shape == (entries,) and scales.shape == (groups_of(entries),)
    assert torch.equal(codes, whole[:entries]) and torch.equal(scales, whole_scales)
    assert torch.equal(decode(codes, scales), decode(whole, whole_scales)[:entries])


@pytest.mark.parametrize("encode", [encode_first, encode_root])
def test_groups_without_a_number_worth_storing(encode):
    """A group whose largest entry is below 2^-100 is zero. One with a NaN in it is all NaN."""
    inf, nan = float("inf"), float("nan")
    values = torch.ones(7, GROUP)
    values[0] = 0.0
    values[1] = 2.0**-101
    values[2] = 2.0**-149
    values[3] = 2.0**-100
    values[4, 5], values[5, 5], values[6, 5] = inf, nan, 3.4e38
    codes, scales = encode(values.flatten())
    found = decode(codes, scales).view(7, GROUP)
    assert (found[:3] == 0).all() and (scales[:3] == 0).all()
    assert torch.allclose(found[3], values[3], rtol=2.0**-22, atol=0)
    assert found[4:6].isnan().all() and scales[4:6].isnan().all()
    assert found[6].isfinite().all() and found[6, 5] == pytest.approx(3.4e38, rel=1e-6)
    assert (codes.view(7, GROUP)[:3] == (encode is encode_root) * (values[:3] > 0)).all()


def test_empty_segments_have_no_groups():
    for encode in (encode_first, encode_root):
        codes, scales = encode(torch.zeros(0))
        assert codes.shape == scales.shape == (0,)


def test_cube_roots():
    """Every power of two from 2^-60 to 2^24 with many mantissas."""
    mantissas = 1 + torch.arange(2**14) / 2**14
    x = (2.0 ** torch.arange(-60, 24)[:, None] * mantissas).flatten()
    error = cube_root(x).double() / x.double().pow(1 / 3) - 1
    assert error.abs().max() < ROOT_ERROR


def test_the_dither_is_spread_evenly():
    """Over the entries of a step, and over the steps of an entry much more than random numbers."""
    for step in (1, 7, 2**20 + 1):
        numbers = dither(torch.arange(2**16), step)
        assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
        counts = torch.histc(numbers, 64, 0, 1)
        assert (counts - 1024).abs().max() < 16
    for position in (0, 5, 2**31 - 1):
        steps = torch.cat([dither(torch.tensor([position]), step) for step in range(1, 1001)]).sort().values
        ranks = torch.arange(1000) / 1000
        discrepancy = torch.maximum((steps - ranks).abs(), (steps - ranks - 1 / 1000).abs()).max()
        assert discrepancy < 0.01, "random numbers have 0.03"
    assert dither(torch.tensor([12345]), 678).item() == ((12345 * 0xC13FA9A9 + 678 * 0x91E10DA5) % 2**32 >> 8) / 2**24


def masters_of(uppers: torch.Tensor, lows: torch.Tensor) -> torch.Tensor:
    """Fp32 numbers by their halves; each upper one with each lower one."""
    pattern = (uppers.long()[:, None] << 16 | lows.long()).flatten()
    return torch.where(pattern >= 2**31, pattern - 2**32, pattern).int().view(torch.float32)


def is_tie(master: torch.Tensor) -> torch.Tensor:
    """Whether a master is in the middle of two bf16 numbers and rounds up, to the even one."""
    return (bits(master) & 0x1FFFF) == 0x18000


def test_masters_come_back_from_their_halves():
    """Every low half with zero, subnormal and normal upper halves of both signs, up to overflow."""
    some = [0, 1, 2, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F]
    uppers = torch.tensor(some + list(range(0, 0x7F80, 211)))
    for sign in (0, 0x8000):
        master = masters_of(uppers | sign, torch.arange(2**16))
        weight = master.to(BF16)
        found = join_master(weight, split_master(master))
        changed = bits(found) != bits(master)
        assert torch.equal(changed, is_tie(master))
        assert torch.equal(bits(found)[changed], bits(master)[changed] + 1), "by one ulp"
        assert torch.equal(bits(found.to(BF16)), bits(weight)), "the weight stays"
        assert torch.equal(bits(join_master(weight, split_master(found))), bits(found)), "no second change"
    assert weight.isinf().any() and not master.isinf().any()


def test_infinite_and_nan_masters():
    infinite = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(join_master(infinite.to(BF16), split_master(infinite)), infinite)
    for sign in (0, 0x8000):
        master = masters_of(torch.tensor([0x7F80, 0x7F81, 0x7FBF, 0x7FC0, 0x7FFF]) | sign, torch.arange(1, 2**16))
        assert master.isnan().all() and join_master(master.to(BF16), split_master(master)).isnan().all()


def test_one_positive_master_in_131072_changes():
    """Those that are a tie below an even weight: 16,320 of all that are finite."""
    master = masters_of(torch.arange(0x7F80), torch.tensor([0x8000]))
    changed = bits(join_master(master.to(BF16), split_master(master))) != bits(master)
    assert changed.sum() == 16_320
    others = masters_of(torch.arange(0x7F80), torch.tensor([0, 1, 0x7FFF, 0x8001, 0xFFFF]))
    assert torch.equal(join_master(others.to(BF16), split_master(others)), others)
