"""Bad input to the optimizer raises a clear error and changes nothing.

The message names the parameter and the value.
"""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from helpers.bits import BF16
from helpers.optimizers import OPTIONS, assert_refused, assert_same, make_weights, set_gradients, snapshot, train

from lift_kernels import LiftAdamW, lift_param_groups

NAMES = ("layers.0.up.weight", "layers.0.down.weight", "layers.0.norm.weight")
SHAPES = ((24, 40), (33, 17), (17,))


def make_named(**options):
    """Two matrices and a vector with an optimizer, after two steps."""
    weights = make_weights(SHAPES, options.pop("dtype", torch.float32))
    optimizer = LiftAdamW(list(zip(NAMES, weights)), **OPTIONS | options)
    train(optimizer, range(2))
    return optimizer, weights


OPTION_ERRORS = [
    ({"lr": -0.1}, ValueError, "lr must be .* got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be .* got nan"),
    ({"lr": "2e-4"}, ValueError, "lr must be .* got '2e-4'"),  # as YAML gives it
    ({"betas": 0.9}, ValueError, "betas must be two numbers .* got 0.9"),
    ({"betas": ("0.9", 0.95)}, ValueError, r"betas must be two numbers .* got \('0.9', 0.95\)"),
    ({"eps": "1e-8"}, ValueError, "eps must be .* got '1e-8'"),
    ({"weight_decay": None}, ValueError, "weight_decay must be .* got None"),
    ({"lr": torch.ones(2)}, ValueError, r"lr must hold one number, got shape \(2,\)"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas must be .* got \(0.9, 1.0\)"),
    ({"betas": (-0.1, 0.9)}, ValueError, r"betas must be .* got \(-0.1, 0.9\)"),
    ({"betas": (0.9,)}, ValueError, r"betas must be .* got \(0.9,\)"),
    ({"betas": (0.9, 0.9999999), "bias_correction": "per_entry"}, ValueError, r"betas .* got \(0.9, 0.9999999\)"),
    ({"eps": -1e-8}, ValueError, "eps must be .* got -1e-08"),
    ({"weight_decay": float("inf")}, ValueError, "weight_decay must be .* got inf"),
    ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be a finite number of at least 0, got -0.1"),
    ({"lr": torch.tensor(float("nan"))}, ValueError, "lr must be a finite number of at least 0, got nan"),
    ({"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
    ({"capturable": None}, TypeError, "capturable must be True or False, got None"),
    ({"rank": True}, ValueError, r"up\.weight: rank must be an integer .* got True"),
    ({"density": "0.1"}, ValueError, r"up\.weight: density must be in \(0, 1\], got '0.1'"),
    ({"rank": 0}, ValueError, r"up\.weight: rank must be .* got 0"),
    ({"rank": -3}, ValueError, r"up\.weight: rank must be an integer of at least 1 or None, got -3"),
    ({"rank": 2.5}, ValueError, r"up\.weight: rank must be an integer .* got 2.5"),
    ({"density": 0.0}, ValueError, r"up\.weight: density must be in \(0, 1\], got 0.0"),
    ({"density": 1.5}, ValueError, r"up\.weight: density must be in \(0, 1\], got 1.5"),
    ({"budget_rank": 0}, ValueError, r"up\.weight: budget_rank must be .* got 0"),
    ({"refresh_interval": 0}, ValueError, "refresh_interval must be .* got 0"),
    ({"refresh_interval": 2.5}, ValueError, "refresh_interval must be .* got 2.5"),
    ({"refresh_drift": -0.01}, ValueError, "refresh_drift must be .* got -0.01"),
    ({"refresh_drift": float("nan")}, ValueError, "refresh_drift must be .* got nan"),
    ({"refresh_drift": 1.5}, ValueError, "refresh_drift must be .* got 1.5"),
    ({"refresh_drift": True}, ValueError, "refresh_drift must be .* got True"),
    ({"refresh_drift": "0.03"}, ValueError, "refresh_drift must be .* got '0.03'"),
    ({"bias_correction": "none"}, ValueError, "bias_correction must be .* got 'none'"),
    ({"master": "fp64"}, ValueError, "master must be .* got 'fp64'"),
    ({"rounding": "up"}, ValueError, "rounding must be .* got 'up'"),
    ({"rounding": "stochastic"}, ValueError, "rounding='stochastic' needs master=None"),
    ({"rounding": "stochastic", "master": None}, ValueError, r"up\.weight: rounding='stochastic' .* got torch.float32"),
    ({"state_dtype": torch.float16}, TypeError, "state_dtype must be .* got torch.float16"),
    ({"lift": "yes"}, ValueError, "lift must be .* got 'yes'"),
]
CONSTRUCTOR_ERRORS = [
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a positive number or None, got 0.0"),
    ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm must be a positive number or None, got nan"),
    ({"max_grad_norm": "1.0"}, ValueError, "max_grad_norm must be a positive number or None, got '1.0'"),
    (
        {"selection": "largest"},
        ValueError,
        "selection must be one of principal, off_principal, magnitude, .*, got 'largest'",
    ),
    (
        {"backend": "cuda"},
        ValueError,
        "unknown backend 'cuda'; choose one of native-cpu, native-cuda, triton, reference",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTION_ERRORS)
def test_a_bad_option_of_a_group(options, error, message):
    """The check is the same in the constructor and for a group that is added later.

    The refused group is not added.
    """
    later = list(zip(NAMES, make_weights(SHAPES)))
    optimizer, _ = make_named()
    assert_refused(
        optimizer, error, message, lambda: optimizer.add_param_group({"params": later, **OPTIONS, **options})
    )
    train(optimizer, [2])
    if "lift" not in options:
        with pytest.raises(error, match=message):
            LiftAdamW(later, **OPTIONS | options)


def test_numbers_of_numpy_are_numbers():
    options = {"lr": numpy.float32(0.01), "betas": (numpy.float64(0.5), numpy.float32(0.5)), "eps": numpy.float32(1e-6)}
    optimizer = LiftAdamW(make_weights(), **OPTIONS | options, max_grad_norm=numpy.float32(1))
    train(optimizer, range(2))
    assert optimizer.grad_norm > 0 and optimizer.param_groups[0]["lr"] == numpy.float32(0.01)


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTOR_ERRORS)
def test_a_bad_option_of_the_optimizer(options, error, message):
    with pytest.raises(error, match=message):
        LiftAdamW(list(zip(NAMES, make_weights(SHAPES))), **OPTIONS | options)


BAD_WEIGHTS = [
    (torch.zeros(6, 8, dtype=torch.float64), {}, TypeError, "weights must be float32, .* got torch.float64"),
    (torch.zeros(6, 8, dtype=torch.complex64), {}, TypeError, "weights must be .* got torch.complex64"),
    (torch.zeros(8, 6).T, {}, ValueError, r"the weight must be contiguous, got strides \(1, 6\)"),
    (torch.zeros(12, 8)[::2], {}, ValueError, r"the weight must be contiguous, got strides \(16, 1\)"),
    (torch.zeros(6, 8).to_sparse(), {}, ValueError, "a dense .* weight is needed, got layout torch.sparse_coo"),
    (torch.zeros(6), {"lift": True}, ValueError, r"LIFT trains matrices and 3-D .* shape \(6,\)"),
    (torch.zeros(2, 3, 4, 5), {"lift": True}, ValueError, r"LIFT trains matrices and 3-D .* shape \(2, 3, 4, 5\)"),
    (torch.zeros(0, 8), {}, ValueError, r"needs 1 to 2\^31-1 entries, got 0"),
    (torch.zeros(1).expand(65536, 32768), {}, ValueError, r"needs 1 to 2\^31-1 entries, got 2147483648"),
    (torch.zeros(65536, 32768, device="meta"), {}, ValueError, r"needs 1 to 2\^31-1 entries, got 2147483648"),
    (torch.zeros(6, 8, device="meta"), {}, ValueError, "the weight is on the meta device .*; load the weights first"),
    (torch.zeros(6, 8, dtype=torch.uint8), {}, TypeError, r"the weight is quantized \(torch.uint8\)"),
    (torch.zeros(6, 8, dtype=torch.float8_e4m3fn), {}, TypeError, r"the weight is quantized \(torch.float8_e4m3fn\)"),
]


@pytest.mark.parametrize(("weight", "options", "error", "message"), BAD_WEIGHTS)
def test_a_weight_that_cannot_be_trained(weight, options, error, message):
    optimizer, _ = make_named()
    group = {"params": [("layers.9.bad.weight", torch.nn.Parameter(weight, False))], "rank": 2, **options}
    assert_refused(optimizer, error, rf"layers\.9\.bad\.weight: {message}", lambda: optimizer.add_param_group(group))


def test_a_parameter_without_a_name_is_named_by_its_place():
    weights = [torch.nn.Parameter(torch.zeros(4, 5, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    with pytest.raises(TypeError, match="parameter 1 of group 0: weights must be .* got torch.float64"):
        LiftAdamW(weights)


def with_gradient(optimizer, weights, which, grad):
    """A step with good gradients but one."""
    set_gradients(weights, 2)
    if grad.dtype != weights[which].dtype:
        weights[which].grad_dtype = None  # torch's switch that allows gradients of another dtype
    weights[which].grad = grad
    optimizer.step()


BAD_GRADIENTS = [
    (
        0,
        torch.zeros(24, 40).to_sparse(),
        RuntimeError,
        "sparse gradients are not supported, got layout torch.sparse_coo; make embeddings with sparse=False",
    ),
    (2, torch.zeros(17).to_sparse(), RuntimeError, "sparse gradients are not supported, got layout torch.sparse_coo"),
    (
        0,
        torch.zeros(24, 40, dtype=torch.complex64),
        TypeError,
        "complex gradients are not supported, got torch.complex64",
    ),
    (1, torch.zeros(33, 17, dtype=torch.float64), TypeError, "gradients must be float32, .* got torch.float64"),
    (2, torch.zeros(17, dtype=torch.complex64), TypeError, "complex gradients are not supported, got torch.complex64"),
]


@pytest.mark.parametrize(("which", "grad", "error", "message"), BAD_GRADIENTS)
def test_a_bad_gradient(which, grad, error, message):
    """A bad gradient, dense or not, is found before the first matrix has moved."""
    optimizer, weights = make_named()
    message = NAMES[which].replace(".", r"\.") + ": " + message
    assert_refused(optimizer, error, message, lambda: with_gradient(optimizer, weights, which, grad))


def test_a_weight_made_strided_behind_the_back():
    optimizer, weights = make_named()
    weights[1].data = torch.zeros(17, 33).T
    set_gradients(weights, 2)
    weights[1].grad = weights[1].grad.contiguous()
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"layers\.0\.down\.weight: the weight must be contiguous, got strides \(1, 33\)"
    ):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_a_weight_given_another_dtype_behind_the_back():
    """After `model.bfloat16()` the state no longer fits."""
    optimizer, weights = make_named()
    for w in weights[:2]:
        w.grad = None
        w.data = w.data.to(BF16)
    set_gradients(weights, 2)
    assert_refused(optimizer, TypeError, r"layers\.0\.up\.weight: .*bfloat16.*float32", optimizer.step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("selection", ["principal", "off_principal", "random", lambda w, k: torch.arange(k).int()])
def test_non_finite_weights(value, selection):
    """At the first mask the step is refused. At a refresh by hand every mask stays."""
    weights = make_weights(SHAPES)
    optimizer = LiftAdamW(list(zip(NAMES, weights)), **OPTIONS, selection=selection)
    with torch.no_grad():
        weights[1][2, 3] = value
    set_gradients(weights, 0)
    message = r"layers\.0\.down\.weight: 1 non-finite weights, the first at flat index 37"
    assert_refused(optimizer, ValueError, message, optimizer.step)
    with torch.no_grad():
        weights[1][2, 3] = 0.5
    optimizer.step()
    with torch.no_grad():
        weights[0].mul_(torch.linspace(-2, 2, 40))
        weights[1][2, 3] = value
    assert_refused(optimizer, ValueError, message, optimizer.refresh)


BAD_SELECTIONS = [
    (lambda w, k: torch.tensor([1, 0], dtype=torch.int32), ValueError, "sorted without duplicates, got 1 before 0"),
    (lambda w, k: torch.tensor([4, 4], dtype=torch.int32), ValueError, "sorted without duplicates, got 4 before 4"),
    (
        lambda w, k: torch.tensor([0, w.numel()], dtype=torch.int32),
        IndexError,
        "index 561 is out of range for 561 entries",
    ),
    (lambda w, k: torch.tensor([-1, 2], dtype=torch.int32), IndexError, "index -1 is out of range"),
    (lambda w, k: torch.tensor([0, 2]), TypeError, "must be int32, got torch.int64"),
    (lambda w, k: torch.zeros(0, 2, dtype=torch.int32), ValueError, r"one-dimensional, got shape \(0, 2\)"),
    (lambda w, k: [0, 1], TypeError, "must be a tensor, got list"),
    (lambda w, k: torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "is on meta, expected cpu"),
]


@pytest.mark.parametrize(("selection", "error", "message"), BAD_SELECTIONS)
def test_a_selection_that_returns_no_index_list(selection, error, message):
    """The good mask of the first matrix is not used alone."""
    optimizer, weights = make_named()
    optimizer.selection = lambda w, k: torch.arange(k, dtype=torch.int32) if w.shape[0] == 24 else selection(w, k)
    assert_refused(optimizer, error, rf"layers\.0\.down\.weight: .*{message}", optimizer.refresh)


def entry_change(key, value):
    def change(saved):
        saved["state"][1][key] = value(saved["state"][1][key])

    return change


def entry_of_version_01(shape):
    """The shape as a list."""

    def change(saved):
        del saved["state"][1]["matrix_shape"]
        saved["state"][1]["shape"] = shape

    return change


def drop(key):
    return lambda saved: saved["state"][1].pop(key)


def swap_order(saved):
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]


BAD_STATES = [
    (
        lambda saved: saved.pop("state"),
        ValueError,
        r"holds 'state' and 'param_groups', got \['param_groups'\]; give what LiftAdamW.state_dict\(\) returned",
    ),
    (
        lambda saved: [saved["param_groups"][0].update(lift=False), drop("indices")(saved)],
        ValueError,
        r"up\.weight: lift=False in the state dict, but this optimizer trains it sparsely",
    ),
    (lambda saved: saved["param_groups"][0]["params"].pop(), ValueError, "has 3 param_names for 2 parameters"),
    (
        lambda saved: [saved["param_groups"][0].pop("param_names"), saved["param_groups"][0]["params"].pop()],
        ValueError,
        "of a model with 2 parameters, this .* has 3",
    ),
    (
        lambda saved: saved["state"][2].pop("step"),
        ValueError,
        r"norm\.weight: the state dict holds no step; give what LiftAdamW",
    ),
    (lambda saved: saved["state"].update({7: {}}), ValueError, "entry for parameter 7, which is in none of its groups"),
    (entry_change("exp_avg", lambda x: x.tolist()), TypeError, r"down\.weight: exp_avg .* must be a tensor, got list"),
    (
        lambda saved: saved["state"][1].update(births=None),
        TypeError,
        r"down\.weight: births .* must be a tensor, got NoneType",
    ),
    (
        entry_change("matrix_shape", lambda s: [33, 17]),
        TypeError,
        r"down\.weight: matrix_shape of the state dict must be a tensor, got list",
    ),
    (entry_of_version_01(5), TypeError, r"down\.weight: shape of the state dict must be a list, got 5"),
    (entry_of_version_01([17, 33]), ValueError, r"down\.weight: .* shape \(17, 33\), this one is \(33, "),
    (
        lambda saved: saved["state"][2].update(step=None),
        TypeError,
        r"norm\.weight: step .* must be a tensor, got NoneType",
    ),
    (
        lambda saved: saved["state"][2].update(step=torch.zeros(3)),
        ValueError,
        r"norm\.weight: step of the state dict must be one number, .* \(3,\)",
    ),
    (
        lambda saved: saved["param_groups"][0].update(lift=False),
        ValueError,
        r"up\.weight: lift=False in the state dict, but this optimizer trains it sparsely",
    ),
    (swap_order, ValueError, r"up\.weight: .* matrix of shape \(33, 17\), this one is \(24, 40\)"),
    (entry_change("matrix_shape", lambda s: s.flip(0)), ValueError, r"down\.weight: .* shape \(17, 33\), this one is"),
    (entry_change("matrix_shape", lambda s: s[0]), ValueError, r"down\.weight: .* shape \(33,\), this one is \(33, "),
    (entry_change("version", lambda v: 2), ValueError, r"down\.weight: .* version 2, this package reads 1"),
    (
        drop("indices"),
        ValueError,
        r"down\.weight: .* no index list, so another optimizer has saved it; give what LiftAdamW",
    ),
    (drop("exp_avg_sq"), ValueError, r"down\.weight: .* holds no exp_avg_sq"),
    (drop("step"), ValueError, r"down\.weight: .* holds no step"),
    (entry_change("step", lambda s: torch.zeros(2)), ValueError, r"down\.weight: step .* \(2,\)"),
    (entry_change("indices", lambda x: x.long()), TypeError, r"down\.weight: .* must be int32, got torch.int64"),
    (entry_change("indices", lambda x: x.flip(0)), ValueError, r"down\.weight: .* sorted without duplicates"),
    (entry_change("indices", lambda x: x + 561), IndexError, r"down\.weight: index \d+ is out of range for 561"),
    (
        entry_change("indices", lambda x: x[:-1]),
        ValueError,
        r"down\.weight: exp_avg .* has 56 entries, its index list 55",
    ),
    (
        entry_change("exp_avg", lambda x: x[:-2]),
        ValueError,
        r"down\.weight: exp_avg .* has 54 entries, its index list 56",
    ),
    (
        entry_change("exp_avg", lambda x: x.double()),
        TypeError,
        r"down\.weight: exp_avg .* must be .* got torch.float64",
    ),
    (
        lambda saved: saved["state"][2].update(exp_avg=torch.zeros(16)),
        ValueError,
        r"norm\.weight: exp_avg .* shape \(16,\), this parameter \(17,\)",
    ),
    (
        lambda saved: saved["state"][2].update(indices=torch.arange(3).int()),
        ValueError,
        r"norm\.weight: the state dict holds a LIFT mask, but this parameter is trained densely",
    ),
    (lambda saved: saved["param_groups"][0].pop("refresh_interval"), ValueError, "refresh_interval"),
    (lambda saved: saved["param_groups"][0].update(betas=(0.9, 2.0)), ValueError, r"betas must be .* got \(0.9, 2.0\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STATES)
def test_a_state_dict_that_does_not_fit(change, error, message):
    optimizer, weights = make_named()
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, [2])
    change(saved)
    assert_refused(optimizer, error, message, lambda: optimizer.load_state_dict(saved))
    train(optimizer, [3])
    other, copies = make_named()
    train(other, range(2, 4))
    assert all(torch.equal(w, t) for w, t in zip(weights, copies)), "the failed load has left a trace"


@pytest.mark.parametrize("steps", [0, 2])
def test_the_state_of_torch_adamw(steps):
    optimizer, _ = make_named()
    other = torch.optim.AdamW(make_weights(SHAPES))
    train(other, range(steps))
    message = (
        "a group of the state dict lacks .*density.*, so another optimizer has saved it; give what LiftAdamW.state_dict"
    )
    assert_refused(optimizer, ValueError, message, lambda: optimizer.load_state_dict(other.state_dict()))


def test_no_linear_weight_and_overlapping_rules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"0\.weight matches both include='0' and exclude='weight'"):
        lift_param_groups(model, include="0", exclude="weight", freeze_rest=True)
    with pytest.raises(ValueError, match="no linear weight of Sequential is left with include='attn'"):
        lift_param_groups(model, include="attn", freeze_rest=True)
    assert all(p.requires_grad for p in model.parameters())


def test_a_refused_group_is_left_as_it_was():
    """torch fills in the options of its optimizer. Those of a refused one would stay."""
    group = {"params": [("w", torch.nn.Parameter(torch.zeros(4, 5)))], "density": 2.0}
    before = dict(group)
    with pytest.raises(ValueError, match=r"w: density must be in \(0, 1\], got 2.0"):
        LiftAdamW([group])
    assert group == before
