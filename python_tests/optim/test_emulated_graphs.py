"""The emulated CUDA graph of `helpers.graphs`: what it does, and that it notices broken code.

Steps of the optimizer need Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from helpers.graph_training import CASES, Training, assert_same_run, set_gradients
from helpers.graphs import CpuGraph

from lift_kernels.ops import dispatch
from lift_kernels.optim.packed_state import PackedState

pytestmark = pytest.mark.interpreter
CASE = CASES["bf16 matrices, per entry, clipped"]


def test_nothing_takes_place_before_the_replay():
    x, y, doubled, graph = torch.ones(4), torch.zeros(4), [], CpuGraph()

    def step():
        doubled.append(x.view(2, 2) * 2)
        y.view(2, 2).add_(doubled[0])
        torch.add(x, y, out=x)

    graph.capture(step)
    assert (x.tolist(), y.tolist(), len(graph)) == ([1.0] * 4, [0.0] * 4, 3)
    assert doubled[0].isnan().all()
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([3.0] * 4, [2.0] * 4)
    x.fill_(10.0)
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([32.0] * 4, [22.0] * 4)


@pytest.mark.parametrize(
    "read", [lambda x: x[0].item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0], torch.unique]
)
def test_the_host_reads_nothing_in_a_capture(read):
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        CpuGraph().capture(lambda: read(torch.ones(4)))


if dispatch.interpreting():
    # These break the package on purpose.

    @pytest.mark.parametrize("buffer", ["indices", "exp_avg", "exp_avg_sq", "master", "births", "steps"])
    def test_a_buffer_that_a_refresh_makes_anew_is_noticed(buffer, monkeypatch):
        migrate = PackedState.migrate

        def elsewhere(arena, *args, **kwargs):
            setattr(arena, buffer, getattr(arena, buffer).clone())
            arena.layout += 1  # so that everything but the graph follows
            return migrate(arena, *args, **kwargs)

        monkeypatch.setattr(PackedState, "migrate", elsewhere)
        with pytest.raises(AssertionError, match=r"differs after (the refresh after )?replay [23]"):
            assert_same_run(CASE, "cpu", CpuGraph())

    def test_a_number_that_a_step_reads_is_noticed(monkeypatch):
        begin_step = PackedState.begin_step

        def waiting(arena, rows, found_inf=None):
            steps = begin_step(arena, rows, found_inf)
            assert steps[0].item() > 0
            return steps

        monkeypatch.setattr(PackedState, "begin_step", waiting)
        with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing: aten\._local_scalar_dense"):
            assert_same_run(CASE, "cpu", CpuGraph())

    def test_gradients_that_are_not_kept_in_place_are_noticed():
        training = Training("matrix", torch.float32, device="cpu")
        training.make_gradients()
        set_gradients(training.gradients(), 0)
        training.optimizer.step()
        kept = training.gradients()  # so that no address comes back
        training.make_gradients()
        with pytest.raises(RuntimeError, match="a table is built inside a capture"):
            CpuGraph().capture(training.optimizer.step)
        assert kept
