"""bench/memory_plans.py: published sizes, and rows that are those of the present code."""

from __future__ import annotations

import csv

import pytest

from bench import ROOT
from bench.memory_plans import JOBS, rows_of

SAVED = ROOT / "bench" / "results" / "computed" / "memory_plans.csv"
PARAMETERS = {"Llama-3-8B": 8_030_261_248, "Llama-3-70B": 70_553_706_496}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.model)
def test_the_saved_rows_are_those_of_the_present_code(job):
    """Versions of torch and transformers may differ in temporary tensors: within 2 %."""
    saved = [row for row in csv.DictReader(SAVED.open()) if row["model"] == job.model]
    new = list(rows_of(job))
    assert [row["form"] for row in saved] == [row["form"] for row in new]
    assert float(new[0]["weights_gib"]) == pytest.approx(2 * PARAMETERS[job.model] / 2**30, abs=0.01)
    for old, row in zip(saved, new, strict=True):
        assert (old["fits"], old["today"]) == (row["fits"], row["today"]), row["form"]
        for column, value in row.items():
            if column.endswith("_gib") and column != "memory_gib":
                assert float(old[column]) == pytest.approx(float(value), rel=0.02, abs=0.02), (row["form"], column)


def test_only_a_sharded_form_holds_the_large_model_and_none_runs_today():
    rows = [row for row in csv.DictReader(SAVED.open()) if row["model"] == "Llama-3-70B"]
    fitting = [row["form"] for row in rows if row["fits"] != "no"]
    assert "LIFT, dense gradients, sharded" in fitting
    assert all(name.endswith("sharded") for name in fitting)
    assert all(row["today"] == "no" for row in rows if row["form"].endswith("sharded"))
