"""The tables of a card: every row of a stage, in its order, and what is missing."""

from __future__ import annotations

import re

import pytest
from helpers import card_rows

from bench import ROOT
from bench.common import results
from bench.tables import render
from bench.tables.card import CARD_TABLES
from bench.tables.render import NOTHING, rewrite
from bench.tables.specs import TABLES
from bench.tables.types import Table, TableError

ORIGIN = "*A card 80GB; CUDA 13.0; torch 2.11.0; triton 3.6.0; repeats: 20; commit abc*"


@pytest.fixture
def root(tmp_path):
    card_rows.write(tmp_path / "card")
    return tmp_path


def body(name: str, root, folders: str = "card", tables: dict[str, Table] = CARD_TABLES) -> list[str]:
    """The lines of a table between its markers."""
    marker = f"<!-- table: {name} (from {tables[name].csv} in {folders}; python -m bench.tables) -->"
    return rewrite(f"{marker}\n<!-- end -->", tables, root).split("\n")[2:-2]


def test_the_check_with_the_driver_of_its_log(root):
    assert body("gpu_check", root) == [
        "| stage | what | result | details | seconds | commit |",
        "| --- | --- | --- | --- | --- | --- |",
        "| build | backend triton | ok |  | 21 | abc |",
        "|  | (whole stage) | ok |  | 28 of 45 | abc |",
        "| tests | ops/test_x.py | failed: 2 tests |  |  | abc |",
        "|  | gpu tests | failed | 2 failed, 862 passed |  | abc |",
        "",
        "*A card 80GB; driver 580.1.2; CUDA 13.0; torch 2.11.0; triton 3.6.0; commit abc*",
    ]
    (root / "card" / "gpu_check.log").unlink()
    assert body("gpu_check", root)[-1].startswith("*A card 80GB; CUDA 13.0;")


def test_rates_have_units(root):
    assert body("gpu_machine", root)[2:4] == [
        "| copy bandwidth | 1024 MiB | 2500 GB/s |",
        "| product, bf16 | 8192 | 750 TFLOP/s |",
    ]


def test_the_step_with_every_variant_and_its_status(root):
    """A refused variant and a killed stage say so. A stage that ended by itself has no row."""
    assert body("gpu_step", root) == [
        "| model | variant | time | host | speed against its baseline | baseline | % of roofline |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| LLaMA-2-7B, bf16, 224 matrices | AdamW fused, bf16 | 40 ms | 1.25 ms |  |  | 80 % (bytes) |",
        "|  | dense bf16 gradients, fp32 moments | 8 ms | 1.25 ms | 5 x | AdamW fused, bf16 | 75 % (bytes) |",
        "|  | packed fp32 gradients, fp32 moments | 5 ms | 1.25 ms | 8 x | AdamW fused, bf16 | 80 % (bytes) |",
        "|  | AdamW fused on a packed vector, scattered | 16 ms | 1.25 ms | 2.5 x | AdamW fused, bf16 | 50 % (bytes) |",
        r"|  | packed bf16 gradients | refused, it is wrong: a\|b |  |  |  |  |",
        "| LLaMA-2-7B, fp32, 224 matrices | AdamW fused, fp32 | 50 ms | 1.25 ms |  |  | 90 % (bytes) |",
        "| step Llama-3-8B | (whole stage) | killed after 40 s |  |  |  |  |",
        "",
        ORIGIN,
    ]


def test_training_and_a_column_that_came_later(root):
    lines = [
        "| random Llama, 1.1 B, bf16, 4 x 1024 tokens | full fine-tuning, AdamW fused"
        " | 16,384 | 250 ms |  |  | 20 GB | 4.4 GB "
        "| 50 % (bytes) |",
        "|  | LIFT, packed gradients | 20,480 | 200 ms | 1.25 x | full fine-tuning, AdamW fused"
        " | 8 GB | 0.5 GB | 75 % (bytes) |",
    ]
    assert body("gpu_training", root)[2:4] == lines
    rows = [row | ({"trained": 48.44e6} if row["stage"] == "training" else {}) for row in card_rows.time_rows()]
    rows += [card_rows.row("training", "LoRA", status="missing: peft", model=rows[-1]["model"])]
    card_rows.write(root / "card", gpu_time=rows)
    found = body("gpu_training", root)
    assert found[0].startswith("| model | method | trained | tokens/s |")
    assert found[2] == lines[0].replace("fused | 16", "fused | 48.4 M | 16")
    assert found[4] == "| training | LoRA |  | missing: peft |  |  |  |  |  |  |"


