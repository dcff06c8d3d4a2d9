"""Errors in the middle of a step or a refresh leave weights, lists, state and launches together."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.optimizers import OPTIONS, assert_refused, make_weights, set_gradients, train

from lift_kernels import LiftAdamW


def mixed(**options):
    """Two fp32 matrices and a bf16 one, in two groups and two arenas, after a step."""
    weights = [torch.nn.Parameter(w) for w in make_weights(((16, 16), (16, 16)), torch.float32)]
    weights += [torch.nn.Parameter(w) for w in make_weights(((16, 16),), torch.bfloat16)]
    optimizer = LiftAdamW([{"params": weights[:2]}, {"params": weights[2:]}], **OPTIONS | options)
    train(optimizer, range(1))
    set_gradients(weights, 1)
    return optimizer, weights


def reshape_gradient(w):
    w.grad.data = torch.ones(8, 16, dtype=w.dtype)


def transpose(w):
    w.data = w.data.t()


def read_as_fp16(w):
    w.grad = None
    w.data = w.data.view(torch.float16)
    w.grad = torch.ones_like(w)


@pytest.mark.parametrize("spoil", [reshape_gradient, transpose, read_as_fp16])
def test_what_spoils_the_second_group_leaves_the_first_as_it_was(spoil):
    """No address and no version counter tells of these changes."""
    optimizer, weights = mixed()
    spoil(weights[2])
    assert_refused(optimizer, (ValueError, TypeError), "parameter 0 of group 1", optimizer.step)


def assert_lists_are_trained(optimizer, weights):
    """A step changes exactly the entries that the state shows, and the state is what is saved."""
    before = [w.detach().clone() for w in weights]
    set_gradients(weights, 7)
    for w in weights:
        w.grad.copy_(torch.ones_like(w))
    optimizer.step()
    for w, old in zip(weights, before):
        assert torch.equal((w != old).view(-1).nonzero().view(-1).int(), optimizer.state[w]["indices"])


def test_a_refresh_that_fails_in_one_arena_leaves_the_others():
    optimizer, weights = mixed(refresh_interval=None, lr=0.5)
    optimizer.param_groups[0]["density"] = 0.4
    kept = weights[2].data
    weights[2].grad, weights[2].data = None, kept.half()
    assert_refused(optimizer, TypeError, "parameter 0 of group 1", optimizer.refresh)
    weights[2].data = kept
    assert_lists_are_trained(optimizer, weights)


@pytest.mark.parametrize("at", range(7))
def test_memory_that_runs_out_in_a_refresh_spoils_nothing(at, monkeypatch):
    """The arenas, what is shown of them and what the next step writes stay together."""
    optimizer, weights = mixed(refresh_interval=None, lr=0.5)
    for group in optimizer.param_groups:
        group["density"] = 0.4
    zeros, calls = torch.zeros, []

    def scarce(*args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise torch.OutOfMemoryError("no memory")
        return zeros(*args, **kwargs)

    monkeypatch.setattr("lift_kernels.optim.packed_state.torch.zeros", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.refresh()
    monkeypatch.undo()
    assert_lists_are_trained(optimizer, weights)
    for w, entry in zip(weights, optimizer.state_dict()["state"].values()):
        assert torch.equal(entry["exp_avg"], optimizer.state[w]["exp_avg"]) and entry["exp_avg"].abs().min() > 0


def test_a_failed_migration_keeps_the_lengths(monkeypatch):
    optimizer, weights = mixed(refresh_interval=None, lr=0.5)
    optimizer.param_groups[0]["density"] = 0.4

    def fails(*args, **kwargs):
        raise RuntimeError("no backend")

    monkeypatch.setattr("lift_kernels.ops.arena_migrate_", fails)
    assert_refused(optimizer, RuntimeError, "no backend", optimizer.refresh)
    monkeypatch.undo()
    assert_lists_are_trained(optimizer, weights)


def test_a_failed_step_keeps_no_gradients():
    optimizer, weights = mixed()
    gradients = [weakref.ref(w.grad) for w in weights]
    kept = weights[2].data
    grad = weights[2].grad
    weights[2].grad, weights[2].data = None, kept.half()
    weights[2].grad = grad.half()
    gradients[2] = weakref.ref(weights[2].grad)
    del grad
    with pytest.raises(TypeError, match="parameter 0 of group 1"):
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [gradient() for gradient in gradients] == [None] * 3


def test_the_state_is_shown_again_after_it_was_cleared():
    optimizer, weights = mixed(refresh_interval=None)
    optimizer.state.clear()
    optimizer.refresh()
    assert all("indices" in entry for entry in optimizer.state_dict()["state"].values())
    assert len(optimizer.state) == 3


def test_a_matrix_with_a_mask_cannot_become_dense():
    """torch's AdamW would read and write beyond the moments of the trained entries."""
    optimizer, weights = mixed()
    optimizer.param_groups[0]["lift"] = False
    assert_refused(optimizer, RuntimeError, "parameter 0 of group 0 has a mask", optimizer.step)
    optimizer.param_groups[0]["lift"] = None
    optimizer.step()


def test_a_callable_may_return_views_and_parts():
    """Also of the very lists that the refresh replaces, and of those of another matrix."""
    weights = [torch.nn.Parameter(w) for w in make_weights(((16, 16), (16, 16)), torch.float32)]
    first = [torch.arange(0, 40, dtype=torch.int32)[::2], torch.arange(1, 41, dtype=torch.int32)[::2]]
    lists = iter([*first, 1, 0])

    def selection(weight, k):
        chosen = next(lists)
        return chosen if isinstance(chosen, torch.Tensor) else optimizer.state[weights[chosen]]["indices"]

    optimizer = LiftAdamW(weights, **OPTIONS | {"selection": selection, "refresh_interval": None})
    train(optimizer, range(1))
    optimizer.refresh()
    for w, expected in zip(weights, reversed(first)):
        assert torch.equal(optimizer.state[w]["indices"], expected)
