"""`bench_masks`: its dry run, the refusal of wrong masks, and scikit-learn's method.

Also the status when scikit-learn is missing.
"""

from __future__ import annotations

import csv
import sys
import types

import numpy as np
import pytest
import torch

from bench import bench_masks
from bench.common import mask_methods
from lift_kernels import ops
from lift_kernels.masks.principal import Mask


def test_a_randomized_svd_of_full_width_gives_the_exact_mask(monkeypatch):
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
    truth = mask_methods.Truth.of(weight, 16)
    of_more = mask_methods.Truth.of(weight, 16, mask_methods.exact_factors([weight], 32)[0])
    assert torch.equal(of_more.indices, truth.indices) and of_more.best == pytest.approx(truth.best)
    overlap, captured = truth.judge(mask_methods.sklearn_svd(weight, 16).indices)
    assert overlap >= 0.99 and captured == pytest.approx(1.0, abs=1e-4)
    assert mask_methods.sklearn_problem() == ""


def test_its_absence_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.utils", raising=False)
    monkeypatch.delitem(sys.modules, "sklearn.utils.extmath", raising=False)
    assert mask_methods.sklearn_problem().endswith("pip install scikit-learn")


def test_the_plain_baselines_make_the_exact_mask():
    """Of tall and of wide matrices, as the SVD gives it."""
    for shape in ((80, 48), (48, 80)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        exact = mask_methods.svd_and_topk(weight, 16).indices
        for make in (mask_methods.gram_and_topk, mask_methods.gram_and_partition):
            assert torch.equal(make(weight, 16).indices, exact)


def test_ratios_are_of_the_same_round(monkeypatch):
    """Medians of paired ratios: 2, 5 and 3 seconds of the baseline over 1, 1 and 3."""
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    seconds = {mask_methods.TOPK: iter([2.0, 5.0, 3.0]), "ours": iter([1.0, 1.0, 3.0])}
    now = [0.0]

    def method(label):
        def make(weights, rank):
            now[0] += next(seconds[label])
            return [mask_methods.gram_and_topk(weight, rank) for weight in weights]

        return make

    monkeypatch.setattr(bench_masks.time, "perf_counter", lambda: now[0])
    methods = {label: method(label) for label in seconds}
    machine = bench_masks.Machine(1e9, 1e9)
    rows = bench_masks.compare("it", 4, [weight], methods, machine, 3, mask_methods.exact_factors([weight], 4))
    assert {row["variant"]: row["ratio"] for row in rows} == {mask_methods.TOPK: 1.0, "ours": 2.0}
    assert all(row["baseline"] == mask_methods.TOPK and row["runs"] == 3 for row in rows)


def dry_run(folder) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """Exit status, and rows by set and variant."""
    status = bench_masks.main(["--dry-run", "--no-svd", "--out", str(folder)])
    with (folder / "masks.csv").open(newline="") as file:
        return status, {(row["set"], row["variant"]): row for row in csv.DictReader(file)}


@pytest.mark.native
def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_masks, "sklearn_problem", lambda: "not installed")
    status, rows = dry_run(tmp_path)
    assert status == 0 and (tmp_path / "masks.png").stat().st_size > 0
    assert rows.pop(("96x128", bench_masks.SKLEARN))["status"] == "not installed"
    assert len(rows) == 16 and all(row["status"] == "ok" and float(row["seconds"]) > 0 for row in rows.values())
    exact = rows["96x128", "Gram + eigh + topk"]
    assert float(exact["ratio"]) == 1.0 and exact["runs"] == "2"
    assert rows["96x128", "svd_lowrank(2r, 2) (published)"]["runs"] == "1"  # a slow one
    for set_, variant in (
        ("96x128", "default, cold"),
        ("96x128, changed by 3 %", "chebyshev, warm"),
        ("24x24", "principal_indices"),
    ):
        row = rows[set_, variant]
        assert float(row["ratio"]) > 0 and row["baseline"] == "Gram + eigh + topk"
    assert float(rows["24x24", "principal_indices"]["overlap_mean"]) == 1.0
    for variant, column in (
        ("torch.topk of |W_r|", "times_topk"),
        ("the product alone", "times_product"),
        ("the product, abs, torch.topk", "times_product_topk"),
    ):
        assert float(rows["96x128", variant][column]) == 1.0
        assert float(rows["96x128", "lowrank_topk, cold"][column]) > 0
    assert float(exact["overlap_mean"]) == float(exact["captured_mean"]) == 1.0
    assert 0.9 < float(rows["96x128", "chebyshev, cold"]["overlap_mean"]) <= 1.0
    assert float(rows["96x128", "svd_lowrank(2r, 2) (published)"]["overlap_mean"]) < 0.9


@pytest.mark.native
def test_wrong_masks_and_a_wrong_selection_are_refused(tmp_path, monkeypatch):
    right = ops.lowrank_topk

    def wrong(left, right_, k, **options):
        indices, threshold = right(left, right_, k, **options)
        return torch.arange(k, dtype=torch.int32).expand_as(indices), threshold

    monkeypatch.setattr(bench_masks, "sklearn_problem", lambda: "not installed")
    monkeypatch.setattr(ops, "lowrank_topk", wrong)
    status, rows = dry_run(tmp_path)
    assert status == 1
    assert rows["24x24", "principal_indices"]["status"].startswith("refused, it is wrong: an overlap of 0.")
    lift = [("96x128", "default, cold"), ("96x128", "chebyshev, cold"), ("96x128, changed by 3 %", "warm")]
    for key in lift:
        assert (
            rows[key]["status"].startswith("refused, it is wrong: a mean overlap of 0.") and rows[key]["seconds"] == ""
        )
    for label in ("lowrank_topk, cold", "lowrank_topk, warm bracket"):
        row = rows["96x128", label]
        assert row["status"].startswith("refused, it is wrong: it shares only 0.") and row["seconds"] == ""
    others = [row for (_, label), row in rows.items() if "topk of" in label or "published" in label or "Gram" in label]
    assert len(others) == 5 and all(row["status"] == "ok" and float(row["seconds"]) > 0 for row in others)


@pytest.mark.parametrize("spoil", [lambda i: i[:-1], lambda i: i.flip(0), lambda i: torch.cat([i[:1], i[:-1]])])
def test_a_list_that_is_no_mask_is_refused(spoil):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    method = {
        "another method": lambda weights, rank: [Mask(spoil(mask_methods.lift_masks(weights, rank, "gram")[0].indices))]
    }
    row = bench_masks.compare(
        "it", 4, [weight], method, bench_masks.Machine(1e9, 1e9), 1, mask_methods.exact_factors([weight], 4)
    )[0]
    assert row["status"].startswith("refused, it is wrong: ") and "seconds" not in row
