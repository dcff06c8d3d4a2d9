"""`bench.tables`: the READMEs say what the CSVs say; a table shows the selected rows."""

from __future__ import annotations

import re

import pytest

from bench import ROOT
from bench.tables.__main__ import READMES, main
from bench.tables.render import BLOCK, RESULTS, rewrite
from bench.tables.specs import TABLES
from bench.tables.types import Table, TableError

CSV = """op,variant,ms,seconds,share,status,device,commit
step,ours | packed,2.5,0.5,0.25,ok,A card,abc
step,theirs,10,,,needs a GPU,A card,abc
step,theirs too,30,1.5,,ok,A card,def
"""
MARKER = "<!-- table: small (from small.csv in results; python -m bench.tables) -->"


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
    assert sorted(name for _, name, *_ in shown) == sorted(TABLES)
    used = {
        f"{folder}/{file}"
        for _, _, files, folders, _ in shown
        for folder in folders.split(", ")
        for file in files.split(", ")
    }
    elsewhere = {"masks_by_passes.csv", "host_time.csv", "drift.csv"}  # drawn, or named in a text
    elsewhere |= {"refresh_profile.csv"}
    older = "nvidia-h100-80gb-hbm3"  # linked as a whole: another card and another state of the code
    assert f"](results/{older})" in (ROOT / "bench" / "README.md").read_text()
    found = {str(path.relative_to(RESULTS)) for path in RESULTS.glob("*/*.csv")}
    left = {path for path in found - used if not path.startswith(f"{older}/")}
    assert used <= found and {path.rpartition("/")[2] for path in left} <= elsewhere


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
        "| which | ms | s | both | share | last |",  # "none" has no text in any line
        "| --- | --- | --- | --- | --- | --- |",
        r"| a | 2.50, 4 x | 500 | 10 | 25 % | ours \| packed needs a GPU |",
        "|  | 30.00, 0.333..1 x | 1500 | 10..30 |  | theirs too needs a GPU, ok |",
        "",
        "*A card; commit abc and def*",
    ]


def test_a_line_for_each_row(root):
    table = Table(
        "small.csv", {"op": "{row.op}", "way": "{row.variant}", "ms": "{row.ms:.1f}"}, each=[{"status": "ok"}]
    )
    assert body(table, root)[2:4] == [r"| step | ours \| packed | 2.5 |", "|  | theirs too | 30.0 |"]


MACHINE = """variant,ms,ratio,environment,settings,level,device,commit
ours,{0},2,default,{1},{2},{3},abc
theirs,{0}0,1,default,{1},{2},{3},abc
ours,1,4,tuned,{1} OMP_WAIT_POLICY=passive,{2},{3},abc
theirs,4,1,tuned,{1} OMP_WAIT_POLICY=passive,{2},{3},abc
"""
BOTH = "<!-- table: small (from small.csv in lower, higher; python -m bench.tables) -->"


@pytest.fixture
def machines(tmp_path):
    for folder, values in (
        ("lower", (5, "LIFT_CPU_LEVEL=x86-64-v3", "x86-64-v3", "A Xeon")),
        ("higher", (3, "", "x86-64-v4", "A Xeon")),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "small.csv").write_text(MACHINE.format(*values))
    return tmp_path


def test_two_machines_stand_one_after_the_other(machines):
    """In the order of the marker. Rows of other settings are shown only where a table asks."""
    picks = {"row": {"variant": "ours"}, "base": {"variant": "theirs"}}
    columns = {"what": "{label}", "ours": "{row.ms:.0f} ms", "theirs": "{base.ms:.0f} ms, {row.ratio:.1f} x"}
    lines = [("step", picks), ("again", picks)]
    table = Table("small.csv", columns, lines)
    origin = "A Xeon; x86-64-v3: LIFT_CPU_LEVEL=x86-64-v3"
    assert rewrite(f"{BOTH}\n<!-- end -->", {"small": table}, machines).split("\n")[2:-2] == [
        "| level | what | ours | theirs |",
        "| --- | --- | --- | --- |",
        "| x86-64-v3 | step | 5 ms | 50 ms, 2.0 x |",
        "|  | again | 5 ms | 50 ms, 2.0 x |",
        "| x86-64-v4 | step | 3 ms | 30 ms, 2.0 x |",
        "|  | again | 3 ms | 30 ms, 2.0 x |",
        "",
        f"*{origin}; commit abc*",
    ]
    table = Table("small.csv", columns, [("step", picks), ("step", picks)], tuned=1)
    tuned = "tuned: OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 THP_MEM_ALLOC_ENABLE=1"
    assert rewrite(f"{BOTH}\n<!-- end -->", {"small": table}, machines).split("\n")[4:-2] == [
        "| x86-64-v3 | step | 5 ms | 50 ms, 2.0 x |",
        "|  |  | 5 ms | 50 ms, 2.0 x |",
        "| x86-64-v3, tuned | step | 1 ms | 4 ms, 4.0 x |",
        "| x86-64-v4 | step | 3 ms | 30 ms, 2.0 x |",
        "|  |  | 3 ms | 30 ms, 2.0 x |",
        "| x86-64-v4, tuned | step | 1 ms | 4 ms, 4.0 x |",
        "",
        f"*{origin}; {tuned}; commit abc*",
    ]


