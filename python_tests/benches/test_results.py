"""`bench.common.results` and `bench.common.tuned`: where a row comes from, and a second run."""

from __future__ import annotations

import csv
from argparse import ArgumentParser

import pytest

from bench import bench_sparse_adamw
from bench.common import results, tuned
from lift_kernels.ops import dispatch


@pytest.fixture
def plain(monkeypatch):
    """An environment without any of the variables that are recorded."""
    for name in list(results.os.environ):
        if name.startswith(results.SETTINGS):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_row_names_level_environment_and_settings(plain):
    plain.setattr(dispatch, "cpu_level", lambda: "x86-64-v3", raising=False)
    found = results.environment()
    assert (found["level"], found["environment"], found["settings"]) == ("x86-64-v3", "default", "")
    plain.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    plain.setenv("LIFT_CPU_LEVEL", "x86-64-v3")
    plain.setenv("OMP_WAIT_POLICY", "passive")
    found = results.environment()
    assert found["environment"] == "default"  # only one of the settings
    assert found["settings"] == "LIFT_CPU_LEVEL=x86-64-v3 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_WAIT_POLICY=passive"
    for name, value in results.TUNED.items():
        plain.setenv(name, value)
    assert results.environment()["environment"] == "tuned"


def test_each_level_has_a_folder(plain, tmp_path):
    names = {"cpu": "Intel(R) Xeon(R) Processor, 2 cores", "cuda": "Card X"}
    plain.setattr(results, "device_name", names.get)
    for level, name in (
        ("x86-64-v3", "intel-xeon-2-cores-x86-64-v3"),
        ("x86-64-v4", "intel-xeon-2-cores-x86-64-v4"),
        ("", "intel-xeon-2-cores"),
    ):
        plain.setattr(dispatch, "cpu_level", lambda level=level: level, raising=False)
        assert results.results_folder(root=tmp_path) == tmp_path / name and (tmp_path / name).is_dir()
    plain.setattr(dispatch, "cpu_level", lambda: "x86-64-v3", raising=False)
    assert results.results_folder("cuda", tmp_path) == tmp_path / "card-x"
    assert results.environment()["level"] == "x86-64-v3"


BENCH = """
import argparse, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--runs")
parser.add_argument("--out", type=pathlib.Path)
given = parser.parse_args()
if given.runs == "3":
    policy, pages = os.environ["OMP_WAIT_POLICY"], os.environ["THP_MEM_ALLOC_ENABLE"]
    (given.out / "rows.csv").write_text(f"runs,policy,pages\\n3,{policy},{pages}\\n")
raise SystemExit(1)
"""


def test_a_second_process_has_the_settings(plain, tmp_path, monkeypatch):
    """It gets the arguments, its last --out counts, and its exit status is no matter."""
    (tmp_path / "some_bench.py").write_text(BENCH)
    monkeypatch.setattr(tuned, "ROOT", tmp_path)
    argv = ["--runs", "3", "--tuned", "--out", str(tmp_path)]
    assert tuned.rows_again("some_bench", "rows.csv", argv) == [{"runs": "3", "policy": "passive", "pages": "1"}]
    assert not (tmp_path / "rows.csv").exists()
    with pytest.raises(SystemExit, match="wrote no rows; its exit status is 1"):
        tuned.rows_again("some_bench", "rows.csv", ["--runs", "4"])
    for name, value in results.TUNED.items():
        plain.setenv(name, value)
    with pytest.raises(SystemExit, match="this process has these settings already"):
        tuned.rows_again("some_bench", "rows.csv", argv)


def test_the_option():
    parser = ArgumentParser()
    tuned.add_option(parser)
    assert parser.parse_args([]).tuned is False and parser.parse_args(["--tuned"]).tuned is True


@pytest.mark.native
def test_rows_of_both_environments(plain, tmp_path, monkeypatch):
    """Those of the user's come first; the others are added as they are."""
    again = [{"variant": "AdamW fused", "median_ms": "1", "status": "ok", "environment": "tuned"}]
    asked = []
    monkeypatch.setattr(tuned, "rows_again", lambda *given: asked.append(given) or again)
    argv = ["--dry-run", "--tuned", "--dtypes", "fp32", "--out", str(tmp_path)]
    assert bench_sparse_adamw.main(argv) == 0
    assert asked == [("bench.bench_sparse_adamw", "sparse_adamw.csv", argv)]
    with (tmp_path / "sparse_adamw.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["environment"] for row in rows] == ["default"] * (len(rows) - 1) + ["tuned"] and len(rows) > 10
    assert bench_sparse_adamw.plots.one_environment(rows) == rows[:-1]