COLUMNS = {
    "packed ops": ({"op": "packed_gather", "dtype": "bf16", "shape": "8 x 4"}, "| packed_gather | v | 8 x 4, bf16 |"),
    "gradients": ({"model": "M", "shape": "one layer", "op": "backward", "kept_mb": 3, "peak_mb": 40.5},
                  "| M, one layer | backward | v | 2 ms | 1.25 ms | 3 x | b | 50 % (bytes) | 3 MB | 40.5 MB |"),
    "selection": ({"model": "M", "shape": "8 x 4", "op": "lowrank_topk"}, "| M, 8 x 4 | lowrank_topk | v | 2 ms |"),
    "bitmaps": ({"model": "M", "shape": "8 x 4", "op": "bitmap"}, "| M, 8 x 4 | bitmap | v | 2 ms |"),
    "refresh": ({"model": "M", "shape": "7 matrices", "passes": 3.0, "settled": 7, "eigh_share": 0.12,
                 "orth_share": 0.43}, "| M, 7 matrices | v | 2.0 ms | 3 | 7 | 12 % | 43 % | 50 % (bytes) |"),
    "factorizations": ({"op": "eigh", "shape": "2 of 8", "eigh_cost": 275.2},
                       "| eigh | v | 2 of 8 | 2 ms | 1.25 ms | 3 x | b | 50 % (bytes) | 275 |"),
}  # fmt: skip


@pytest.mark.parametrize("stage", COLUMNS)
def test_the_other_stages(root, stage):
    columns, line = COLUMNS[stage]
    table = "gpu_selection" if stage == "bitmaps" else "gpu_" + stage.replace(" ", "_")
    card_rows.write(root / "card", gpu_time=[card_rows.timed(stage, "v", 2, 1, 3, baseline="b", **columns)])
    assert body(table, root)[2].startswith(line)
    late = card_rows.row(stage, "(whole stage)", status="failed: exit status -11")
    card_rows.write(root / "card", gpu_time=[late])
    assert " (whole stage) | failed: exit status -11 |" in body(table, root)[2]


@pytest.mark.parametrize("name", CARD_TABLES)
def test_what_is_not_measured_yet(root, name):
    """A folder without files, and a file without the rows of a stage."""
    assert body(name, root, "gone") == [NOTHING]
    card_rows.write(root / "card", gpu_check=[], gpu_time=[card_rows.row("other", "v")])
    assert body(name, root) == [NOTHING]


def test_other_tables_still_need_their_files(root):
    with pytest.raises(TableError, match="gone/packed_ops.csv is missing"):
        body("packed_ops", root, "gone", TABLES)


def test_two_cards(root):
    rows = [row | {"device": "Another card", "rate": row.get("rate") and 1e12} for row in card_rows.time_rows()[:1]]
    card_rows.write(root / "second", gpu_time=rows)
    assert body("gpu_machine", root, "card, second, gone") == [
        "| machine | rate | of | measured |",
        "| --- | --- | --- | --- |",
        "| A card 80GB | copy bandwidth | 1024 MiB | 2500 GB/s |",
        "|  | product, bf16 | 8192 | 750 TFLOP/s |",
        "| Another card | copy bandwidth | 1024 MiB | 1000 GB/s |",
        "",
        "*A card 80GB; Another card; CUDA 13.0; torch 2.11.0; triton 3.6.0; commit abc*",
    ]


def test_the_columns_are_those_of_the_suite():
    """A partial table would not say that a column is misspelt."""
    files = [*(ROOT / "bench" / "gpu_parts").glob("*.py"), ROOT / "bench" / "gpu_suite.py"]
    written = "\n".join(file.read_text() for file in files) + "median_ms floor_ms"
    for name, table in CARD_TABLES.items():
        for column in re.findall(r"\{\w+\.(\w+)[/:}]", " ".join(table.columns.values())):
            assert re.search(rf"\b{column}\b", written), f"{name}: {column}"
        stages = {selection["stage"] for selection in table.each if selection}
        assert all(f'Stage("{stage.rstrip("*")}' in written for stage in stages), stages


def test_a_card_has_a_folder_that_a_marker_names(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    folder = results.results_folder("cuda", tmp_path)
    assert folder.name == "nvidia-h100-80gb-hbm3"
    marker = f"<!-- table: gpu_step (from gpu_time.csv in {folder.name}; python -m bench.tables) -->\n<!-- end -->"
    assert render.BLOCK.fullmatch(marker)[4] == folder.name
    assert len(body("gpu_step", tmp_path, card_rows.write(folder).name)) == 11
