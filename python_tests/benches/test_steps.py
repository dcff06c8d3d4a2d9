"""`bench.common.steps`: the baseline on a packed vector is AdamW, and the counts of lines."""

from __future__ import annotations

import csv
import os
import shutil

import pytest
import torch

from bench import bench_sparse_adamw
from bench.common import scattered_lines, steps
from bench.common.arenas import Arena, clustered_indices

SHAPES = (40, 80), (96, 64)


def problem(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], Arena]:
    """Weights, gradients, and masks of a tenth of the entries."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grads = [torch.randn(shape, generator=generator).mul_(0.1).to(dtype) for shape in SHAPES]
    return weights, grads, Arena.of([clustered_indices(*shape, 0.1, seed=i) for i, shape in enumerate(SHAPES)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_vector_is_trained_by_adamw(dtype, packed):
    """As AdamW trains fp32 copies of the whole matrices; other entries keep their bits."""
    weights, grads, arena = problem(dtype)
    whole = [weight.clone().float() for weight in weights]
    right = steps.dense_step(whole, [grad.float() for grad in grads], fused=True)
    before = [weight.clone() for weight in weights]
    step = steps.PackedVector(weights, grads, arena, packed)
    assert step.scatter in steps.SCATTERS and all(map(torch.equal, weights, before))
    for _ in range(3):
        if not packed:  # what was gathered last is overwritten
            step.values.grad.fill_(7.0)
        step()
        right()
    for weight, old, exact, index in zip(weights, before, whole, arena.lists()):
        trained = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, index.long(), True).view_as(weight)
        bound = 1e-6 if dtype == torch.float32 else 2**-8  # other places in a vector register, one rounding
        torch.testing.assert_close(weight[trained].float(), exact[trained], rtol=bound, atol=1e-7)
        assert int((weight[trained] != old[trained]).sum()) > 0
        assert torch.equal(weight[~trained], old[~trained])


def test_every_scatter_writes_the_same():
    weights, grads, arena = problem(torch.float32)
    step = steps.PackedVector(weights, grads, arena, packed=True)
    step.values.data.add_(1.0)
    found = []
    for step.scatter in steps.SCATTERS:
        step.write()
        found.append([weight.clone() for weight in weights])
        for weight in weights:
            weight.zero_()
    first = found[0]
    for weight, index in zip(first, arena.lists()):
        index = index.long()
        assert len(index) == round(0.1 * weight.numel()) and bool((weight.view(-1)[index] != 0).all())
    for other in found[1:]:
        for weight, same, index in zip(first, other, arena.lists()):
            assert torch.equal(weight.view(-1)[index.long()], same.view(-1)[index.long()])


def test_lines_are_counted_once():
    """64 bytes hold 16 fp32 entries: positions 0, 1 and 16 lie on two lines of a matrix."""
    weight = torch.zeros(8, 8)
    arena = Arena.of([torch.tensor([0, 1, 16], dtype=torch.int32)])
    for packed, lines in ((True, 2), (False, 4)):
        assert steps.SparseStep([weight], [weight.clone()], arena, packed=packed).scattered_lines() == lines


@pytest.mark.parametrize("threads", [1, 3])
def test_each_scattered_line_is_visited_once(threads, monkeypatch):
    """Every visit adds 1 to the first word of a line. Gradients are only read."""
    if not scattered_lines.usable():
        assert shutil.which(os.environ.get("CXX", "g++")) is None
        return
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights = [torch.randn(40, 50), torch.randn(3, 16), torch.randn(64, 64)]
    grads = [w.clone() for w in weights]
    lists = [torch.randperm(w.numel())[: w.numel() // 9].sort().values.int() for w in weights]
    lines = scattered_lines.ScatteredLines(weights, grads, Arena.of(lists))
    assert lines.count == 2 * sum(len((index // 16).unique()) for index in lists)
    lines()
    for weight, grad, seen, index in zip(weights, grads, lines.tensors, lists):
        expected = torch.zeros(weight.numel())
        expected[(index // 16).unique().long() * 16] = 1
        assert torch.equal(seen.view(-1), expected) and torch.equal(weight, grad)
    alone = scattered_lines.ScatteredLines(weights, None, Arena.of(lists))
    assert 2 * alone.count == lines.count


@pytest.mark.native
def test_rows_of_the_step(tmp_path):
    """Speed against a packed vector, lines a second, and refreshes that skip masks that stay."""
    (tmp_path / "drift.csv").write_text("interval,refreshed_share\n100,0.25\n200,0.15\n300,\n")
    assert bench_sparse_adamw.main(["--dry-run", "--dtypes", "fp32", "--out", str(tmp_path)]) == 0
    with (tmp_path / "sparse_adamw.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    for packed in (False, True):
        ours, vector = rows[bench_sparse_adamw.sparse_name(packed, "")], rows[bench_sparse_adamw.VECTOR[packed]]
        assert float(ours["times_packed_vector"]) > 0 and vector["scatter"] in steps.SCATTERS
        lines = float(ours["lines_per_s"]) * float(ours["median_ms"]) / 1e3
        assert lines == pytest.approx(round(lines), rel=1e-3) and 0 < lines <= (1 if packed else 2) * 584
        skipping, warm = (float(rows[f"{ours['variant']} + {name}"]["median_ms"]) for name in WARM)
        assert 0 < skipping - float(ours["median_ms"]) < warm - float(ours["median_ms"])
    assert rows["AdamW fused"]["lines_per_s"] == ""


WARM = "refresh/100, skipping", "refresh/100"


def test_the_share_that_is_refreshed(tmp_path):
    tmp_path = tmp_path / "a level"
    tmp_path.mkdir()
    assert bench_sparse_adamw.refreshed_share(None) is None
    assert bench_sparse_adamw.refreshed_share(tmp_path) is None
    (tmp_path / "drift.csv").write_text("interval,other\n100,0.25\n")
    assert bench_sparse_adamw.refreshed_share(tmp_path) is None
    (tmp_path / "drift.csv").write_text("interval,refreshed_share\n100,0.25\n200,0.15\n")
    assert bench_sparse_adamw.refreshed_share(tmp_path) == pytest.approx(0.2)
    assert bench_sparse_adamw.refreshed_share(tmp_path.parent / "another level") == pytest.approx(0.2)
