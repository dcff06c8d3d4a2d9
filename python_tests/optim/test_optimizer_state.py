"""Saved and loaded state is plain and compact, keeps its dtypes, and continues to the bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, bits
from helpers.optimizers import INTERRUPTIONS, OPTIONS, assert_same, make_weights, set_gradients, snapshot, train
from torch._subclasses.fake_tensor import FakeTensorMode

from lift_kernels import LiftAdamW
from lift_kernels.optim.state_dict import compact

FORMS = {
    "fp32": (FP32, {}),
    "fp32-bf16-moments-per-entry": (FP32, {"state_dtype": BF16, "bias_correction": "per_entry"}),
    "bf16-master": (BF16, {}),
    "bf16-master-bf16-moments-per-entry": (BF16, {"state_dtype": BF16, "bias_correction": "per_entry"}),
    "bf16-stochastic": (BF16, {"master": None, "rounding": "stochastic", "seed": 3}),
    "fp16-nearest-clipped": (FP16, {"master": None, "max_grad_norm": 0.7}),
}


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_an_interruption_changes_no_bit(backend, form, interrupt):
    """Training stops between two refreshes and continues past the next one.

    Parameters are sparse and dense.
    """
    dtype, extra = FORMS[form]
    weights = make_weights(((24, 40), (24,), (33, 17), (10, 10)), dtype, backend.device)
    groups = [{"params": weights[:2]}, {"params": weights[2:], "density": 0.3, "lr": 0.02}]
    optimizer = LiftAdamW(groups, **OPTIONS, refresh_interval=3, backend=backend.name, **extra)
    train(optimizer, range(5))
    other, other_weights = interrupt(optimizer, weights)
    storages = [{t.data_ptr() for entry in o.state.values() for t in entry.values()} for o in (optimizer, other)]
    assert_same(snapshot(other), snapshot(optimizer))
    train(optimizer, range(5, 8))
    assert other.state_bytes() == optimizer.state_bytes()
    train(other, range(5, 8))
    assert_same(snapshot(other), snapshot(optimizer))
    assert not storages[0] & storages[1] and not {w.data_ptr() for w in weights} & {w.data_ptr() for w in other_weights}
    for entry in other.state.values():
        assert ("births" in entry) == ("indices" in entry and extra.get("bias_correction") == "per_entry")


def test_a_copy_is_independent():
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS)
    train(optimizer, range(2))
    before = snapshot(optimizer)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other, _ = copy.deepcopy((optimizer, weights))
    train(other, range(3))
    assert_same(snapshot(optimizer), before)
    train(optimizer, range(2, 4))
    for i, entry in saved["state"].items():
        for key, value in entry.items():
            same = (
                torch.equal(value, kept["state"][i][key])
                if isinstance(value, torch.Tensor)
                else value == kept["state"][i][key]
            )
            assert same, f"a saved state dict must not follow the training: {key}"


@pytest.mark.parametrize("interval", [None, 2])
def test_training_leaves_a_loaded_state_dict_alone(interval):
    """A second load of it gives the same run, for dense parameters too."""
    weights = make_weights(((24, 40), (17,)))
    optimizer = LiftAdamW(weights, **OPTIONS, refresh_interval=interval)
    train(optimizer, range(2))
    saved, values = optimizer.state_dict(), [w.detach().clone() for w in weights]
    results = []
    for _ in range(2):
        other = [torch.nn.Parameter(value.clone()) for value in values]
        loaded = LiftAdamW(other, **OPTIONS)
        loaded.load_state_dict(saved)
        train(loaded, range(2, 5))
        results.append(snapshot(loaded))
    train(optimizer, range(2, 5))
    for result in results:
        assert_same(result, snapshot(optimizer))


def test_state_is_shown_as_views():
    """The next step uses what is written into ``optimizer.state[p]``."""
    weights, copies = make_weights(), make_weights()
    optimizer, other = LiftAdamW(weights, **OPTIONS), LiftAdamW(copies, **OPTIONS)
    train(optimizer, range(2))
    train(other, range(2))
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weights[0]][key].zero_()
    train(optimizer, [2])
    train(other, [2])
    grad = weights[0].grad.flatten()[optimizer.state[weights[0]]["indices"].long()]
    torch.testing.assert_close(optimizer.state[weights[0]]["exp_avg"], (1 - 0.9) * grad, rtol=1e-6, atol=0)
    assert torch.equal(weights[1], copies[1]) and not torch.equal(weights[0], copies[0])


def test_state_dict_keeps_dtypes_through_a_file():
    """int32 65537 is no bf16 number: a cast to the weight's dtype would make it 65536."""
    weight = torch.nn.Parameter(torch.zeros(2, 40000, dtype=BF16))
    chosen = torch.tensor([0, 1, 65537, 79999], dtype=torch.int32)
    options = {
        "selection": lambda w, k: chosen.clone(),
        "bias_correction": "per_entry",
        "rank": 1,
        "refresh_interval": None,
    }
    optimizer = LiftAdamW([("w", weight)], **options)
    train(optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = torch.nn.Parameter(weight.detach().clone())
    other = LiftAdamW([("w", copied)], **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    entry = other.state[copied]
    assert torch.equal(entry["indices"], chosen) and entry["indices"].dtype == torch.int32
    dtypes = {key: value.dtype for key, value in entry.items()}
    assert dtypes == {
        "step": FP32,
        "indices": torch.int32,
        "exp_avg": FP32,
        "exp_avg_sq": FP32,
        "master": FP32,
        "births": torch.int32,
    }
    for key, value in optimizer.state[weight].items():
        assert torch.equal(bits(value), bits(entry[key])), key
    assert other.state[copied]["step"] == 2


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and plain(v) for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor, torch.dtype)


def test_state_dict_is_plain_and_compact():
    """Only k entries per matrix are saved, in tensors that own just their bytes.

    This is 12 bytes per entry, 1 kB for a sample of each weight, and a few kB in all.
    """
    weights = make_weights(((200, 300), (300, 100)))
    optimizer = LiftAdamW(weights, lr=torch.tensor(0.01), rank=4, density=0.1)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert plain(saved) and list(saved) == ["state", "param_groups"]
    tensors = [t for entry in saved["state"].values() for t in entry.values() if isinstance(t, torch.Tensor)]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) == 16
    assert [saved["state"][i]["matrix_shape"].tolist() for i in (0, 1)] == [[200, 300], [300, 100]]
    assert all(saved["state"][i]["version"] == 1 for i in (0, 1))
    file = io.BytesIO()
    torch.save(saved, file)
    assert 12 * 9000 + 2048 < file.tell() < 12 * 9000 + 2048 + 8000


