"""bench/bench_masks.py: scikit-learn's way to a mask, with a stand-in where it is not installed, and how its absence is told."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def masks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    names = ("bench_masks", "bench_util")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench_masks

    yield bench_masks
    for name in names:
        sys.modules.pop(name, None)


def test_a_randomized_svd_of_full_width_gives_the_exact_mask(masks, monkeypatch):
    def randomized_svd(a, rank, *, n_oversamples, n_iter, random_state):
        assert (rank, n_oversamples, n_iter) == (16, 16, 2)
        u, s, vh = np.linalg.svd(a, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]

    extmath = types.ModuleType("sklearn.utils.extmath")
    extmath.randomized_svd = randomized_svd
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.utils", types.ModuleType("sklearn.utils"))
    monkeypatch.setitem(sys.modules, "sklearn.utils.extmath", extmath)
    weight = torch.randn(80, 48, generator=torch.Generator().manual_seed(0))
    truth = masks.Truth.of(weight, 16)
    overlap, captured = truth.judge(masks.sklearn_svd(weight, 16).indices)
    assert overlap >= 0.99 and captured == pytest.approx(1.0, abs=1e-4)
    assert masks.sklearn_problem() == ""


def test_its_absence_is_told(masks, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.utils", raising=False)
    monkeypatch.delitem(sys.modules, "sklearn.utils.extmath", raising=False)
    assert masks.sklearn_problem().endswith("pip install scikit-learn")
