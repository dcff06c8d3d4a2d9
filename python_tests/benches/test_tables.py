"""`bench.tables`: the READMEs say what the CSVs say; a table shows the selected rows."""

from __future__ import annotations

import re

import pytest

from bench import ROOT
from bench.tables.__main__ import READMES, main
from bench.tables.render import BLOCK, rewrite
from bench.tables.specs import TABLES
from bench.tables.types import Table, TableError

CSV = """op,variant,ms,seconds,share,status,device,commit
step,ours | packed,2.5,0.5,0.25,ok,A card,abc
step,theirs,10,,,needs a GPU,A card,abc
step,theirs too,30,1.5,,ok,A card,def
"""
MARKER = "<!-- table: small (from results/small.csv; python -m bench.tables) -->"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.csv").write_text(CSV)
    return tmp_path


def body(table: Table, root) -> list[str]:
    """The lines of a table between its markers."""
    text = rewrite(f"before\n{MARKER}\nstale\n<!-- end -->\nafter\n", {"small": table}, root)
    assert text.startswith(f"before\n{MARKER}\n\n") and text.endswith("\n\n<!-- end -->\nafter\n")
    return text.split("\n")[3:-4]


def test_the_readmes_say_what_the_csvs_say(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_in_a_readme_and_every_csv_in_a_table():
    shown = [match for readme in READMES for match in BLOCK.findall(readme.read_text())]
    assert sorted(name for _, name, _, _ in shown) == sorted(TABLES)
    used = {path for _, _, sources, _ in shown for path in sources.split(", ")}
    assert used == {str(path.relative_to(ROOT)) for path in (ROOT / "bench/results").glob("*/*.csv")}


def test_a_readme_that_differs_is_shown_and_rendered_again(tmp_path, capsys):
    text = (ROOT / "bench" / "README.md").read_text()
    cell = re.search(r"\*\*(\d\.\d\d) x\*\*", text)
    assert cell is not None
    stale = text.replace(cell[0], "**99 x**")
    (tmp_path / "README.md").write_text(stale)
    assert main(["--check", str(tmp_path / "README.md")]) == 1
    out = capsys.readouterr().out
    assert any(line.startswith("-") and "**99 x**" in line for line in out.splitlines())
    assert any(line.startswith("+") and cell[0] in line for line in out.splitlines())
    assert (tmp_path / "README.md").read_text() == stale
    assert main([str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text() == text


def test_cells(root):
    """Numbers, quotients, units, ranges over rows, texts, alternatives, and the origin."""
    columns = {
        "which": "{label}",
        "ms": "{ours.ms:.2f}, {theirs.ms/ours.ms:.3g} x",
        "s": "{ours.seconds/ms:.0f}",
        "both": "{theirs.ms}",
        "share": "{ours.share:.0%}",
        "last": "{theirs.seconds:.1f}||{ours.variant} {theirs.status}",
        "none": "{theirs.seconds}",
    }
    rows = [("a", {"ours": {"variant": "ours*"}, "theirs": {"variant": "theirs"}})]
    rows += [("a", {"ours": {"variant": "theirs too"}, "theirs": {"variant": "theirs*"}})]
    assert body(Table("small.csv", columns, rows), root) == [
        "| which | ms | s | both | share | last | none |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        r"| a | 2.50, 4 x | 500 | 10 | 25 % | ours \| packed needs a GPU |  |",
        "|  | 30.00, 0.333..1 x | 1500 | 10..30 |  | theirs too needs a GPU, ok |  |",
        "",
        "*A card; commit abc and def*",
    ]


def test_a_line_for_each_row(root):
    table = Table(
        "small.csv", {"op": "{row.op}", "way": "{row.variant}", "ms": "{row.ms:.1f}"}, each=[{"status": "ok"}]
    )
    assert body(table, root)[2:4] == [r"| step | ours \| packed | 2.5 |", "|  | theirs too | 30.0 |"]


def test_a_table_of_two_csvs(root):
    (root / "results" / "other.csv").write_text("op,ms,status\nstep,7,missing: Error: no card\n")
    columns = {"small": "{small.ms:.1f}", "other": "{other.ms:.0f}", "why": "{other.status:reason}"}
    picks = {"small": {"file": "small.csv", "variant": "theirs"}, "other": {"file": "other.csv", "op": "step"}}
    table = Table("small.csv, other.csv", columns, [("", picks)])
    marker = MARKER.replace("small.csv", "small.csv, results/other.csv")
    text = rewrite(f"{marker}\n<!-- end -->\n", {"small": table}, root)
    assert "| 10.0 | 7 | no card |\n" in text
    with pytest.raises(TableError, match="none of that name from small.csv"):
        rewrite(f"{MARKER}\n<!-- end -->\n", {"small": table}, root)


@pytest.mark.parametrize(
    "table, marker, words",
    [
        (
            Table("small.csv", {"x": "{row.ms}"}, each=[{"variant": "gone"}]),
            MARKER,
            "small.csv: no row has {'variant': 'gone'}",
        ),
        (Table("small.csv", {"x": "{row.gone}"}, each=[{}]), MARKER, "has no column 'gone'"),
        (Table("other.csv", {"x": "{row.ms}"}, each=[{}]), MARKER, "table small: .* none of that name from small.csv"),
        (Table("gone.csv", {}), MARKER.replace("small.csv", "gone.csv"), "gone.csv is missing; run its bench"),
        (Table("small.csv", {}), MARKER.replace("small (", "large ("), "table large: "),
        (Table("small.csv", {}), MARKER.replace(" -->", "-->"), "malformed"),
    ],
)
def test_a_table_that_cannot_be_made(root, table, marker, words):
    with pytest.raises(TableError, match=re.escape(words) if ".*" not in words else words):
        rewrite(f"{marker}\n<!-- end -->\n", {"small": table}, root)


def test_markers_come_in_pairs(root):
    with pytest.raises(TableError, match="not followed by"):
        rewrite(f"{MARKER}\n", {}, root)


def test_the_command_says_what_is_missing(tmp_path, capsys):
    marker = "<!-- table: step (from bench/results/nowhere/sparse_adamw.csv; python -m bench.tables) -->"
    (tmp_path / "README.md").write_text(f"{marker}\n<!-- end -->\n")
    assert main([str(tmp_path / "README.md")]) == 2
    assert "bench/results/nowhere/sparse_adamw.csv is missing" in capsys.readouterr().err


def test_a_description_without_a_marker_needs_no_csv(root):
    assert rewrite("text\n", TABLES, root) == "text\n"