def test_a_saved_state_is_in_host_memory_where_that_is_wanted():
    """Fake tensors stand in for those of a card."""
    with FakeTensorMode():
        entry = {"step": torch.zeros(()), "exp_avg": torch.ones(2, device="cuda"), "count": 3}
        on_host, cloned = compact(entry, host=True), compact(entry)
    assert on_host["exp_avg"].device.type == on_host["step"].device.type == "cpu"
    assert cloned["exp_avg"].device.type == "cuda" and cloned["step"].device.type == "cpu"
    for out in (on_host, cloned):
        assert out["exp_avg"].shape == (2,) and out["exp_avg"].untyped_storage().nbytes() == 8
        assert out["exp_avg"] is not entry["exp_avg"] and out["step"] is not entry["step"] and out["count"] == 3


@pytest.mark.parametrize("host", [False, True])
def test_a_saved_state_on_the_cpu_is_a_clone(host):
    entry = {"exp_avg": torch.arange(6.0)[2:4], "step": torch.tensor(1.0)}
    out = compact(entry, host=host)
    entry["exp_avg"].zero_()
    entry["step"].zero_()
    assert out["exp_avg"].tolist() == [2.0, 3.0] and out["step"] == 1.0
    assert out["exp_avg"].untyped_storage().nbytes() == 8


