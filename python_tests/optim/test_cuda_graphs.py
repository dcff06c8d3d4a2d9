"""Steps that are captured in a CUDA graph and replayed, with refreshes in between.

Each run equals one without a graph to the bit. The tests need a GPU, or Triton's interpreter, where
`helpers.graphs` emulates the graph.
"""

from __future__ import annotations

import pytest
import torch
from helpers.graph_training import CASES, Training, assert_same_run, loss_of
from helpers.graphs import CpuGraph, CudaGraph

from lift_kernels.ops import dispatch

pytestmark = pytest.mark.interpreter if dispatch.interpreting() else pytest.mark.gpu
DEVICE, Graph = ("cpu", CpuGraph) if dispatch.interpreting() else ("cuda", CudaGraph)


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_step_equals_an_eager_one(name):
    """Gradients are written in place, and masks are renewed between the replays."""
    assert_same_run(CASES[name], DEVICE, Graph())


@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_a_replayed_training_step_equals_an_eager_one(mode):
    """The forward and the backward pass are in the graph too, so lists of packed layers are read."""
    graphed, eager = (Training(mode, torch.float32, device=DEVICE) for _ in range(2))
    x = torch.empty(12, 24, device=DEVICE)

    def step(training, set_to_none=False):
        training.optimizer.zero_grad(set_to_none)
        with torch.enable_grad():
            loss_of(training.model, x).backward()
        training.optimizer.step()

    graph, batches = Graph(), torch.randn(6, 12, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x.copy_(batches[0])
    with graph.warming_up():
        step(graphed)
    step(eager)
    kept = graphed.gradients()
    graph.capture(lambda: step(graphed))
    for number in range(1, 6):
        x.copy_(batches[number])
        graph.replay()
        step(eager)
        graphed.assert_same(eager, f"replay {number}")
        if number in (2, 4):
            graphed.refresh(kept)
            eager.refresh(eager.gradients())
    assert graphed.changed, "no refresh exchanged an entry"
