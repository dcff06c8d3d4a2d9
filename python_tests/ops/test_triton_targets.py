"""Which products a card can do, and the launch options that follow from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget

from lift_kernels.ops import dispatch
from lift_kernels.ops.triton import targets

CARDS = {arch: GPUTarget("cuda", arch, 32) for arch in (70, 75, 80, 86, 89, 90, 100, 103, 110, 120, 121)}
MI300, MI200 = GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx90a", 64)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("arch", CARDS)
def test_a_lowrank_product_has_fp32_error_on_every_card(monkeypatch, arch, newer):
    """TF32 three times where it exists, else fp32; the same in all passes."""
    monkeypatch.setattr(targets, "TRITON_3_7", newer)
    make = targets.lowrank_options.__wrapped__
    for wide in (True, False):
        scan, histogram = (make(CARDS[arch], wide=wide, histogram=value) for value in (False, True))
        assert scan["PRECISION"] == ("tf32x3" if arch >= 80 else "ieee")
        assert scan["DEPTH"] == (32 if wide and 90 <= arch < 120 else 16)
        assert scan.pop("maxnreg", None) == (128 if 90 <= arch < (140 if newer else 120) else None)
        assert histogram.pop("maxnreg", None) == (128 if 90 <= arch < 120 else None)
        assert scan == histogram


@pytest.mark.parametrize("target", [CARDS[75], CARDS[90], MI300], ids=lambda target: str(target.arch))
def test_options_of_a_step(monkeypatch, target):
    """Registers are limited for 8-bit moments in aligned segments. Triton refuses that for AMD."""
    monkeypatch.setattr(targets, "target_of", lambda device: target)
    for late, warps in ((False, 4), (True, 8)):
        for coded, aligned in ((False, True), (True, False), (True, True)):
            options = targets.step_options(torch.device("cuda"), late=late, coded=coded, aligned=aligned)
            limit = targets.CODED_REGISTERS[warps] if coded and aligned and target.backend == "cuda" else None
            assert options.pop("maxnreg", None) == limit
            assert options == {"num_warps": warps, "enable_fp_fusion": False}


@pytest.mark.parametrize("target", [MI300, MI200], ids=lambda target: target.arch)
def test_options_for_amd(target):
    """Triton refuses there ``maxnreg``, the precision tf32x3 and, but on gfx942, tf32."""
    options = targets.lowrank_options(target, wide=True)
    assert options["PRECISION"] == "ieee" and options["DEPTH"] == 16 and "maxnreg" not in options
    fast = targets.weight_grad_options(target, fp32=True, tf32=True)
    assert fast["PRECISION"] == ("tf32" if target is MI300 else "ieee")
    assert not targets.weight_grad_options(target, fp32=False, tf32=False)["WIDEN"] and targets.lacks(target) == ""


@pytest.mark.parametrize("fp32, tf32", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("arch", CARDS)
def test_options_of_the_fused_weight_gradient(monkeypatch, arch, square, fp32, tf32):
    """``square``: the compiler is Triton 3.7 or later."""
    monkeypatch.setattr(targets, "TRITON_3_7", square)
    options = targets.weight_grad_options.__wrapped__(CARDS[arch], fp32=fp32, tf32=tf32)
    old = arch < 80
    assert options["WIDEN"] == (old and not fp32)
    assert options["PRECISION"] == ("tf32" if tf32 and not old else "ieee")
    exact = old or (fp32 and not tf32)
    large = 90 <= arch < 120 and not exact
    tokens, small = 32 if fp32 else 64, (128, 64, 32, 3)
    tile = small if not large else (128, 128, 32, 3 if fp32 else 4) if square else (256, 64, tokens, 3)
    assert tuple(options[name] for name in ("ROWS", "COLUMNS", "TOKENS", "num_stages")) == tile
    assert set(options) == {*("ROWS", "COLUMNS", "TOKENS", "BAND", "PRECISION", "WIDEN", "num_warps", "num_stages")}


@pytest.mark.parametrize("arch", CARDS)
def test_what_a_card_lacks_is_said(arch):
    text = targets.lacks(CARDS[arch])
    assert bool(text) == (arch < 80)
    assert not text or all(word in text for word in ("bf16", "TF32", "lowrank_topk", "slow", "float16"))


@pytest.fixture
def no_cache():
    targets._target.cache_clear()
    yield
    targets._target.cache_clear()


def test_targets_of_devices(monkeypatch, no_cache):
    """By torch's properties of the device that holds the tensors, which need not be current."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert targets.target_of(torch.device("cpu")) == targets.ASSUMED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(7, 5), (12, 0)][index])
    assert targets.target_of(torch.device("cuda", 0)) == CARDS[75]
    assert targets.target_of(torch.device("cuda")) == CARDS[120]


def test_targets_of_amd_devices(monkeypatch, no_cache):
    """torch gives these a capability as well, (9, 4), which is not that of a CUDA device."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", warp_size=64)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    assert targets.target_of(torch.device("cuda", 0)) == MI300


def test_the_interpreter_runs_what_the_largest_cards_run(monkeypatch, no_cache):
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert targets.target_of(torch.device("cpu")) == targets.ASSUMED == CARDS[90]
