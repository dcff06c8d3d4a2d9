"""Rows of a comparison in a CSV file: what is read is what was written."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers.comparison_rows import make_row

from lift_kernels.errors import FileError
from lift_kernels.finetune.comparison import rows


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "runs.csv"
    written = [
        make_row(stage="base", method="base", rate=0.0, entries=0),
        make_row(rate=3e-5, target_losses=(1 / 3, 2.0, 1e-7), machine='AMD "EPYC", 2 cores', train_seconds=1 / 7),
        make_row(rate=1e-3, seed=1, correct=None, answered=None),
        make_row(rate=1.0, status="diverged", target_losses=(), neutral_losses=(), correct=None, answered=None),
        make_row(task="other", fingerprint="ff"),
    ]
    for row in written:
        rows.append(path, row)
    assert rows.read(path) == written
    assert rows.read(path, "other") == written[4:]
    assert rows.read(path, "sums", "0a") == written[:4]
    assert [row.accuracy for row in written] == [0.5, 0.5, None, None, 0.5]
    assert math.isinf(written[3].target_loss) and math.isinf(written[3].neutral_loss)
    copy = tmp_path / "copy.csv"
    rows.add(copy, rows.read(path))
    assert copy.read_bytes() == path.read_bytes()


def test_the_file_has_readable_cells(tmp_path):
    path = tmp_path / "runs.csv"
    rows.append(path, make_row(target_losses=(1.0, 2.5), correct=(0, 1, 1)))
    header, line = (text.split(",") for text in path.read_text().splitlines())
    cells = dict(zip(header, line))
    assert tuple(header) == rows.COLUMNS
    assert cells["target_losses"] == "1.000000 2.500000"
    assert (cells["target_loss"], cells["accuracy"], cells["correct"]) == ("1.750000", "0.666667", "011")
    assert (cells["rate"], cells["seconds"], cells["status"]) == ("0.001", "12.500", "ok")


def test_the_loss_of_a_run_is_the_mean_over_its_samples():
    row = make_row(target_losses=(1.0, 2.0, 6.0), neutral_losses=(1.0, 2.0))
    assert (row.target_loss, row.neutral_loss) == (3.0, 1.5)


def test_a_missing_file_has_no_rows(tmp_path):
    assert rows.read(tmp_path / "none.csv") == []


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_half_written_last_line_is_dropped_and_named(tmp_path, capsys, cut):
    path = tmp_path / "runs.csv"
    first, second, third = (make_row(seed=seed, machine="Prozessor Ü") for seed in range(3))
    rows.add(path, [first, second])
    path.write_bytes(path.read_bytes()[:-cut])
    assert rows.read(path) == [first]
    line = f"{path}: line 3 is only half written and is dropped; its run is lost\n"
    assert capsys.readouterr().out == line
    rows.append(path, third)
    assert capsys.readouterr().out == line
    assert rows.read(path) == [first, third]
    assert capsys.readouterr().out == ""


def test_a_file_that_a_spreadsheet_has_saved_is_read(tmp_path):
    """It puts a byte order mark in front, ends lines with CRLF and leaves out final zeros."""
    path = tmp_path / "runs.csv"
    rows.append(path, make_row(target_losses=(1.0, 2.0), train_seconds=2))
    text = path.read_text().replace("1.500000", "1.5", 1).replace("2.000,", "2,").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = make_row(target_losses=(1.0, 2.0), train_seconds=2)
    assert rows.read(path) == [expected]
    rows.append(path, make_row(seed=1))
    assert rows.read(path) == [expected, make_row(seed=1)]


def test_a_half_written_header_is_an_empty_file(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("task,sta")
    assert rows.read(path) == []
    rows.append(path, make_row())
    assert rows.read(path) == [make_row()]


def test_rows_of_another_fingerprint_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    rows.add(path, [make_row(), make_row(task="other", fingerprint="ff")])
    with pytest.raises(FileError) as error:
        rows.read(path, "sums", "1b")
    assert str(error.value) == (
        f"{path}: line 2 (sums, final, lift, rate 0.001, seed 0, test) is of another model, other data or other "
        "settings: its fingerprint is 0a, not 1b; choose another --output or --task, or delete the task's lines"
    )
    assert rows.read(path, "other", "ff") == [make_row(task="other", fingerprint="ff")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("final", "finale", "stage is 'finale', not one of base, pilot, rates, final"),
        ("1.500000 2.500000", "1.500000 nan", "a run that is ok needs finite losses"),
        ("1.500000 2.500000", "1.500000 2.600000", "target_loss is 2.000000 and not 2.050000, as its samples say"),
        (",1234,", ",many,", "invalid literal"),
        ("0101", "0121", "correct has values other than 0 and 1"),
        (",ok,", ",diverged,", "a run that diverged has no losses"),
    ],
)
def test_a_damaged_line_is_named_with_its_reason(tmp_path, old, new, message):
    path = tmp_path / "runs.csv"
    rows.add(path, [make_row(seed=7, target_losses=(1.0, 2.0)), make_row(target_losses=(1.5, 2.5))])
    head, _, last = path.read_text().removesuffix("\n").rpartition("\n")
    assert old in last
    path.write_text(f"{head}\n{last.replace(old, new)}\n")
    with pytest.raises(FileError) as error:
        rows.read(path)
    assert str(error.value).startswith(f"{path}: line 3 is no row of a comparison (") and message in str(error.value)
    assert str(error.value).endswith("; delete the line") and "\n" not in str(error.value)


def test_a_run_that_stands_there_twice_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    rows.add(path, [make_row(), make_row(seed=1), make_row(seconds=99)])
    with pytest.raises(FileError, match=r"lines 2 and 4 are the same run \(sums, final, lift, .*\); delete one$"):
        rows.read(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(
        FileError, match="line 1 does not have the columns of a comparison of this version; restore it, or ch"
    ):
        rows.read(path)
    path.write_text(",".join(rows.COLUMNS) + "\na,b\n")
    with pytest.raises(FileError, match=r"line 2 has 2 cells, not 21; delete the line$"):
        rows.read(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(FileError, match="it is not text; restore it, or choose another --output"):
        rows.read(path)


def test_the_losses_of_many_samples_fit_into_a_cell(tmp_path):
    path = tmp_path / "runs.csv"
    row = make_row(target_losses=tuple(i / 7 for i in range(20_000)))
    rows.append(path, row)
    assert rows.read(path) == [row]


def test_a_row_with_an_end_of_line_is_refused_before_the_file_changes(tmp_path):
    path = tmp_path / "runs.csv"
    rows.append(path, make_row())
    with pytest.raises(ValueError, match="end of line"):
        rows.append(path, make_row(seed=3, machine="two\nlines"))
    assert rows.read(path) == [make_row()]


def test_every_column_is_in_the_file_once():
    names = {field.name for field in dataclasses.fields(rows.Row)}
    assert len(rows.COLUMNS) == len(set(rows.COLUMNS)) == len(names) + 3
