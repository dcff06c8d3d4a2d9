"""The mask report: figures of known matrices, files of a tiny model, refusals in one line."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_llama import save_tiny

from lift_kernels.cli import main
from lift_kernels.masks.report import density_map, draw, matrix_report, report_of, table


def test_figures_of_a_matrix_of_rank_one():
    """W = u v^T is its own approximation.

    So the largest entries are the principal ones, and their rows and columns are known.
    """
    u, v = torch.ones(20), torch.ones(30)
    u[:4], v[:5] = 10.0, 10.0
    row = matrix_report("model.layers.7.mlp.up_proj.weight", torch.outer(u, v), rank=1, k=20)
    assert (row.layer, row.projection, row.entries) == (7, "mlp.up_proj", 20)
    assert row.density == 20 / 600 and row.overlap == 1.0
    assert row.rows == 0.5 and row.columns == pytest.approx(0.6)  # 2 of the 4 rows, 3 of the 5 columns
    assert row.captured == pytest.approx(20 * 100 / (20 * 100 + (4 * 25 + 16 * 5) * 10 + 16 * 25))


def test_principal_weights_are_not_the_largest():
    """A single large entry outside the dominant direction is not chosen at rank 1."""
    weight = torch.outer(torch.ones(16), torch.ones(16))
    weight[3, 4] = -3.0
    row = matrix_report("w.weight", weight, rank=1, k=1)
    assert row.layer is None and row.projection == "w" and row.overlap == 0.0


def test_an_even_mask_is_not_concentrated():
    torch.manual_seed(0)
    row = matrix_report("w.weight", torch.randn(50, 40), rank=40, k=2000)
    assert row.rows == row.columns == pytest.approx(0.1) and row.density == row.overlap == row.captured == 1.0
    assert "all" in table([row]) and "2000" not in table([row])


def test_the_map_shows_where_the_entries_lie():
    u, v = torch.ones(40), torch.ones(200)
    u[10:12], v[100:104] = 10.0, 10.0
    found = density_map(torch.outer(u, v), rank=1, k=8, size=20)
    expected = torch.zeros(20, 20)
    expected[5, 10] = 8 / 20  # a cell is 2 x 10 entries
    torch.testing.assert_close(found, expected)


def test_command_line_writes_a_report_and_a_picture(tmp_path, capsys):
    tiny = save_tiny(tmp_path / "tiny")
    out = tmp_path / "out"
    assert main(["mask", str(tiny), "--density", "0.1", "--rank", "4", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert len(report["matrices"]) == 14 and report["rank"] == 4
    assert {row["layer"] for row in report["matrices"]} == {0, 1}
    assert {row["projection"] for row in report["matrices"]} >= {"self_attn.q_proj", "mlp.down_proj"}
    for row in report["matrices"]:
        assert row["density"] == pytest.approx(0.1, abs=1e-3)
        assert (
            0.1 < row["rows"] < 1
            and 0.1 < row["columns"] < 1
            and 0.1 < row["overlap"] < 1
            and 0.1 < row["captured"] < 1
        )
    mean = sum(row["overlap"] for row in report["matrices"]) / 14
    assert f"{mean:8.3f}" in next(line for line in printed.splitlines() if line.startswith("all"))
    png = (out / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10000
    assert main(["mask", str(tiny), "--budget-rank", "2", "--rank", "4", "--output", str(tmp_path / "budget")]) == 0
    matrices = json.loads((tmp_path / "budget" / "report.json").read_text())["matrices"]
    assert {row["entries"] for row in matrices if row["projection"] == "mlp.up_proj"} == {2 * (32 + 64)}
    assert main(["mask", str(tiny), "--output", str(out)]) == 2
    assert "already holds a report" in capsys.readouterr().err


def test_command_line_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    tiny = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, message in [
        ([str(tiny), "--density", "0"], "density is 0.0"),
        ([str(tiny), "--rank", "0"], "rank is 0"),
        ([str(tmp_path / "none.gguf")], "neither an existing directory"),
        (["nobody/no-such-model"], "check the name and the network"),
    ]:
        assert main(["mask", *arguments, "--output", str(tmp_path / "out")]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0]
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tiny / "model.safetensors", {"format": "pt"})
    assert main(["mask", str(tiny), "--output", str(tmp_path / "out")]) == 2
    assert "model.layers.0.mlp.up_proj.weight: 1 non-finite weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stack_of_experts_counts_as_its_matrices():
    torch.manual_seed(0)
    stack, matrix = torch.randn(3, 8, 12), torch.randn(6, 5)
    weights = {"layers.0.experts.up_proj": stack, "layers.0.q_proj.weight": matrix}
    rows, picture = report_of(weights, density=0.25, rank=2)
    assert [row.name for row in rows] == [
        *(f"layers.0.experts.up_proj[{i}]" for i in range(3)),
        "layers.0.q_proj.weight",
    ]
    assert [row.projection for row in rows] == ["experts.up_proj"] * 3 + ["q_proj"]
    assert rows[1] == matrix_report("layers.0.experts.up_proj[1]", stack[1], rank=2, k=24)
    captured = draw(rows, picture, "title").axes[2].images[0].get_array()
    assert captured[0, 0] == pytest.approx(sum(row.captured for row in rows[:3]) / 3)
    assert len({row.captured for row in rows[:3]}) == 3 and captured[1, 0] == pytest.approx(rows[3].captured)
