"""Steps that are captured in a CUDA graph and replayed, with refreshes in between.

Each run equals one without a graph to the bit. The tests need a GPU, or Triton's interpreter, where
`helpers.graphs` emulates the graph.
"""

from __future__ import annotations

import pytest
import torch
from helpers.graph_training import CASES, Training, assert_same_run, loss_of, set_gradients
from helpers.graphs import CpuGraph, CudaGraph

from lift_kernels.ops import bias_correction, dispatch
from lift_kernels.ops.triton import launch_tables

pytestmark = pytest.mark.interpreter if dispatch.interpreting() else pytest.mark.gpu
DEVICE, Graph = ("cpu", CpuGraph) if dispatch.interpreting() else ("cuda", CudaGraph)


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_step_equals_an_eager_one(name):
    """Gradients are written in place, and masks are renewed between the replays."""
    assert_same_run(CASES[name], DEVICE, Graph())


def test_what_a_capture_counts_can_be_saved_before_the_first_replay():
    """Flags of skipped steps are added up on the device, where a capture computes nothing."""
    training = Training("matrix", torch.float32, device=DEVICE)
    training.make_gradients()
    training.optimizer.found_inf = torch.zeros((), device=DEVICE)
    graph = Graph()
    with graph.warming_up():
        training.optimizer.step()
    graph.capture(training.optimizer.step)
    saved = training.optimizer.state_dict()
    assert saved["param_groups"][0]["steps_since_refresh"] == 2, "the captured step counts, though it does not run"


def test_a_capture_without_a_step_before_is_refused_and_leaves_no_trace():
    """The step that follows finds no table of the failed capture."""
    runs = [
        Training("matrix", torch.bfloat16, device=DEVICE, bias_correction="per_entry", betas=(0.81, 0.93))
        for _ in range(2)
    ]
    for run in runs:
        run.optimizer.refresh()  # the first masks
        run.make_gradients()
        set_gradients(run.gradients(), 0)
    refused, other = runs
    with pytest.raises(RuntimeError, match="run the step once before the capture|a table is built inside a capture"):
        Graph().capture(refused.optimizer.step)
    for run in runs:
        run.optimizer.step()
    refused.assert_same(other, "the step after the capture")


def test_tables_of_a_graph_stay_though_many_others_come():
    """Addresses and segments of other launches push out those that no graph reads."""
    kept = []

    def crowd_out():
        device = torch.device(DEVICE, torch.cuda.current_device()) if DEVICE == "cuda" else torch.device("cpu")
        x = torch.zeros(300, device=device)
        for i in range(300):
            kept.append(launch_tables.pointer_table([x[i:]], device).data)
            kept.append(launch_tables.block_table([i * 64], [7], 10**6, 64, device).data)
            kept.append(bias_correction.bias_table(0.5, 0.5 + i / 1000, device))

    assert_same_run(CASES["packed fp32, per entry"], DEVICE, Graph(), crowd_out)
    assert len(kept) == 900


@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_a_replayed_training_step_equals_an_eager_one(mode):
    """The forward and the backward pass are in the graph too, which read lists of packed layers."""
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
