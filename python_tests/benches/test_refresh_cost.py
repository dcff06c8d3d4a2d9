"""bench/refresh_cost.py: what it counts of a warm refresh, against closed formulas."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import refresh_cost
from bench.common.launch_cost import totals
from bench.common.predicted_time import predicted_seconds
from bench.refresh_cost import PARTS, SHAPES, WAYS, merged, rows_of, verdict, warm_refresh

RANK, WIDTH = 16, 24  # WIDTH: columns of a warm basis
SMALL = {(640, 512): 3, (512, 640): 2}
NUMEL, LONG, SHORT = 640 * 512, 640, 512


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def sums(weights):
    """The sums of a small model, whose matrices of each shape are one batch, by way."""
    return {way: totals(warm_refresh(SMALL, RANK, refresh_cost.DTYPES[weights], way)) for way in WAYS}


def test_the_checks_and_copies_of_the_weights(weights, sums):
    """`aminmax` of each matrix, and one copy in its own dtype."""
    element = 2 if weights == "bf16" else 4
    extremes = 2 * 5 * element  # written, and stacked
    stacked = 2 * 5 * 4 if weights == "fp32" else 2 * 5 * 2
    converted = 0 if weights == "fp32" else 2 * 5 * (2 + 4)
    read = 2 * 5 * 4  # copied to the host
    for way in WAYS:
        part = {q: n for (p, q), n in sums[way].items() if p == "copies and checks of weights"}
        assert part["bytes"] == 5 * NUMEL * 3 * element + 2 * extremes + stacked + converted + read
        copies = 5 + 2 if weights == "bf16" else 5  # each matrix, and the extremes
        assert part["launches"] == 5 + 2 + copies + 2 and part["waits"] == 2


def test_the_products_with_whole_matrices(weights, sums):
    """A X, A^T Y and A X of the next degree.

    In TF32 an exact product with r columns follows. In bf16, X is two terms and A X has a column
    for each.
    """
    for way in WAYS:
        part = {q: n for (p, q), n in sums[way].items() if p == "whole matrices"}
        if weights == "fp32":
            moved = 4 * (3 * (NUMEL + (LONG + SHORT) * WIDTH) + NUMEL + (LONG + SHORT) * RANK)
            flops = {"tf32_flops": 5 * 3 * 2 * NUMEL * WIDTH, "fp32_flops": 5 * 2 * NUMEL * RANK}
        else:
            moved = 2 * (2 * NUMEL + (2 * SHORT + 4 * LONG) * 2 * WIDTH) + 2 * NUMEL + (2 * LONG + 4 * SHORT) * WIDTH
            flops = {"bf16_flops": 5 * (2 + 1 + 2) * 2 * NUMEL * WIDTH}
        assert part == {"launches": 2 * (4 if weights == "fp32" else 3), "bytes": 5 * moved, **flops}


def test_the_eigenproblems(sums):
    for way in WAYS:
        part = {q: n for (p, q), n in sums[way].items() if p == "eigenproblems"}
        moved = 4 * 5 * (2 * WIDTH**2 + WIDTH)
        assert part == {"launches": 2, "waits": 2, "bytes": moved, "eigenproblems": 5, "eigenproblem_calls": 2}


def test_the_flops_of_the_tall_blocks(weights, sums):
    """Quotients and Ritz values in TF32, the rotation and the steps of the iteration in fp32.

    bf16 weights need no further product. Their image is rotated instead.
    """
    fp32 = 2 * SHORT * WIDTH * WIDTH + (2 * LONG * WIDTH * RANK if weights == "bf16" else 0)
    references, cuda_ops = (sums[way] for way in ("references", "cuda ops"))
    for part in (references, cuda_ops):
        assert part["tall blocks", "tf32_flops"] == 5 * 2 * (2 * LONG * WIDTH**2)
    # The start is orthonormalized, and one step made: two Gram matrices, R^-1 times three blocks.
    by_ops = 5 * (2 * 2 * SHORT * 64**2 + 3 * 2 * SHORT * 64**2 + 2 * 2 * WIDTH**3 / 3)
    assert cuda_ops["tall blocks", "fp32_flops"] == pytest.approx(5 * fp32 + by_ops)
    by_references = 5 * (2 * 2 * SHORT * WIDTH**2 + 3 * SHORT * WIDTH**2 + 2 * WIDTH**3 / 3)
    assert references["tall blocks", "fp32_flops"] == pytest.approx(5 * fp32 + by_references)


def test_the_selection_and_the_migration(weights, sums):
    k = round(0.05 * NUMEL)
    blocks = 5 * -(-k // 1024)
    arenas = 3 if weights == "bf16" else 2  # moments, and masters
    for way in WAYS:
        found = sums[way]
        # Tiles of 128 x 64; both shapes fill them.
        assert found["selection", "tf32_flops"] == 5 * 3 * 2 * NUMEL * RANK
        assert found["selection", "waits"] == 2 * 2
        # What the kernels move, tables aside, which are 32 bytes a block and 32 a matrix.
        moved = blocks * 1024 * (12 + arenas * (12 + 8) + 8)
        tables = blocks * 32 * (2 + 2 * arenas) + 5 * 32
        counts = 5 * 8 + 2 * 5 * 8 + 5 * 8  # zeros, a stack, and its copy to the host
        assert found["migration", "bytes"] == moved + tables + counts
        assert found["migration", "launches"] == 1 + 1 + 1 + 2 * arenas + 1 + 2 and found["migration", "waits"] == 1


def test_cuda_ops_move_less_in_fewer_launches(sums):
    references, cuda_ops = (sums[way] for way in ("references", "cuda ops"))
    for quantity in ("launches", "bytes", "waits"):
        assert cuda_ops["tall blocks", quantity] < 0.8 * references["tall blocks", quantity]
    rest = [key for key in references if key[0] != "tall blocks"]
    assert {key: references[key] for key in rest} == {key: cuda_ops[key] for key in rest}


def test_a_refresh_that_is_not_usual_is_an_error():
    """Small matrices are factored by the exact method."""
    with pytest.raises(RuntimeError, match="not a warm refresh of one degree: .*method='gram'"):
        warm_refresh({(200, 100): 2}, RANK, torch.bfloat16, "cuda ops")


def test_rows_add_up_and_say_how_weights_are_multiplied():
    steps = warm_refresh(SMALL, RANK, torch.bfloat16, "cuda ops")
    rows = rows_of(steps, "a model", RANK, "bf16", "cuda ops")
    assert [row["part"] for row in rows] == [*PARTS, "all"]
    assert {(row["model"], row["rank"], row["weights"], row["way"]) for row in rows} == {
        ("a model", RANK, "bf16", "cuda ops")
    }
    assert float(rows[-1]["launches"]) == sum(float(row["launches"]) for row in rows[:-1])
    assert float(rows[-1]["launches"]) == sum(step.work is not None for step in steps)
    assert float(rows[-1]["predicted_ms"]) == pytest.approx(1e3 * sum(predicted_seconds(steps).values()), rel=1e-3)
    by_bf16 = any(step.part == "whole matrices" and step.work.bf16 for step in steps)
    assert {row["products"] for row in rows} == {"bf16" if by_bf16 else "fp32 copies"}


def test_the_verdict_names_the_target():
    row = {"model": "M", "weights": "bf16", "products": "bf16", "way": "cuda ops"}
    assert verdict([row | {"predicted_ms": "1"}, row | {"predicted_ms": "146.2"}]) == (
        "A warm refresh of M, bf16 weights multiplied in bf16, cuda ops: 146 ms predicted, under 0.5 s"
    )
    assert verdict([row | {"predicted_ms": "500"}]).endswith(": 500 ms predicted, not under 0.5 s")


def test_new_rows_replace_those_of_their_own_kind():
    same = {"model": "M", "rank": "128", "weights": "bf16", "products": "bf16", "way": "cuda ops"}
    old = [same | {"part": "a", "commit": "1"}, same | {"products": "fp32 copies", "commit": "1"}]
    new = [same | {"rank": 128, "part": "a", "commit": "2"}]
    assert merged(old, new) == [old[1], new[0]]


def test_the_command_writes_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refresh_cost, "SHAPES", SMALL)
    monkeypatch.setattr(refresh_cost, "DTYPES", {"fp32": torch.float32})
    path = tmp_path / "cost.csv"
    arguments = ["refresh_cost", "--rank", str(RANK), "--csv", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    refresh_cost.main()
    refresh_cost.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(WAYS) * (len(PARTS) + 1) and {row["rank"] for row in rows} == {str(RANK)}
    assert all(row["commit"] for row in rows)
    assert capsys.readouterr().out.count("predicted, under 0.5 s") == 2 * len(WAYS)


@pytest.mark.slow
def test_a_refresh_of_the_whole_model():
    """LLaMA-2-7B, whose 224 matrices make 4 + 5 + 3 batches in fp32, and 3 + 3 + 2 in bf16."""
    steps = warm_refresh(SHAPES, 128, torch.float32, "cuda ops")
    found, numel = totals(steps), sum(m * n * count for (m, n), count in SHAPES.items())
    assert numel == 6_476_005_376 and sum(SHAPES.values()) == 224
    assert found["whole matrices", "tf32_flops"] == 3 * 2 * numel * 192
    assert found["whole matrices", "fp32_flops"] == 2 * numel * 128
    assert found["copies and checks of weights", "bytes"] == pytest.approx(12 * numel, rel=1e-6)
    assert found["selection", "tf32_flops"] == 3 * 2 * numel * 128
    assert (found["eigenproblems", "eigenproblems"], found["eigenproblems", "eigenproblem_calls"]) == (224, 12)
    assert sum(predicted_seconds(steps).values()) < refresh_cost.TARGET
    in_bf16 = warm_refresh(SHAPES, 128, torch.bfloat16, "cuda ops")
    found = totals(in_bf16)
    assert found["whole matrices", "bf16_flops"] == 5 * 2 * numel * 192 and not found["whole matrices", "tf32_flops"]
    assert found["copies and checks of weights", "bytes"] == pytest.approx(6 * numel, rel=1e-6)
    assert (found["eigenproblems", "eigenproblems"], found["eigenproblems", "eigenproblem_calls"]) == (224, 8)
    assert sum(predicted_seconds(in_bf16).values()) < 0.75 * sum(predicted_seconds(steps).values())
