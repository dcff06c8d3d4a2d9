"""The part of the GPU suite that tries other settings: each is named, in place and put back."""

from __future__ import annotations

import csv
import ctypes
import importlib
import json
import math
from types import SimpleNamespace

import pytest

from bench import gpu_suite
from bench.gpu_parts import experiments
from bench.gpu_parts.runner import Run

TRITON = "lift_kernels.ops.triton"


@pytest.mark.slow
@pytest.mark.native
def test_a_dry_run_names_every_setting(tmp_path):
    assert gpu_suite.main(["--dry-run", "--part", "experiments", "--only", "experiments", "--out", str(tmp_path)]) == 0
    with (tmp_path / "gpu_experiments.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] != gpu_suite.WHOLE]
    assert {row["status"] for row in rows} == {"ok"} and {row["correct"] for row in rows} == {"yes"}
    names = [row["variant"] for row in rows]
    assert [name for name in names if name.startswith("step")] == [
        "step, as it is",
        *(f"step, fetches of {size} bytes" for size in (32, 64, 128)),
        *(f"step, {warps} warps" for warps in (4, 8)),
    ]
    depths = [f"selection, depth {depth}, {stages} stages" for depth in (16, 32) for stages in (2, 3, 4)]
    assert [name for name in names if name.startswith("selection")] == ["selection, as it is", *depths]
    assert sum(name.startswith("fused product") for name in names) == 1 + len(experiments.TILES)
    for row in rows:
        first = row["variant"].endswith("as it is")
        assert bool(row["baseline"]) == (not first)
        assert row["prediction"] or first


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """All settings by name, from a run that times nothing."""
    found = {}

    def compare(run, given, make, **labels):
        found.update({name: setting for name, _, setting in given})

    monkeypatch.setattr(experiments, "compare", compare)
    (tmp_path / "rows").touch()
    experiments.work(Run("experiments", "cpu", tmp_path / "rows", math.inf, 1))
    return found


def options_of(settings_of, module, function, **case):
    """Options of a launch on an H100 before and under a setting."""
    module = importlib.import_module(f"{TRITON}.{module}")
    card = importlib.import_module(f"{TRITON}.targets").ASSUMED
    before = dict(getattr(module, function)(card, **case))
    with settings_of():
        under = getattr(module, function)(card, **case)
    assert getattr(module, function)(card, **case) == before
    return before, under


def test_settings_of_the_selection_are_in_place_and_put_back(settings):
    setting = settings["selection, depth 16, 4 stages"]
    before, under = options_of(setting, "lowrank_topk", "lowrank_options", wide=True)
    assert under == before | {"DEPTH": 16, "num_stages": 4} != before


def test_settings_of_the_fused_product_are_in_place_and_put_back(settings):
    setting = settings["fused product, 128 x 64 x 64, 8 warps, 3 stages, bands of 16"]
    before, under = options_of(setting, "packed_weight_grad", "weight_grad_options", fp32=False, tf32=False)
    changes = {"ROWS": 128, "COLUMNS": 64, "TOKENS": 64, "BAND": 16, "num_warps": 8, "num_stages": 3}
    assert under == before | changes != before


def test_a_setting_of_warps_replaces_those_of_the_launch(settings, monkeypatch):
    module, launches = importlib.import_module(f"{TRITON}.sparse_adamw"), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((grid, arguments, options))

    kernel = Kernel()
    monkeypatch.setattr(module, "_sparse_adamw_kernel", kernel)
    with settings["step, 8 warps"]():
        module._sparse_adamw_kernel[(3,)](1, 2, BLOCK=64, num_warps=4)
    assert launches == [((3,), (1, 2), {"BLOCK": 64, "num_warps": 8})]
    assert module._sparse_adamw_kernel is kernel


def test_a_fetch_granularity_is_set_read_and_put_back(settings, monkeypatch):
    """On a runtime that does not take more than 64."""
    limits, calls = {5: 64}, []

    def get(pointer, limit):
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_size_t))[0] = limits[limit]

    def put(limit, size):
        calls.append(size.value)
        limits[limit] = min(64, size.value)

    monkeypatch.setattr(
        experiments, "cuda_runtime", lambda: SimpleNamespace(cudaDeviceGetLimit=get, cudaDeviceSetLimit=put)
    )
    for size, taken in ((32, 32), (128, 64)):
        with settings[f"step, fetches of {size} bytes"]() as columns:
            assert columns == {"in_effect": taken}
        assert limits == {5: 64}
    assert calls == [32, 64, 128, 64]


def test_a_setting_that_fails_stops_no_other(tmp_path):
    (tmp_path / "rows").touch()
    run = Run("experiments", "cuda", tmp_path / "rows", math.inf, 1)

    def fails():
        raise RuntimeError("out of resource: shared memory")

    run.time = lambda name, **given: run.add(name, **given) and 1.0
    tried = [("as it is", "", experiments.nullcontext), ("bad", "slower", fails), ("good", "", experiments.nullcontext)]
    experiments.compare(run, tried, dict, op="step")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["variant"], row["status"]) for row in rows] == [
        ("as it is", "ok"),
        ("bad", "failed: out of resource: shared memory"),
        ("good", "ok"),
    ]
    assert rows[2]["against"] == ["as it is", 1.0]
