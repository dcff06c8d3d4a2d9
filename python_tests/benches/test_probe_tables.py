"""The table of a probe in the READMEs: mean and range of the losses in a CSV."""

import pytest

from bench.tables.probes import probe
from bench.tables.types import TableError

HEAD = "entries,noise,seed,loss,tokens,model,density,rank,budget_rank,machine,torch,commit"
SAME = "1500,tiny,0.05,32,,2 cores,2.11.0,abc1234"
LOSSES = {("principal", "0.5"): (2.5, 2.3), ("principal", "2.0"): (9, 8), ("random", "0.5"): (2, 2.2)}


def write(path, draws: int = 2) -> str:
    rows = [HEAD, f"none,0.0,,1.8765,{SAME}"]
    for (group, size), losses in (LOSSES | {("random", "2.0"): (7.104, 7.106)}).items():
        rows += [f"{group},{size},{seed},{loss},{SAME}" for seed, loss in enumerate(losses[:draws])]
    path.write_text("\n".join(rows) + "\n")
    return probe(path)


def test_the_table_has_mean_and_range_of_the_draws(tmp_path):
    assert write(tmp_path / "probe.csv").splitlines() == [
        "Without noise the loss is 1.877, on 1,500 tokens. Rank 32, 5 % of each matrix; mean and range of 2 draws of "
        "the noise.",
        "",
        "| noise on | 0.5 sd | 2 sd |",
        "| --- | --- | --- |",
        "| principal entries | 2.40 (2.30 to 2.50) | 8.50 (8.00 to 9.00) |",
        "| random entries | 2.10 (2.00 to 2.20) | 7.11 (7.10 to 7.11) |",
        "",
        "*2 cores; torch 2.11.0; commit abc1234*",
    ]


def test_one_draw_has_no_range(tmp_path):
    lines = write(tmp_path / "probe.csv", draws=1).splitlines()
    assert lines[0].endswith("5 % of each matrix; one draw of the noise.")
    assert lines[4] == "| principal entries | 2.50 | 9.00 |"


@pytest.mark.parametrize("text", [None, "", "entries,noise\nnone,0\n", f"{HEAD}\nrandom,0.5,0,2.0,{SAME}\n"])
def test_a_file_of_something_else_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "probe.csv").write_text(text)
    with pytest.raises(TableError, match=r"probe\.csv is"):
        probe(tmp_path / "probe.csv")
