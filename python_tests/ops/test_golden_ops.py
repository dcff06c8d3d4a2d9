"""The published optimizer's numbers, replayed with the ops alone.

They cover steps on given masks, and migration at each refresh.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lift_kernels import ops

DATA = Path(__file__).parents[1] / "data"


class Trace:
    """A golden trace (see data/README.md): settings by name, tensors by call."""

    def __init__(self, name: str, device: str):
        safe_open = pytest.importorskip("safetensors").safe_open
        with safe_open(DATA / f"{name}.safetensors", "pt", device=device) as file:
            settings = {key: json.loads(value) for key, value in file.metadata().items()}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.shapes, self.steps, self.lr = settings["shapes"], settings["steps"], settings["lr"]
        self.refresh_interval, self.budget_rank = settings["refresh_interval"], settings["budget_rank"]
        self.options = {"betas": settings["betas"], "eps": settings["eps"], "weight_decay": settings["weight_decay"]}

    def __call__(self, *name) -> list[torch.Tensor]:
        """The tensors ``name.i`` of all matrices."""
        return [self.tensors[".".join(map(str, (*name, i)))] for i in range(len(self.shapes))]

    def indices(self, step: int) -> list[torch.Tensor]:
        return [mask.view(-1).nonzero().flatten().int() for mask in self("mask", step)]


def assert_golden(actual: torch.Tensor, golden: torch.Tensor, label: str) -> None:
    assert actual.shape == golden.shape, label
    error, admitted = (actual - golden).abs().max().item(), 1e-6 * golden.abs().max().item()
    assert error <= admitted, f"{label}: error {error}, admitted {admitted}"


@pytest.mark.parametrize("name", ["trace_a", "trace_b"])
def test_golden_ops(backend, name):
    trace = Trace(name, backend.device)
    weights = [weight.clone() for weight in trace("w0")]
    lists = trace.indices(0)
    moments = [[torch.zeros(len(index), device=backend.device) for index in lists] for _ in range(2)]
    refreshes = 0
    for t in range(1, trace.steps + 1):
        counts = [len(index) for index in lists]
        assert counts == [min((m + n) * trace.budget_rank, m * n) for m, n in trace.shapes]
        arenas = [torch.cat(parts) for parts in (lists, *moments)]
        ops.sparse_adamw_(
            weights,
            trace("grad", t),
            arenas[0],
            [0, counts[0]],
            counts,
            *arenas[1:],
            torch.full((2,), float(t), device=backend.device),
            trace.lr,
            validate=True,
            backend=backend.name,
            **trace.options,
        )
        moments = [list(arena.split(counts)) for arena in arenas[1:]]
        for i, golden in enumerate(trace("w", t)):
            assert_golden(weights[i], golden, f"weight {i} after step {t}")
        if (t + 1) % trace.refresh_interval == 0 and f"mask.{t}.0" in trace.tensors:
            old, lists = lists, trace.indices(t)
            moments = [
                [ops.packed_migrate(*each, validate=True, backend=backend.name) for each in zip(kind, old, lists)]
                for kind in moments
            ]
            refreshes += 1
    assert refreshes == sum(key.startswith("mask.") for key in trace.tensors) // 2 - 1 >= 2, (
        "each recorded mask was used"
    )
    for kind, names in zip(moments, ("m", "v")):
        for i, golden in enumerate(trace(names)):
            assert_golden(kind[i], golden, f"{names} of matrix {i}")


@pytest.mark.parametrize("name", ["trace_a", "trace_b"])
def test_golden_ops_move_selected_entries_only(backend, name):
    """A check of the traces themselves: the tolerance above could hide this on small weights."""
    trace = Trace(name, backend.device)
    weight, index = trace("w0")[1].clone(), trace.indices(0)[1]
    ops.sparse_adamw_(
        [weight],
        trace("grad", 1)[1:],
        index,
        [0],
        [len(index)],
        torch.zeros(len(index), device=backend.device),
        torch.zeros(len(index), device=backend.device),
        torch.ones(1, device=backend.device),
        trace.lr,
        backend=backend.name,
        **trace.options,
    )
    moved = (weight != trace("w0")[1]).view(-1).nonzero().flatten()
    assert torch.equal(moved, (trace("w", 1)[1] != trace("w0")[1]).view(-1).nonzero().flatten())
