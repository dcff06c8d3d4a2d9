"""Bad 8-bit moments, low halves of masters and packed weights raise and change nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import backends
from helpers.bad_arguments import meta, nothing, replaced, strided
from helpers.bits import BF16, FP16, FP32, assert_same_bits
from helpers.state_forms import make_forms

from lift_kernels import ops

BACKENDS = backends.STATE_FORMS
ALL = {"coded": True, "split": True}
CODED, SPLIT, PACKED = {"coded": True}, {"split": True}, {"packed_weights": True}
SIZES = [((13, 17), 40), ((9, 8), 72)]


def without_scales(problem):
    problem.exp_avg_scale = problem.exp_avg_sq_scale = None


def with_scales_of_others(problem):
    problem.exp_avg, problem.exp_avg_sq = problem.exp_avg.float(), problem.exp_avg_sq.float()


def moments_swapped(problem):
    problem.exp_avg, problem.exp_avg_sq = problem.exp_avg_sq, problem.exp_avg


def dense_again(problem):
    problem.weights = [weight.repeat(2) for weight in problem.weights]
    problem.grads = [grad.repeat(2) for grad in problem.grads]


def weights_of(dtype):
    def spoil(problem):
        problem.weights = [weight.to(dtype) for weight in problem.weights]

    return spoil


# name: (forms, function that spoils the state, error, part of the message)
BAD_STATES = {
    "no scales": (CODED, without_scales, ValueError, "exp_avg_scale is needed for 8-bit moments"),
    "one scale missing": (
        CODED,
        lambda p: setattr(p, "exp_avg_sq_scale", None),
        ValueError,
        "exp_avg_sq_scale is needed for 8-bit moments, and for no others; the moments are torch.int8",
    ),
    "scales of fp32 moments": (
        CODED,
        with_scales_of_others,
        ValueError,
        "for no others; the moments are torch.float32",
    ),
    "scales too few": (
        CODED,
        replaced("exp_avg_scale", lambda t: t[1:].clone()),
        ValueError,
        r"exp_avg_scale .*\(\d+,\)",
    ),
    "scales too many": (
        CODED,
        replaced("exp_avg_sq_scale", lambda t: t.repeat(2)),
        ValueError,
        "exp_avg_sq_scale must",
    ),
    "scales strided": (CODED, replaced("exp_avg_scale", strided), ValueError, "exp_avg_scale must be contiguous"),
    "scales elsewhere": (CODED, replaced("exp_avg_scale", meta), ValueError, "exp_avg_scale must .*meta"),
    "scales bf16": (
        CODED,
        replaced("exp_avg_sq_scale", torch.Tensor.bfloat16),
        TypeError,
        "exp_avg_sq_scale .*bfloat16",
    ),
    "codes both signed": (
        CODED,
        replaced("exp_avg_sq", lambda t: t.view(torch.int8)),
        TypeError,
        "int8 and uint8 codes, got torch.int8 and torch.int8",
    ),
    "codes both unsigned": (
        CODED,
        replaced("exp_avg", lambda t: t.view(torch.uint8)),
        TypeError,
        "got torch.uint8 and torch.uint8",
    ),
    "codes swapped": (CODED, moments_swapped, TypeError, "got torch.uint8 and torch.int8"),
    "codes of the second moment alone": (
        CODED,
        replaced("exp_avg", torch.Tensor.float),
        TypeError,
        "got torch.float32 and torch.uint8",
    ),
    "codes too short": (
        CODED,
        replaced("exp_avg", lambda t: t[1:].clone()),
        ValueError,
        "exp_avg must be a contiguous",
    ),
    "segment within a group": (
        CODED,
        replaced("offsets", lambda o: o + 8, 1),
        ValueError,
        r"segment 1 starts at \d+; with 8-bit moments it must be a multiple of 32",
    ),
    "low halves beside fp32": (SPLIT, weights_of(FP32), TypeError, "low halves needs bfloat16 weights, got .*float32"),
    "low halves beside fp16": (SPLIT, weights_of(FP16), TypeError, "low halves needs bfloat16 weights, got .*float16"),
    "low halves unsigned": (
        SPLIT,
        replaced("master", lambda t: t.view(torch.uint16)),
        TypeError,
        "master must be torch.float32, or torch.int16 low halves, got torch.uint16",
    ),
    "low halves too few": (
        SPLIT,
        replaced("master", lambda t: t[1:].clone()),
        ValueError,
        "master must be a contiguous",
    ),
    "low halves elsewhere": (SPLIT, replaced("master", meta), ValueError, "master must be .*meta"),
}
# The same for steps alone, with options of the call.
BAD_STEPS = {
    "packed weights, dense gradients": (
        PACKED,
        nothing,
        {"packed_grads": False},
        ValueError,
        "needs packed_grads=True",
    ),
    "packed weights that are matrices": (
        {"packed": True},
        nothing,
        {"packed_weights": True},
        ValueError,
        "packed weight 0 has 221 entries, its index list 40",
    ),
    "packed weights and gradients too long": (PACKED, dense_again, {}, ValueError, "packed gradient 0 has 80 entries"),
    "one packed weight too long": (
        PACKED,
        replaced("weights", lambda w: w.repeat(2), 1),
        {},
        ValueError,
        "packed weight 1 has 144 entries, its index list 72",
    ),
    "packed weight strided": (PACKED, replaced("weights", strided, 1), {}, ValueError, "weight 1 must be contiguous"),
    "noise on low halves": (SPLIT, nothing, {"stochastic": True}, ValueError, "no master"),
}


@pytest.mark.parametrize("by_default", [False, True], ids=["asked for", "by default"])
@pytest.mark.parametrize("forms, spoil, error, message", BAD_STATES.values(), ids=BAD_STATES)
def test_steps_with_bad_forms(backend, forms, spoil, error, message, by_default):
    """By default and without gradients the call goes past the dispatcher."""
    check_step(backend, forms, spoil, {}, error, message, by_default)


@pytest.mark.parametrize("by_default", [False, True], ids=["asked for", "by default"])
@pytest.mark.parametrize("forms, spoil, options, error, message", BAD_STEPS.values(), ids=BAD_STEPS)
def test_steps_with_bad_packed_weights(backend, forms, spoil, options, error, message, by_default):
    check_step(backend, forms, spoil, options, error, message, by_default)


def check_step(backend, forms, spoil, options, error, message, by_default):
    problem = make_forms(backend, SIZES, **forms)
    whole = problem.copy()
    problem.__dict__.update(vars(whole))  # the same tensors, in lists and fields that may be spoiled
    spoil(problem)
    before = whole.state()
    options = ({"backend": None} if by_default else {}) | options
    with pytest.raises(error, match=message), torch.set_grad_enabled(not by_default):
        problem.step(backend, advance=False, **options)
    assert_same_bits(whole.state(), before)


@pytest.mark.parametrize("by_default", [False, True], ids=["asked for", "by default"])
@pytest.mark.parametrize("forms, spoil, error, message", BAD_STATES.values(), ids=BAD_STATES)
def test_migrations_of_bad_forms(backend, forms, spoil, error, message, by_default):
    problem = make_forms(backend, SIZES, **forms)
    whole = problem.copy()
    problem.__dict__.update(vars(whole))
    spoil(problem)
    before = whole.state() | {"indices": whole.indices.clone()}
    lists = [torch.tensor([1, 2, 5], dtype=torch.int32, device=backend.device) for _ in problem.weights]
    arena = problem.indices, problem.offsets, problem.counts, problem.exp_avg, problem.exp_avg_sq, problem.steps
    names = ("master", "exp_avg_scale", "exp_avg_sq_scale")
    state = {name: getattr(problem, name) for name in names}
    with pytest.raises(error, match=message), torch.set_grad_enabled(not by_default):
        ops.arena_migrate_(problem.weights, lists, *arena, **state, backend=None if by_default else backend.name)
    assert_same_bits(whole.state() | {"indices": whole.indices.clone()}, before)


def test_validation_leaves_the_positions_of_packed_weights_alone(backend):
    """Only segments are checked: positions are in a matrix that the op does not see."""
    problem = make_forms(backend, SIZES, packed_weights=True, weight=BF16, **ALL)
    problem.indices[problem.segment(1)] += 1000
    problem.step(backend, validate=True)
    problem.offsets[1] = problem.offsets[0] + 32
    with pytest.raises(ValueError, match="overlaps the segment"):
        problem.step(backend, validate=True)
