"""A dry run of `bench_distributed`: its counts, its seconds, and refusals."""

from __future__ import annotations

import copy
import csv

import pytest
import transformers  # noqa: F401  the file is left out where it is not installed

from bench import bench_distributed as bench

pytestmark = pytest.mark.slow

ARGUMENTS = ["--dry-run", "--runs", "2"]
TRAINED = 2 * (4 * 32 * 32 + 3 * 32 * 64)  # entries of the matrices of two layers
CHOSEN = 2 * (4 * round(0.05 * 32 * 32) + 3 * round(0.05 * 32 * 64))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The reports of two ranks, and the rows of the CSV."""
    folder, kept = tmp_path_factory.mktemp("distributed"), []
    with pytest.MonkeyPatch.context() as patch:
        right = bench.reports
        patch.setattr(bench, "reports", lambda *arguments: kept.extend(right(*arguments)) or kept)
        assert bench.main([*ARGUMENTS, "--out", str(folder)]) == 0
    with (folder / "distributed.csv").open(newline="") as file:
        return kept, list(csv.DictReader(file))


def rows_of(table, **texts):
    return [row for row in table if all(row[key] == text for key, text in texts.items())]


@pytest.mark.parametrize("form", bench.FORMS)
def test_bytes_of_a_step(found, form):
    width = {"fp32": 4, "bf16": 2}[form]
    expected = {  # elements and bytes of each; packed mode trains fp32 values
        bench.DENSE: (TRAINED, width * TRAINED),
        bench.MATRIX: (TRAINED, width * TRAINED),
        bench.HOOKED: (CHOSEN, width * CHOSEN),
        bench.PACKED: (CHOSEN, 4 * CHOSEN),
    }
    for mode, (elements, size) in expected.items():
        rows = rows_of(found[1], op="step", set=f"2 layers of 32, {form}", variant=mode)
        assert [row["rank"] for row in rows] == ["0", "1"]
        for row in rows:
            assert (row["collectives"], row["elements"], row["bytes_sent"]) == ("1", str(elements), str(size)), mode
            assert float(row["share_of_dense"]) == pytest.approx(size / (width * TRAINED), abs=1e-4)


@pytest.mark.parametrize("start", bench.STARTS)
def test_a_refresh_by_rank(found, start):
    rows = rows_of(found[1], op="refresh", start=start, variant=bench.SHARED)
    assert [row["rank"] for row in rows] == ["0", "1"] and sum(int(row["masks"]) for row in rows) == 13
    assert sum(float(row["share_of_work"]) for row in rows) == pytest.approx(1)
    assert max(float(row["share_of_work"]) for row in rows) < 0.6
    assert [row["collectives"] for row in rows] == ["4", "4"]  # two broadcasts, one gather of objects
    assert [row["bytes_sent"] for row in rows] == [row["bytes_received"] for row in reversed(rows)]
    fewer, more = sorted(rows, key=lambda row: int(row["masks"]))
    assert (fewer["masks"], more["masks"]) == ("6", "7") and int(fewer["bytes_sent"]) < int(more["bytes_sent"])
    lists = 4 * (8 * round(0.05 * 96 * 160) + 5 * round(0.05 * 64 * 48))
    assert sum(int(row["bytes_sent"]) for row in rows) > lists
    assert all(row["threads"] == rows[0]["threads"] for row in rows)


@pytest.mark.parametrize("start", bench.STARTS)
def test_seconds_of_a_refresh(found, start):
    reports, table = found
    rows = {row["variant"]: row for row in rows_of(table, op="seconds", start=start)}
    assert list(rows) == list(bench.VARIANTS) and all(row["runs"] == "2" for row in rows.values())
    assert [row["processes"] for row in rows.values()] == ["1", "1", "2", "2"]

    def seconds(variant, run, what="seconds"):  # of the slowest rank
        every = [of_one for report in reports for of_one in report["refreshes"]]
        key = {"start": start, "variant": variant, "run": run}
        return max(of_one[what] for of_one in every if key.items() <= of_one.items())

    for variant, row in rows.items():
        taken = [seconds(variant, run) for run in range(2)]
        assert float(row["median_s"]) == pytest.approx(sum(taken) / 2, rel=0.01)
        busy = [seconds(variant, run, "cpu_seconds") for run in range(2)]
        assert float(row["cpu_s"]) == pytest.approx(sum(busy) / 2, rel=0.01) and min(busy) > 0
        for key, base in (("all_cores", bench.ALL_CORES), ("one_process", bench.ALONE), ("each_all", bench.EACH)):
            ratio = sum(seconds(base, run) / taken[run] for run in range(2)) / 2
            assert float(row[f"times_{key}"]) == pytest.approx(ratio, rel=0.01)


def spoilt(reports, monkeypatch, tmp_path, spoil):
    """The rows of a run in which ``spoil`` has changed the reports. Its exit status is 1."""
    changed = copy.deepcopy(reports)
    spoil(changed)
    monkeypatch.setattr(bench, "reports", lambda *arguments: changed)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    with (tmp_path / "distributed.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("what", ["weights", "index lists"])
def test_ranks_that_differ_after_steps_are_refused(found, monkeypatch, tmp_path, what):
    def spoil(reports):
        reports[1]["steps"][2]["digests"][what] = "other"

    rows = spoilt(found[0], monkeypatch, tmp_path, spoil)
    refused = [row for row in rows if row["status"] != "ok"]
    assert [(row["set"], row["variant"]) for row in refused] == [("2 layers of 32, fp32", bench.HOOKED)] * 2
    assert all(row["status"] == f"refused, ranks have different {what}" and not row["bytes_sent"] for row in refused)


def test_lists_that_one_process_does_not_make_are_refused(found, monkeypatch, tmp_path):
    def spoil(reports):
        shared = [of_one for of_one in reports[1]["refreshes"] if of_one["variant"] == bench.SHARED]
        shared[1]["lists"] = "other"  # of the warm refresh

    rows = spoilt(found[0], monkeypatch, tmp_path, spoil)
    refused = [row for row in rows if row["status"] != "ok"]
    assert [(row["op"], row["start"], row["variant"]) for row in refused] == [
        ("refresh", "warm", bench.SHARED),
        ("refresh", "warm", bench.SHARED),
        ("seconds", "warm", bench.SHARED),
    ]
    assert all(row["status"] == "refused, rank 1 has other index lists than one process" for row in refused)
    assert not any(row["median_s"] or row["masks"] for row in refused)