def test_state_bytes_counts_every_storage_once():
    """A sparse matrix has 12 bytes for each of k entries, padded to 64.

    A dense parameter has twice its own size and a step.
    """
    weights = make_weights(((200, 300), (300, 100), (50,)))
    optimizer = LiftAdamW(weights, rank=4, density=0.1)
    assert optimizer.state_bytes() == 0
    train(optimizer, [0])
    entries = 6016 + 3008  # 6000 and 3000, padded
    assert optimizer.state_bytes() == 12 * entries + 2 * 4 + 2 * 4 + 2 * 50 * 4 + 4  # steps, thresholds, dense
    dense = sum(2 * 4 * w.numel() for w in weights)
    assert optimizer.state_bytes() < 0.16 * dense


def test_a_loaded_mask_replaces_one_made_before():
    """Loading before or after the first step leads to the same run."""
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS, refresh_interval=4)
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    results = []
    for steps_before in (0, 2):
        copies = make_weights()
        other = LiftAdamW(copies, **OPTIONS, selection="random", refresh_interval=4)
        train(other, range(steps_before))
        with torch.no_grad():
            for copied, w in zip(copies, weights):
                copied.copy_(w)
        other.load_state_dict(saved)
        other.selection = "principal"
        train(other, range(3, 6))
        results.append(snapshot(other))
    train(optimizer, range(3, 6))
    for result in results:
        assert_same(result, snapshot(optimizer))


def test_an_empty_state_dict_loads():
    """accelerate's ``prepare`` loads a state dict from before the first step."""
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS)
    optimizer.load_state_dict(optimizer.state_dict())
    copies = make_weights()
    train(optimizer, range(2))
    train(LiftAdamW(copies, **OPTIONS), range(2))
    assert all(torch.equal(w, other) for w, other in zip(weights, copies))


def test_options_travel_with_the_state():
    weights = make_weights()
    optimizer = LiftAdamW(
        weights, **OPTIONS | {"lr": 0.5}, bias_correction="per_entry", maximize=True, refresh_interval=9
    )
    train(optimizer, range(2))
    other = LiftAdamW(make_weights())
    other.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.param_groups[0].items():
        if key != "params":
            assert other.param_groups[0][key] == value, key
    assert other.param_groups[0]["steps_since_refresh"] == 2


def test_a_master_loaded_onto_other_weights_follows_them():
    """An optimizer state that is older than the weights must not undo them at the next step.

    It has no sample of its weights, as a state of an earlier version.
    """
    weights = make_weights(dtype=BF16)
    optimizer = LiftAdamW(weights, **OPTIONS, refresh_interval=None)
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        del entry["weight_sample"]
    newer = [torch.nn.Parameter(w.detach() + 1) for w in weights]
    other = LiftAdamW(newer, **OPTIONS | {"lr": 0.0}, refresh_interval=None)
    other.load_state_dict(saved)
    other.param_groups[0].update(lr=0.0)
    start = [w.detach().clone() for w in newer]
    set_gradients(newer, 3)
    other.step()
    assert all(torch.equal(w, s) for w, s in zip(newer, start))


@pytest.mark.parametrize("options", [{"selection": "random"}, {"master": None, "rounding": "stochastic"}])
def test_the_seed_travels_with_the_state(options):
    """Random masks and stochastic rounding continue as without the interruption.

    The seed of the new optimizer does not matter.
    """
    weights = make_weights(dtype=BF16)
    options = OPTIONS | options
    optimizer = LiftAdamW(weights, **options, refresh_interval=3, seed=5)
    train(optimizer, range(2))
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    other = LiftAdamW(copies, **options, refresh_interval=3)
    other.load_state_dict(optimizer.state_dict())
    assert other.seed == 5 and other.param_groups[0]["seed"] == 5
    train(optimizer, range(2, 5))
    train(other, range(2, 5))
    assert_same(snapshot(other), snapshot(optimizer))
