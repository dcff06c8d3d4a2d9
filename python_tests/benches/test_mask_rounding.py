"""`bench.mask_rounding`: how a GPU rounds, and what it costs the masks of one layer."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import mask_rounding
from bench.mask_rounding import CAPTURED, LEAST, rounded, row, tf32
from lift_kernels.masks import chebyshev, lowrank


def test_tf32_keeps_ten_bits():
    x = torch.tensor([1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-10 + 2.0**-11, -3.0 - 2.0**-9 - 2.0**-12, 0.0])
    assert tf32(x).tolist() == [1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-10, -3.0 - 2.0**-9, 0.0]


def test_each_way_rounds_what_it_says():
    fine = torch.full((1, 2, 2), 1.0 + 2.0**-8 + 2.0**-14)
    images = {}
    for way in mask_rounding.WAYS:
        with rounded(way):
            dtype = lowrank.factored_dtype(torch.ones(1).bfloat16())
            images[way] = float(chebyshev.image_of(torch.ones(1, 2, 2, dtype=dtype), fine)[0, 0, 0])
            assert chebyshev.image_is_coarse(fine) == (way == "TF32")
    assert images == {
        "fp32": 2.0 + 2.0**-7 + 2.0**-13,
        "TF32": 2.0 + 2.0**-7,
        "bf16, one term": 2.0 + 2.0**-6,  # to nearest
        "bf16, two terms": 2.0 + 2.0**-7 + 2.0**-13,
    }
    assert lowrank.factored_dtype(torch.ones(1).bfloat16()) == torch.float32


def test_a_way_that_is_too_coarse_says_so():
    measured = [(0.990, 0.9999, 15, True), (0.998, 0.9999, 15, True)]
    assert row(64, "bf16, two terms", "cold", measured)["status"] == "too coarse: overlap 0.99400, captured 0.99990"
    assert row(32, "bf16, two terms", "cold", measured)["status"] == "ok"
    assert row(64, "bf16, one term", "cold", measured)["status"] == "ok"
    assert "captured 0.99940" in row(32, "bf16, two terms", "cold", [(0.999, 0.9994, 9, True)])["status"]


@pytest.mark.slow
def test_seven_matrices_of_smollm2(tmp_path, capsys):
    """Two terms hold the bounds. One term does not."""
    target = tmp_path / "rounding.csv"
    assert mask_rounding.main(["--ranks", "32", "--every", "30", "--csv", str(target)]) == 0
    with target.open() as file:
        rows = {(r["products"], r["start"]): r for r in csv.DictReader(file)}
    for start in ("cold", "warm"):
        two, one = (rows[f"bf16, {terms}", start] for terms in ("two terms", "one term"))
        assert float(two["overlap_mean"]) >= LEAST[32] and float(two["captured_min"]) >= CAPTURED
        assert float(one["overlap_mean"]) < float(two["overlap_mean"]) - 0.002
        assert int(two["matrices"]) == int(two["converged"]) == 7
    assert "bf16, two terms" in capsys.readouterr().out