def test_two_machines_are_both_named(machines):
    path = machines / "higher" / "small.csv"
    path.write_text(path.read_text().replace("A Xeon", '"An EPYC, 2 cores"'))
    table = Table("small.csv", {"ours": "{row.ms}"}, each=[{"variant": "ours"}])
    text = rewrite(f"{BOTH}\n<!-- end -->", {"small": table}, machines)
    origin = "*x86-64-v3: A Xeon, LIFT_CPU_LEVEL=x86-64-v3; x86-64-v4: An EPYC, 2 cores; commit abc*"
    assert text.split("\n")[4:-2] == ["| x86-64-v3 | 5 |", "| x86-64-v4 | 3 |", "", origin]
    path.write_text(path.read_text().replace(",x86-64-v4,", ",,"))  # as before rows named a level
    text = rewrite(f"{BOTH}\n<!-- end -->", {"small": table}, machines)
    assert "| An EPYC, 2 cores | 3 |\n\n*x86-64-v3: A Xeon, LIFT_CPU_LEVEL=x86-64-v3; An EPYC, 2 cores; commit" in text


def test_one_folder_of_a_level(machines):
    marker = BOTH.replace("lower, higher", "higher")
    table = Table("small.csv", {"ours": "{row.ms}"}, each=[{"variant": "ours"}])
    text = rewrite(f"{marker}\n<!-- end -->", {"small": table}, machines)
    assert text.split("\n")[2:-2] == ["| ours |", "| --- |", "| 3 |", "", "*A Xeon, x86-64-v4; commit abc*"]


def test_two_folders_of_one_level_are_not_told_apart(machines):
    table = Table("small.csv", {"ours": "{row.ms}"}, each=[{}])
    with pytest.raises(TableError, match="two folders have the same level"):
        rewrite(f"{BOTH.replace('higher', 'lower')}\n<!-- end -->", {"small": table}, machines)


def test_rows_that_are_all_tuned_are_shown(machines):
    path = machines / "higher" / "small.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if ",default," not in line))
    table = Table("small.csv", {"ours": "{row.ms}"}, each=[{"variant": "ours"}])
    text = rewrite(f"{BOTH.replace('lower, higher', 'higher')}\n<!-- end -->", {"small": table}, machines)
    assert "| 1 |\n\n*A Xeon, x86-64-v4,  OMP_WAIT_POLICY=passive; commit abc*" in text


def test_rows_and_columns_that_may_be_missing(root):
    """An alias with ?, a column with ?, and a line with ?. Without it they are errors."""
    picks = {"ours": {"variant": "ours*"}, "new?": {"variant": "new"}}
    columns = {"what": "{label}", "ms": "{ours.ms}", "new": "{new.ms}||-", "more": "{ours.gone?:.1f}||{ours.ms} only"}
    rows = [("a", picks), ("?gone", {"ours": {"variant": "ours*"}, "new": {"variant": "new"}}), ("?kept", picks)]
    assert body(Table("small.csv", columns, [*rows[:2], ("?kept", {"ours": {"variant": "ours*"}, "new?": {}})]), root)[
        2:4
    ] == ["| a | 2.5 | - | 2.5 only |", "| kept | 2.5 | 2.5..30 | 2.5 only |"]
    with pytest.raises(TableError, match="no row has {'variant': 'new'}"):
        body(Table("small.csv", columns, [(rows[1][0].removeprefix("?"), rows[1][1])]), root)


def test_a_table_of_two_csvs(root):
    (root / "results" / "other.csv").write_text("op,ms,status\nstep,7,missing: Error: no card\n")
    columns = {"small": "{small.ms:.1f}", "other": "{other.ms:.0f}", "why": "{other.status:reason}"}
    picks = {"small": {"file": "small.csv", "variant": "theirs"}, "other": {"file": "other.csv", "op": "step"}}
    table = Table("small.csv, other.csv", columns, [("", picks)])
    marker = MARKER.replace("small.csv", "small.csv, other.csv")
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
            "small.csv in results: no row has {'variant': 'gone'}",
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
    marker = "<!-- table: step (from sparse_adamw.csv in nowhere; python -m bench.tables) -->"
    (tmp_path / "README.md").write_text(f"{marker}\n<!-- end -->\n")
    assert main([str(tmp_path / "README.md")]) == 2
    assert "bench/results/nowhere/sparse_adamw.csv is missing" in capsys.readouterr().err


def test_a_description_without_a_marker_needs_no_csv(root):
    assert rewrite("text\n", TABLES, root) == "text\n"
