"""Files that an earlier version wrote load to the same bits and train on to the same bits.

The files are state dicts, checkpoints and deltas.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data import write_saved_states as writer

from lift_kernels import apply_delta, delta_info, revert_delta
from lift_kernels.checkpoint.training_state import load_checkpoint

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def states():
    return torch.load(DATA / "saved_states.pt", weights_only=True)


def assert_same(found, expected, place="state"):
    """Check equal types and values throughout nested containers, tensors to the bit."""
    assert type(found) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, place
        assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{place}.{number}")
    else:
        assert found == expected, place


def sparse_part(model_state, optimizer_state):
    """The matrices and their state.

    The package's kernels update them the same on every machine.
    """
    entries = {key: entry for key, entry in as_then(optimizer_state)["state"].items() if "indices" in entry}
    return {name: tensor for name, tensor in model_state.items() if tensor.dim() == 2}, entries


def as_then(optimizer_state):
    """A state dict as version 0.1 saved it.

    It knew neither samples of weights nor a bound of drift, and no state in host memory. Shapes
    were lists.
    """
    entries, groups = {}, []
    for i, entry in optimizer_state["state"].items():
        entries[i] = {key: value for key, value in entry.items() if key not in ("weight_sample", "matrix_shape")}
        if "matrix_shape" in entry:
            entries[i] |= {"shape": entry["matrix_shape"].tolist(), "version": int(entry["version"])}
    for group in optimizer_state["param_groups"]:
        groups.append({key: value for key, value in group.items() if key not in ("refresh_drift", "offload")})
    return {**optimizer_state, "state": entries, "param_groups": groups}


def test_there_is_a_case_of_every_kind(states):
    assert sorted(states) == sorted(writer.cases()) and len(states) == 36


@pytest.mark.parametrize("case", writer.cases())
def test_a_saved_state_loads_and_trains_on_to_the_same_bits(states, case):
    saved = states[case]
    torch.manual_seed(99)  # weights and first masks of another model
    model = writer.new_model(writer.DTYPES[case.split("-")[1]])
    optimizer = writer.new_optimizer(case, model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(writer.copied(saved["optimizer"]))
    assert_same(dict(model.state_dict()), dict(saved["model"]))
    assert_same(as_then(optimizer.state_dict()), saved["optimizer"])
    for grads in saved["gradients"]:
        writer.step(optimizer, grads)
    found, expected = (
        sparse_part(model.state_dict(), optimizer.state_dict()),
        sparse_part(saved["model_after"], saved["optimizer_after"]),
    )
    assert len(expected[0]) == len(expected[1]) == 2
    assert_same(found, expected)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(saved["model_after"])
    )  # torch computes this part; its bits may differ


def test_the_checkpoint_holds_the_same_states(states):
    expected = {case: plain(states[case]) for case in writer.checkpointed()}
    assert len(expected) == 6
    assert_same(load_checkpoint(DATA / "saved_states.checkpoint"), expected)


def plain(value):
    """The same containers with plain dicts, because a checkpoint keeps no subclass of dict."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("dtype", writer.DTYPES)
def test_a_saved_delta_turns_the_base_into_the_model_and_back(states, dtype):
    case = states[f"matrix-{dtype}-global-fp32-all"]
    path = DATA / f"saved_{dtype}.delta"
    info = delta_info(path)
    assert info.settings == {"density": 0.1} and set(info.dtypes.values()) == {writer.DTYPES[dtype]}
    assert 0 < info.counts["0.weight"] <= 48 and len(info.counts) == 6
    model = writer.new_model(writer.DTYPES[dtype])
    model.load_state_dict(case["model"])
    apply_delta(model, path)
    assert_same(dict(model.state_dict()), dict(case["model_after"]))
    revert_delta(model, path)
    assert_same(dict(model.state_dict()), dict(case["model"]))
